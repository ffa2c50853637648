"""How well the decoder at given points explains each cell: for many points at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import Batch, SparseRows
from scuvae.batches.sparse_rows import dense, select
from scuvae.model import VAE

# Logits of points held at once: 64 MB.
_NUMBERS = 2**24


@torch.no_grad()
def affinity(model: VAE, batch: Batch, z: Tensor) -> Tensor:
    """About log p(x | z) of each cell at each of the points z, up to a term of the cell.

    Counts are compared as multinomial draws from the decoder's profiles, zeros and ones by their
    likelihood, real values by weighted squares: products of matrices, so that hundreds of points
    cost less than a step.

    Returns
    -------
    (cells, points), in nats.
    """
    some = z.split(max(1, _NUMBERS // model.n_vars))
    if batch.covariates is None:
        return torch.cat([_affinity(model, batch, points, None) for points in some], 1)
    out = z.new_empty(len(batch), len(z))
    kinds, kind = batch.covariates.unique(dim=0, return_inverse=True)
    for number, covariates in enumerate(kinds):
        rows = (kind == number).nonzero().squeeze(-1)
        own = batch.take(rows)
        parts = [_affinity(model, own, points, covariates) for points in some]
        out[rows] = torch.cat(parts, 1)
    return out


def _affinity(model: VAE, batch: Batch, z: Tensor, covariates: Tensor | None) -> Tensor:
    eta = model.decoder(z, None if covariates is None else covariates.expand(len(z), -1))
    x, observed = batch.x, batch.observed
    link = model.likelihood.link
    if link == "identity":
        shape = len(batch), -1
        weight, _ = model.likelihood.fisher(x, eta[:1].expand(shape), batch.size_factor, observed)
        return (weight * dense(x)) @ eta.T - 0.5 * weight @ eta.square().T
    if observed is not None:
        eta = eta[:, observed]
        x = select(x, observed)
    # Laid out anew: a sparse product with a transposed matrix takes twenty times as long.
    profiles = (F.log_softmax(eta, -1) if link == "softmax" else eta).T.contiguous()
    found = (x.matrix() if isinstance(x, SparseRows) else x) @ profiles
    return found if link == "softmax" else found - F.softplus(eta).sum(-1)
