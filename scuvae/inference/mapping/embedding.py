"""The map: coordinates of posterior means in which Euclidean distance is the decoder's own."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.model import VAE

# Cells that the components are found from, and numbers of theirs held at once.
_MOST_CELLS, _MOST_NUMBERS = 4096, 2**25
_CHUNK = 256
_TURNS, _SPARE = 8, 10


@dataclass(frozen=True)
class Basis:
    """Where a map's coordinates start and point to.

    ``centre`` is (genes,), ``components`` (genes, n_components) with orthonormal columns, ``total``
    the common total of all cells; coordinates are averaged over the first ``n_batches`` batches.
    """

    centre: Tensor
    components: Tensor
    total: float
    n_batches: int


@torch.no_grad()
def stabilised(
    model: VAE, z: Tensor, total: float, n_batches: int = 0, n_categories: int = 0
) -> Tensor:
    """Every gene's variance-stabilising coordinate at one total, (cells, genes).

    With batches, the mean over the first ``n_batches`` of ``n_categories``.
    """
    size = z.new_full((len(z),), total)
    if not n_batches:
        return model.likelihood.stabilised(model.decoder(z), size)
    out = z.new_zeros(len(z), model.n_vars)
    for code in range(n_batches):
        one_hot = F.one_hot(torch.tensor(code, device=z.device), n_categories).to(z)
        covariates = one_hot.expand(len(z), -1)
        out += model.likelihood.stabilised(model.decoder(z, covariates), size)
    return out / n_batches


def find_basis(model: VAE, mean: Tensor, total: float, n_batches: int, n_components: int) -> Basis:
    """The principal components of cells at posterior means ``mean``, (cells, latent).

    From all cells, or evenly spaced ones where there are many, by subspace iteration; each
    component's largest entry is positive, so that the same cells give the same map.
    """
    most = max(1, min(_MOST_CELLS, _MOST_NUMBERS // model.n_vars))
    if len(mean) > most:
        mean = mean[torch.linspace(0, len(mean) - 1, most, dtype=torch.float64).long()]
    parts = [stabilised(model, z, total, n_batches, n_batches) for z in mean.split(_CHUNK)]
    values = torch.cat(parts)
    centre = values.mean(0)
    values -= centre
    width = min(n_components + _SPARE, *values.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(model.n_vars, width, generator=generator).to(values)
    basis = torch.linalg.qr(start)[0]
    for _ in range(_TURNS):
        basis = torch.linalg.qr(values.T @ (values @ basis))[0]
    _, _, turn = torch.linalg.svd(values @ basis, full_matrices=False)
    components = basis @ turn.mT[:, :n_components]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return Basis(centre, components * signs, total, n_batches)


def place(model: VAE, mean: Tensor, basis: Basis, n_categories: int) -> Tensor:
    """Coordinates of cells at ``mean`` in a map, (cells, n_components), some cells at a time."""
    out = mean.new_empty(len(mean), basis.components.shape[1])
    for z, found in zip(mean.split(_CHUNK), out.split(_CHUNK), strict=True):
        values = stabilised(model, z, basis.total, basis.n_batches, n_categories) - basis.centre
        torch.mm(values, basis.components, out=found)
    return out
