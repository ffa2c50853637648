"""The map: coordinates of posterior means in which Euclidean distance is the decoder's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.model import VAE

# Cells that the components are found from, and numbers of theirs held at once.
_MOST_CELLS, _MOST_NUMBERS = 4096, 2**25
CHUNK = 256
_TURNS, _SPARE = 8, 10


@dataclass(frozen=True)
class Basis:
    """Where a map's coordinates start and point to.

    ``centre`` is (genes,), ``components`` (genes, n_components) with orthonormal columns, ``total``
    the common total of all cells; coordinates are averaged over the covariates' first ``n_levels``
    levels each: those that the fit had when the map was made.
    """

    centre: Tensor
    components: Tensor
    total: float
    n_levels: tuple[int, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any], device: torch.device) -> "Basis":
        """From what a fit keeps of its map."""
        centre, components = (
            torch.as_tensor(np.array(entry[name]), device=device)
            for name in ("centre", "components")
        )
        if "n_levels" in entry:
            n_levels = tuple(map(int, entry["n_levels"]))
        else:  # fits of earlier versions knew batches alone
            n_levels = (int(entry["n_batches"]),) if entry["n_batches"] else ()
        return cls(centre, components, float(entry["total"]), n_levels)


@torch.no_grad()
def stabilised(
    model: VAE, z: Tensor, total: float, n_levels: tuple[int, ...] | None = None
) -> Tensor:
    """Every gene's variance-stabilising coordinate at one total, (cells, genes).

    With covariates, the mean over their :meth:`~scuvae.model.covariates.Design.settings`.
    """
    size = z.new_full((len(z),), total)
    if not model.design.n_columns:
        return model.likelihood.stabilised(model.decoder(z), size)
    rows, weights = model.design.settings(n_levels)
    out = z.new_zeros(len(z), model.n_vars)
    for row, weight in zip(rows.to(z), weights.tolist(), strict=True):
        told = row.expand(len(z), -1)
        likelihood = model.likelihood_of(told)
        out += weight * likelihood.stabilised(model.decoder(z, told), size)
    return out / weights.sum().item()


@torch.no_grad()
def pulled_back(model: VAE, mean: Tensor, total: float) -> Tensor:
    """The map's distances as a metric of z, (latent, latent), of cells about ``mean`` on the whole.

    Coordinates of some cells are regressed on z: of J in JᵀJ this is what all cells share.
    """
    mean = _some(model, mean)
    values = torch.cat([stabilised(model, z, total) for z in mean.split(CHUNK)])
    z = (mean - mean.mean(0)).cpu().double()
    slope = torch.linalg.pinv(z) @ (values - values.mean(0)).cpu().double()
    return slope @ slope.T


def find_basis(model: VAE, mean: Tensor, total: float, n_components: int) -> Basis:
    """The principal components of cells at posterior means ``mean``, (cells, latent).

    From all cells, or evenly spaced ones where there are many, by subspace iteration; each
    component's largest entry is positive, so that the same cells give the same map.
    """
    mean = _some(model, mean)
    values = torch.cat([stabilised(model, z, total) for z in mean.split(CHUNK)])
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
    return Basis(centre, components * signs, total, model.design.n_levels)


def place(model: VAE, mean: Tensor, basis: Basis) -> Tensor:
    """Coordinates of cells at ``mean`` in a map, (cells, n_components), some cells at a time."""
    out = mean.new_empty(len(mean), basis.components.shape[1])
    for z, found in zip(mean.split(CHUNK), out.split(CHUNK), strict=True):
        values = stabilised(model, z, basis.total, basis.n_levels) - basis.centre
        torch.mm(values, basis.components, out=found)
    return out


def _some(model: VAE, mean: Tensor) -> Tensor:
    """Cells that components are found from."""
    most = max(1, min(_MOST_CELLS, _MOST_NUMBERS // model.n_vars))
    return mean[evenly_spaced(mean, most)]


def evenly_spaced(mean: Tensor, most: int) -> Tensor:
    """Rows of all cells, or of so many evenly spaced ones."""
    n = len(mean)
    if n <= most:
        return torch.arange(n, device=mean.device)
    return torch.linspace(0, n - 1, most, dtype=torch.float64).long().to(mean.device)
