"""ln Γ(x+θ)/(Γ(θ) θˣ x!) of the counts that are there: what the NB has beyond ln μ and log1p(μ/θ).

c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ tends to 0 as θ → ∞ (Poisson), and is computed without
the cancellation that the difference of two lgamma suffers in float32.
"""

import torch
from torch import Tensor

# Counts are small whole numbers: those below this one are looked up in a table of each gene's.
_TABLE = 16
# Stirling's series starts this far above θ, where three of its terms reach float32's precision.
_SHIFT = 4


def rising(x: Tensor, col: Tensor, theta: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """c(x, θ) − lgamma(x+1) for counts x > 0 of genes ``col``, and θ ∂c/∂θ: (nonzeros,) both.

    ``theta`` and its inverse ``inverse`` are (genes,). On a CPU c = Σ_{j<x} log1p(j/θ) is looked
    up; elsewhere special functions cost less than asking which counts are small.
    """
    if x.device.type != "cpu":
        return _stirling_rising(x, theta[col])
    steps = torch.arange(_TABLE, dtype=theta.dtype)
    ratio = steps.unsqueeze(1) * inverse
    # Row k sums over j < k.
    below = torch.ones(_TABLE, _TABLE, dtype=theta.dtype).tril_(-1)
    table = torch.addmm(-torch.lgamma(steps + 1).unsqueeze(1), below, ratio.log1p())
    slopes = below @ ratio.div_(-1 - ratio)
    whole = x.long()
    position = whole.clamp_max(_TABLE - 1).mul_(len(theta)).add_(col)
    value = table.view(-1).index_select(0, position)
    slope = slopes.view(-1).index_select(0, position)
    other = ((whole >= _TABLE) | (whole != x)).nonzero().squeeze(-1)
    if len(other):
        value[other], slope[other] = _stirling_rising(x[other], theta[col[other]])
    return value, slope


def _stirling_rising(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any x > 0 and the θ of each.

    lgamma is shifted to θ' = θ + 4 by its recurrence, then taken from Stirling's series S:
    c = −Σ_{i<4} log1p(x/(θ+i)) + (θ'+x−½) log1p(x/θ') − x + S(θ'+x) − S(θ') + x log1p(4/θ).
    """
    upper = theta + _SHIFT
    top = upper + x
    log1p_top = torch.log1p(x / upper)
    s_top, s_top_slope = _stirling(top)
    s_upper, s_upper_slope = _stirling(upper)
    c = (top - 0.5) * log1p_top - x + s_top - s_upper + x * torch.log1p(_SHIFT / theta)
    slope = log1p_top - (top - 0.5) * x / (upper * top) + s_top_slope - s_upper_slope
    slope = slope - x * _SHIFT / (theta * upper)
    for i in range(_SHIFT):
        c = c - torch.log1p(x / (theta + i))
        slope = slope + x / ((theta + i) * (theta + i + x))
    return c - torch.lgamma(x + 1), theta * slope


def _stirling(y: Tensor) -> tuple[Tensor, Tensor]:
    """S(y) = 1/(12y) − 1/(360y³) + 1/(1260y⁵) and its derivative."""
    r = y.reciprocal()
    r2 = r * r
    value = r * (1 / 12 - r2 * (1 / 360 - r2 / 1260))
    slope = -r2 * (1 / 12 - r2 * (3 / 360 - r2 * (5 / 1260)))
    return value, slope
