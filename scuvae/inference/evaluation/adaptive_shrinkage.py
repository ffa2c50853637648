"""Changes of many genes: how likely each is not zero, beyond a threshold, of the sign it seems.

δ̂ ~ N(δ, s²) with a prior of δ that all genes together say: a mass at zero and normals about it
(adaptive shrinkage: Stephens 2017). Where other cells predict a change m, genes are taken in strata
by how clearly they do: each has its own weights, and normals about multiples of m beside the
others. Predictions that say nothing get no weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Standard deviations of changes, natural logarithms.
_SCALES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# Where normals about a predicted change lie, as parts of it: those of a ridge are too small.
_PARTS = (0.7, 1.3)
# Genes' worth of belief in zero, of each stratum.
_PENALTY = 20.0
# Strata's bounds: predictions in their standard errors.
BOUNDS = (2.0, 3.0)
_STEPS = 300


class Changes(NamedTuple):
    """Of each gene, (genes,): P(|δ| > threshold); P(δ is 0, or of the less likely sign); P(δ is not
    beyond the threshold on its likelier side); E[δ]."""

    beyond: Tensor
    false_sign: Tensor
    error: Tensor
    mean: Tensor


def shrink(
    change: Tensor,
    scale: Tensor,
    predicted: Tensor | None = None,
    clear: Tensor | None = None,
    *,
    threshold: float = 0.0,
) -> Changes:
    """Posteriors of changes δ from estimates (genes,) with standard errors ``scale``.

    ``predicted`` are changes that other cells predict, ``clear`` the standard errors that these are
    from zero.
    """
    zero = torch.zeros_like(change)
    means = [zero] * (1 + len(_SCALES))
    widths = [zero, *(torch.full_like(change, value) for value in _SCALES)]
    stratum = torch.zeros_like(change, dtype=torch.long)
    if predicted is not None and clear is not None:
        stratum = torch.bucketize(clear, torch.tensor(BOUNDS, dtype=clear.dtype))
        for part in _PARTS:
            means.append(part * predicted)
            widths.append(0.4 * (part * predicted).abs() + 0.1)
    mean, width = torch.stack(means), torch.stack(widths)
    total = width.square() + scale.square()
    log_l = -0.5 * (change - mean).square() / total - 0.5 * total.log()
    weight = torch.zeros_like(log_l)
    for kind in stratum.unique():
        of_kind = stratum == kind
        n = len(log_l) if kind else 1 + len(_SCALES)
        weight[:n, of_kind] = _weights(log_l[:n, of_kind])

    precision = 1 / width.square().clamp_min(1e-12) + 1 / scale.square()
    centre = mean / width.square().clamp_min(1e-12) + change / scale.square()
    centre, spread = centre / precision, precision.rsqrt()
    centre[0], null = 0.0, weight[0]
    above = (weight * torch.special.ndtr((centre - threshold) / spread))[1:].sum(0)
    below = (weight * torch.special.ndtr((-threshold - centre) / spread))[1:].sum(0)
    positive = (weight * torch.special.ndtr(centre / spread))[1:].sum(0)
    negative = (1 - null - positive).clamp_min(0)
    return Changes(
        (above + below).clamp(0, 1),
        (1 - torch.maximum(positive, negative)).clamp(0, 1),
        (1 - torch.maximum(above, below)).clamp(0, 1),
        (weight * centre).sum(0),
    )


def _weights(log_l: Tensor) -> Tensor:
    """Posterior weights of components, (components, genes), by expectation-maximisation."""
    likelihood = (log_l - log_l.amax(0)).exp()
    prior = torch.full((len(log_l), 1), 1 / len(log_l), dtype=log_l.dtype)
    for _ in range(_STEPS):
        joint = prior * likelihood
        prior = (joint / joint.sum(0)).sum(1, keepdim=True)
        prior[0] += _PENALTY
        prior = prior / prior.sum()
    joint = prior * likelihood
    return joint / joint.sum(0)


def clearness(predicted: Tensor, scale: Tensor) -> Tensor:
    """|m| in standard errors: what is missing for the typical gene's to be a normal's is added."""

    def typical(more: float) -> float:
        return float((predicted.abs() / (scale.square() + more**2).sqrt()).median()) / 0.6745

    low, high = 0.0, 10.0
    for _ in range(50 * (typical(0) > 1)):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if typical(middle) > 1 else (low, middle)
    return predicted.abs() / (scale.square() + low**2).sqrt()


def expected_false(error: Tensor) -> Tensor:
    """Of the list that ends with each gene, best first, the share expected to be wrong, (genes,).

    Genes of equal probability are in it together.
    """
    order = error.argsort(stable=True)
    running = error[order].cumsum(0) / torch.arange(1, len(error) + 1)
    last = torch.searchsorted(error[order].contiguous(), error[order].contiguous(), right=True) - 1
    out = torch.empty_like(error)
    out[order] = running[last]
    return out
