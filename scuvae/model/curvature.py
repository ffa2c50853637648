"""Jᵀ diag(w) J of each cell: the Fisher information of z through the decoder."""

import torch
from torch import Tensor

from scuvae._random import uniform_like
from scuvae.kernels.dispatch import compiled


def cells_at_once(numbers: int, device: torch.device) -> int:
    """Cells whose Jacobians, of so many float32 numbers each, are held at once: 1 MB of them, to
    stay in a core's cache, or half a GB on a GPU, to keep it busy."""
    return max(1, (2**18 if device.type == "cpu" else 2**27) // numbers)


def systematic_sample(size: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``n`` distinct items, drawn by torch's random state, and the chances that these had, (n,).

    Chances are proportional to ``size`` ≥ 0, (items,), but none above 1; what is added up over the
    items drawn, each divided by its chance, is on average the sum over all (Horvitz & Thompson,
    JASA 1952; systematic sampling: Madow, Annals of Mathematical Statistics 1949).
    """
    exact = size.double() + torch.finfo(torch.float32).tiny  # for the case that all are zero
    ordered = exact.sort(descending=True).values
    # Where the k largest are certain, the others share n − k.
    rest = ordered.flip(0).cumsum(0).flip(0)
    shared = (n - torch.arange(len(size), device=size.device)) / rest
    n_certain = (shared * ordered > 1).sum(0, keepdim=True)
    chance = (exact * shared.gather(0, n_certain)).clamp_max(1.0)
    at = uniform_like(size.new_empty((), dtype=torch.float32)) + torch.arange(n, device=size.device)
    drawn = torch.searchsorted(chance.cumsum(0), at).clamp_max(len(size) - 1)
    return drawn, chance[drawn].to(size)


def jacobian_gram(
    tangent: Tensor, weight: Tensor, fisher: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Jᵀ diag(w) J, (cells, latent, latent), of Jacobians whose transposes are T Wᵀ + s.

    Those of a few cells at a time are written out, whatever the number of cells.

    Parameters
    ----------
    tangent, weight
        T, (cells, latent, width), and W, (genes, width): see ``Decoder.linearize``.
    fisher
        w ≥ 0, (cells, genes).
    shift
        s, (cells, latent, 1); None for none.
    """
    n_cells, n_latent, width = tangent.shape
    if shift is None:
        shift = tangent.new_zeros(n_cells, n_latent, 1)
    chunk = cells_at_once(len(weight) * n_latent, tangent.device)
    parts = []
    for first in range(0, n_cells, chunk):
        some = slice(first, first + chunk)
        jacobian = torch.addmm(
            shift[some].reshape(-1, 1), tangent[some].reshape(-1, width), weight.T
        ).view(-1, n_latent, len(weight))
        parts.append(weighted_gram(jacobian, fisher[some]))
    return torch.cat(parts)


def weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """R diag(w) Rᵀ for rows R, (cells, rows, genes), and weights w ≥ 0, (cells, genes)."""
    if compiled(rows):
        from scuvae.kernels.gram import gram

        return gram(rows.contiguous(), weight.contiguous())
    scaled = rows * weight.sqrt().unsqueeze(-2)
    return scaled @ scaled.mT
