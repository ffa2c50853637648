"""Where q begins: a whitened PCA in training; with a decoder, the likeliest of some points."""

import torch
from torch import Tensor

from scuvae.inference.affinity import affinity
from scuvae.inference.local_steps import normal_points
from scuvae.model import VAE, Batch, SparseRows

# Enough cells to find the leading components by; the others are projected on them.
MOST_CELLS = 20_000
# Draws of the prior that a cell may begin at.
_PRIOR_POINTS = 512


class WhitenedPCA:
    """Principal components scaled to unit variance, fitted to one batch and applied to any.

    Counts enter as log(1 + x · median / ℓ); other values as they are. The matrix is centred
    implicitly and never densified; torch's current random state seeds the randomised method.
    """

    def __init__(self, batch: Batch, n_latent: int, *, counts: bool) -> None:
        self.counts = counts
        self.target = batch.size_factor.median()
        x = self._values(batch)
        n_cells, n_vars = x.shape
        # With batches each one's own: what sets them apart is not theirs to span.
        member = batch.covariates
        if member is None:
            member = torch.ones(n_cells, 1, dtype=x.dtype, device=x.device)
        self.centre = (x.mT @ member).mT / member.sum(0).clamp_min(1.0).unsqueeze(1)
        rank = min(n_latent, n_cells, n_vars)
        singular, right = _leading(x, member, self.centre, rank)
        scale = singular / n_cells**0.5
        # Components without variance start at zero rather than at noise blown up.
        inverse = torch.where(scale > 1e-6 * scale[0].clamp_min(1e-12), 1 / scale, 0.0)
        self.basis = torch.zeros(n_vars, n_latent, dtype=x.dtype, device=x.device)
        self.basis[:, :rank] = right * inverse

    def __call__(self, batch: Batch) -> Tensor:
        """Whitened scores of the batch's cells, (cells, latent)."""
        centre = self.centre @ self.basis
        if batch.covariates is not None:
            centre = batch.covariates @ centre
        return self._values(batch) @ self.basis - centre

    def _values(self, batch: Batch) -> Tensor:
        x = batch.x
        if not isinstance(x, SparseRows):
            if not self.counts:
                return x
            return (x * (self.target / batch.size_factor.clamp_min(1e-12)).unsqueeze(1)).log1p()
        value = x.value
        if self.counts:
            factor = self.target / batch.size_factor.clamp_min(1e-12)
            value = (value * factor[x.row]).log1p()
        return SparseRows(x.starts, x.col, value, x.n_vars).matrix()


def _leading(x: Tensor, member: Tensor, centre: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right singular vectors, (genes, rank), of x − ``member centre``.

    Subspace iteration of Halko, Martinsson & Tropp, SIAM Review 2011. ``torch.svd_lowrank`` would
    write out the centre as a matrix of the shape of ``x``.
    """

    def times(v: Tensor) -> Tensor:
        return x @ v - member @ (centre @ v)

    def transposed_times(u: Tensor) -> Tensor:
        return x.mT @ u - centre.mT @ (member.mT @ u)

    width = min(rank + 10, *x.shape)
    u = times(torch.randn(x.shape[1], width, dtype=x.dtype, device=x.device))
    for _ in range(4):
        v = torch.linalg.qr(transposed_times(torch.linalg.qr(u).Q)).Q
        u = times(v)
    _, singular, right = torch.linalg.svd(transposed_times(torch.linalg.qr(u).Q).mT, False)
    return singular[:rank], right[:rank].mT


@torch.no_grad()
def likeliest(model: VAE, batch: Batch) -> Tensor:
    """For each cell the z that explains it best among fixed draws of the prior, (cells, latent).

    By :func:`scuvae.inference.affinity.affinity` and the prior's density. Means of training cells
    as further points gain nothing, and would let a cell's posterior depend on them.
    """
    like = next(model.decoder.parameters())
    drawn = normal_points(_PRIOR_POINTS, like.new_empty(model.n_latent)).squeeze(1)
    z = torch.cat([like.new_zeros(1, model.n_latent), drawn])
    return z[(affinity(model, batch, z) - 0.5 * z.square().sum(-1)).argmax(1)]


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
    intercepts, loadings = fit_loadings(batch, z, counts=model.likelihood.counts)
    if linear:
        loadings, of_batches = loadings.split([model.n_latent, decoder.n_covariates], 1)
        if decoder.offset is not None:
            decoder.offset.weight.copy_(of_batches)
    output = decoder.output
    output.bias.copy_(intercepts)
    output.weight.zero_()
    output.weight[:, -loadings.shape[1] :] = loadings


@torch.no_grad()
def fit_loadings(
    batch: Batch, z: Tensor, *, counts: bool, n_steps: int = 6
) -> tuple[Tensor, Tensor]:
    """Intercepts, (genes,), and loadings, (genes, latent + batches), of a linear decoder, z given.

    Of counts those of a Poisson regression with log link and each cell's total as exposure, by
    Newton steps from the genes' means; of other values those of least squares. Loadings have a
    standard normal prior.
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
    if not counts:
        found = torch.linalg.solve(design.mT @ design + torch.diag(prior + 1e-4), first).T
        return found[:, 0].contiguous(), found[:, 1:].contiguous()
    exposure = batch.size_factor.clamp_min(1e-12)
    i, j = torch.tril_indices(n, n).to(z.device)
    pairs = design[:, i] * design[:, j]
    total = first[0].clamp_min(0.1)
    found = z.new_zeros(n, len(total))
    found[0] = (total / exposure.sum()).log()
    for _ in range(n_steps):
        mu = (design @ found).exp_().mul_(exposure.unsqueeze(1))
        gradient = first - design.mT @ mu - prior.unsqueeze(1) * found
        hessian = z.new_zeros(len(total), n, n)
        hessian[:, i, j] = hessian[:, j, i] = mu.mT @ pairs
        hessian += torch.diag(prior + 1e-4)
        step = torch.linalg.solve(hessian, gradient.T.unsqueeze(-1)).squeeze(-1)
        # From far away a Newton step overshoots.
        found += (step / step.norm(dim=1, keepdim=True).clamp_min(1.0)).T
    return found[0].clone(), found[1:].T.contiguous()
