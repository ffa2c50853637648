"""How well the decoder at given points explains each cell: for many points at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import Batch, SparseRows
from scuvae.batches.sparse_rows import dense, select
from scuvae.model import VAE

# Logits of points held at once: 64 MB.
NUMBERS_AT_ONCE = 2**24


@torch.no_grad()
def profile_log_likelihood(model: VAE, batch: Batch, z: Tensor) -> Tensor:
    """About log p(x | z) of each cell at each of the points z, up to a term of the cell.

    Counts are compared as multinomial draws from the decoder's profiles, zeros and ones by their
    likelihood, real values by weighted squares: products of matrices, so that hundreds of points
    cost less than a step. Points are decoded under each batch. What a cell's other covariates add
    at z = 0 is taken to be what they add at every point: there may be a combination of their own
    for every cell.

    Returns
    -------
    (cells, points), in nats.
    """
    some = z.split(max(1, NUMBERS_AT_ONCE // model.n_vars))
    if batch.covariates is None:
        return torch.cat([profile_given(model, batch, points, None) for points in some], 1)
    out = z.new_empty(len(batch), len(z))
    kinds, kind = _decoded_under(model, batch.covariates).unique(dim=0, return_inverse=True)
    for number, covariates in enumerate(kinds):
        rows = (kind == number).nonzero().squeeze(-1)
        own = batch.take(rows)
        parts = [profile_given(model, own, points, covariates) for points in some]
        out[rows] = torch.cat(parts, 1)
    return out


def _decoded_under(model: VAE, covariates: Tensor) -> Tensor:
    """Each cell's batch, or other first covariate; the first level of others, the mean of numbers.

    None of these changes with levels that a projection adds.
    """
    design = model.design
    n_first = design.n_levels[0] if design.categorical else 0
    if design.n_columns in (0, n_first):
        return covariates
    out = torch.zeros_like(covariates)
    out[:, :n_first] = covariates[:, :n_first]
    for number in range(1, len(design.categorical)):
        out[:, design.columns_of(number).start] = 1.0
    return out


def profile_given(model: VAE, batch: Batch, z: Tensor, covariates: Tensor | None) -> Tensor:
    eta = model.decoder(z, None if covariates is None else covariates.expand(len(z), -1))
    x, observed = batch.x, batch.observed
    beside = _beside(model, batch, z, covariates)
    link = model.likelihood.link
    if link == "identity":
        x = dense(x) if beside is None else dense(x) - beside
        likelihood = model.likelihood_of(batch.covariates)
        weight, _ = likelihood.fisher(x, eta[:1].expand_as(x), batch.size_factor, observed)
        return (weight * x) @ eta.T - 0.5 * weight @ eta.square().T
    if observed is not None:
        eta = eta[:, observed]
        x = select(x, observed)
        beside = None if beside is None else beside[:, observed]
    # Laid out anew: a sparse product with a transposed matrix takes twenty times as long.
    profiles = (F.log_softmax(eta, -1) if link == "softmax" else eta).T.contiguous()
    found = (x.matrix() if isinstance(x, SparseRows) else x) @ profiles
    if link == "softmax":
        if beside is None:
            return found
        # Of softmax(η + b) the sum that divides it: Σ softmax(η) exp(b), times that of η.
        highest = beside.amax(1, keepdim=True)
        more = ((beside - highest).exp() @ profiles.exp()).log() + highest
        total = x.sum() if isinstance(x, SparseRows) else x.sum(1)
        return found - total.unsqueeze(1) * more
    if beside is None:
        return found - F.softplus(eta).sum(-1)
    return found - torch.stack([F.softplus(eta + own).sum(-1) for own in beside])


def _beside(model: VAE, batch: Batch, z: Tensor, covariates: Tensor | None) -> Tensor | None:
    """What cells' covariates add to η at z = 0 beside these, (cells, genes); None for nothing."""
    own = batch.covariates
    if covariates is None or own is None or not (own != covariates).any():
        return None
    zero = torch.zeros_like(z[:1])
    at_zero = model.decoder(zero.expand(len(own), -1), own)
    return at_zero - model.decoder(zero, covariates.unsqueeze(0))
