"""Where a decoder starts: at the linear one that fits some cells best."""

import torch
from torch import Tensor

from scuvae.batches import Batch, SparseRows
from scuvae.model.vae import VAE


@torch.no_grad()
def start_decoder(model: VAE, batch: Batch, z: Tensor) -> None:
    """Start the decoder at the linear one that fits some cells best at given z, (cells, latent).

    Hidden units have no part in it yet: what they add is learnt from there. From random weights
    decoders end in other places for every seed, and worse ones.
    """
    decoder = model.decoder
    linear = len(decoder.layers) == 1
    if not linear and not decoder.linear_path:
        return
    intercepts, loadings = fit_loadings(batch, z, link=model.likelihood.link)
    if linear:
        loadings, of_batches = loadings.split([model.n_latent, decoder.n_covariates], 1)
        if decoder.offset is not None:
            decoder.offset.weight.copy_(of_batches)
    output = decoder.output
    output.bias.copy_(intercepts)
    output.weight.zero_()
    output.weight[:, -loadings.shape[1] :] = loadings


@torch.no_grad()
def fit_loadings(batch: Batch, z: Tensor, *, link: str, n_steps: int = 6) -> tuple[Tensor, Tensor]:
    """Intercepts, (genes,), and loadings, (genes, latent + batches), of a linear decoder, z given.

    Under a softmax those of a Poisson regression with log link and each cell's total as exposure,
    under a logit those of a logistic regression, by Newton steps from the genes' means; under an
    identity those of least squares. Loadings have a standard normal prior.
    """
    design = torch.cat([torch.ones_like(z[:, :1]), z], 1)
    if batch.covariates is not None:
        design = torch.cat([design, batch.covariates], 1)
    x = batch.x
    matrix = x.matrix() if isinstance(x, SparseRows) else x
    n = design.shape[1]
    prior = torch.ones(n).to(z)
    prior[0] = 0.0
    first = (matrix.mT @ design).T.contiguous()  # (design, genes)
    if link == "identity":
        found = torch.linalg.solve(design.mT @ design + torch.diag(prior + 1e-4), first).T
        return found[:, 0].contiguous(), found[:, 1:].contiguous()
    exposure = batch.size_factor.clamp_min(1e-12)
    i, j = torch.tril_indices(n, n).to(z.device)
    pairs = design[:, i] * design[:, j]
    if link == "logit":
        # Of a gene that is everywhere, or nowhere, a tenth of a cell is taken to differ.
        total = first[0].clamp_(0.1, len(z) - 0.1)
        start = (total / len(z)).logit()
    else:
        total = first[0].clamp_min(0.1)
        start = (total / exposure.sum()).log()
    found = z.new_zeros(n, len(total))
    found[0] = start
    for _ in range(n_steps):
        eta = design @ found
        if link == "logit":
            mu = eta.sigmoid_()
            weight = mu * (1 - mu)
        else:
            weight = mu = eta.exp_().mul_(exposure.unsqueeze(1))
        gradient = first - design.mT @ mu - prior.unsqueeze(1) * found
        hessian = z.new_zeros(len(total), n, n)
        hessian[:, i, j] = hessian[:, j, i] = weight.mT @ pairs
        hessian += torch.diag(prior + 1e-4)
        step = torch.linalg.solve(hessian, gradient.T.unsqueeze(-1)).squeeze(-1)
        # From far away a Newton step overshoots.
        found += (step / step.norm(dim=1, keepdim=True).clamp_min(1.0)).T
    return found[0].clone(), found[1:].T.contiguous()
