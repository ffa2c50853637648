"""From η to means: ln μ = ln ℓ + η − logsumexp(η) over the observed genes, and its slopes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import SparseRows

Genes = Tensor | slice
"""The observed genes: a boolean mask, or slice(None) for all."""

# An empty cell has a size factor of 0; a mean this small has no effect and stays finite.
TINY = 1e-30


def log_mean(eta: Tensor, size_factor: Tensor) -> Tensor:
    """log μ = log ℓ + log softmax(η), the mean that all count likelihoods share."""
    return F.log_softmax(eta, -1) + size_factor.clamp_min(TINY).log().unsqueeze(-1)


def widen(values: Tensor, like: Tensor, genes: Genes) -> Tensor:
    """``values`` of the observed genes, among zeros at the others."""
    if isinstance(genes, slice):
        return values
    out = torch.zeros_like(like)
    out[..., genes] = values
    return out


def softmax(eta: Tensor) -> tuple[Tensor, Tensor]:
    """π = softmax(η) and logsumexp(η), (..., cells), from one dense exponential."""
    pi = F.softmax(eta, -1)
    return pi, eta.amax(-1) - pi.amax(-1).log()


def at(values: Tensor, flat: Tensor) -> Tensor:
    """``values``, (..., cells, genes), at positions in the flattened block: (..., nonzeros)."""
    return values.flatten(-2).index_select(-1, flat)


def keep_counts(kept: Tensor, x: SparseRows) -> Tensor:
    """``kept``, (..., cells, genes), the chance that a value is no dropout: 1 at every count."""
    flat = x.flat.expand(*kept.shape[:-2], -1)
    present = (x.value > 0).to(kept).expand_as(flat)
    kept.flatten(-2).scatter_reduce_(-1, flat, present, "amax")
    return kept


def add_rows(out: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """``out``, (..., cells), and the sums of ``values``, (..., nonzeros), of each cell."""
    return out.scatter_add(-1, row.expand_as(values), values)


def add_at(values: Tensor, flat: Tensor, more: Tensor) -> None:
    """Add ``more``, (..., nonzeros), to ``values`` at positions in the flattened block."""
    values.flatten(-2).scatter_add_(-1, flat.expand_as(more), more)


def through_softmax(
    slope: Tensor, pi: Tensor, flat: Tensor, slope_at: Tensor
) -> tuple[Tensor, Tensor]:
    """Slopes in η, (..., cells, genes), and in ln ℓ, (..., cells), of those in ln μ.

    They are given dense and at the nonzeros; ``slope`` is overwritten.
    """
    add_at(slope, flat, slope_at)
    total = slope.sum(-1, keepdim=True)
    return slope.addcmul_(pi, total, value=-1), total.squeeze(-1)
