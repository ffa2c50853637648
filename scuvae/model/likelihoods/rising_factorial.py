"""ln Γ(x+θ)/(Γ(θ) θˣ x!) of the counts that are there: what the NB has beyond ln μ and log1p(μ/θ).

c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ tends to 0 as θ → ∞ (Poisson), and is computed without
the cancellation that the difference of two lgamma suffers in float32.
"""

import torch
from torch import Tensor

from scuvae.kernels.dispatch import compiled

# Stirling's series starts this far above θ, where three of its terms reach each precision.
_SHIFT = {torch.float32: 4, torch.float64: 16}


def log_rising_factorial(x: Tensor, col: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    """c(x, θ) − lgamma(x+1) for counts x > 0 of genes ``col``, and θ ∂c/∂θ: (nonzeros,) both.

    ``log_theta`` is (genes,). Where kernels are compiled, c = Σ_{j<x} log1p(j/θ) of small counts is
    looked up in a table.

    lgamma is shifted to θ' = θ + k by its recurrence, then taken from Stirling's series S:
    c = −Σ_{i<k} log1p(x/(θ+i)) + (θ'+x−½) log1p(x/θ') − x + S(θ'+x) − S(θ') + x log1p(k/θ).
    """
    if compiled(x):
        from scuvae.kernels.rising_factorial import (
            log_rising_factorial as compiled_log_rising_factorial,
        )

        return compiled_log_rising_factorial(x, col, log_theta)
    # What is done alike to several numbers of a count is done in one call: on a GPU a call of so
    # few numbers takes as long as one of all.
    theta = log_theta.index_select(0, col).exp()
    shift = _SHIFT.get(x.dtype, 4)
    steps = torch.arange(shift + 1, dtype=x.dtype, device=x.device).unsqueeze(1)
    up = theta + steps  # θ + i, and θ' at the end
    ratio = x / up
    log1p_ratio = ratio.log1p()
    top = up[-1] + x
    ends = torch.stack([top, up[-1]])
    series, series_slope = _stirling(ends)
    size = (top - 0.5) * log1p_ratio[-1]
    c = (
        size
        - x
        + (series[0] - series[1])
        + x * torch.log1p(shift / theta)
        - log1p_ratio[:-1].sum(0)
        - torch.lgamma(x + 1)
    )
    # The derivatives of log1p(x/(θ+i)) are −x/((θ+i)(θ+i+x)).
    falls = ratio / (up + x)
    slope = (
        log1p_ratio[-1]
        - (top - 0.5) * falls[-1]
        + (series_slope[0] - series_slope[1])
        + falls[:-1].sum(0)
    )
    return c, theta * slope - x * (shift / up[-1])


def _stirling(y: Tensor) -> tuple[Tensor, Tensor]:
    """S(y) = 1/(12y) − 1/(360y³) + 1/(1260y⁵) and its derivative."""
    r = y.reciprocal()
    r2 = r * r
    value = r * (1 / 12 - r2 * (1 / 360 - r2 / 1260))
    slope = -r2 * (1 / 12 - r2 * (3 / 360 - r2 * (5 / 1260)))
    return value, slope
