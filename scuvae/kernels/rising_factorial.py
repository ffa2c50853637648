"""Γ(x+θ) / (Γ(θ) θˣ x!) of counts, compiled: ``rising.py`` with a table of small counts."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.vector_math import exact, f32, log1p

# Dispersions beyond e^±60 act as these: all is Poisson there, or all zero, and nothing overflows.
MOST_LOG_THETA = f32(60.0)
# Counts below this are looked up.
_TABLE = 16


@exact
def _stirling(y: float) -> tuple[float, float]:
    r = 1 / y
    square = r * r
    value = r * (1 / 12 - square * (1 / 360 - square / 1260))
    return value, -square * (1 / 12 - square * (3 / 360 - square * (5 / 1260)))


@exact
def _rising_at(x: float, theta: float) -> tuple[float, float]:
    """Of any one count, in float64: shifted up by four, then Stirling's series."""
    upper, top = theta + 4, theta + 4 + x
    log1p_top = math.log1p(x / upper)
    (s_top, slope_top), (s_upper, slope_upper) = _stirling(top), _stirling(upper)
    c = (top - 0.5) * log1p_top - x + s_top - s_upper + x * math.log1p(4 / theta)
    slope = log1p_top - (top - 0.5) * x / (upper * top) + slope_top - slope_upper
    slope -= x * 4 / (theta * upper)
    for i in range(4):
        c -= math.log1p(x / (theta + i))
        slope += x / ((theta + i) * (theta + i + x))
    return c - math.lgamma(x + 1), theta * slope


@exact
def _rising(value: Any, col: Any, log_theta: Any, out: Any, out_slope: Any) -> None:
    n_genes = len(log_theta)
    theta = bounded(log_theta)
    inverse = f32(1.0) / theta
    # Counts are small whole numbers: row j has Σ_{i<j} log1p(i/θ) − ln j!, then come its slopes.
    table, slopes = np.zeros((_TABLE, n_genes), f32), np.zeros((_TABLE, n_genes), f32)
    for j in range(1, _TABLE):
        last, log_j = f32(j - 1), f32(math.log(j))
        _next(table[j - 1], slopes[j - 1], last, log_j, inverse, table[j], slopes[j])
    for k in range(len(value)):
        g, whole = np.uint32(col[k]), np.uint32(value[k])
        if value[k] < _TABLE and whole == value[k]:
            out[k], out_slope[k] = table[whole, g], slopes[whole, g]
        else:
            c, slope = _rising_at(float(value[k]), float(theta[g]))
            out[k], out_slope[k] = f32(c), f32(slope)


@exact
def _next(
    below: Any, below_slope: Any, i: Any, log_next: Any, inverse: Any, row: Any, slope: Any
) -> None:
    for g in range(len(row)):
        ratio = i * inverse[g]
        rest = f32(1.0) / (f32(1.0) + ratio)
        row[g] = below[g] + (log1p(ratio, rest) - log_next)
        slope[g] = below_slope[g] - ratio * rest


@exact
def bounded(log_theta: Any) -> Any:
    """θ, (genes,)."""
    return np.exp(np.minimum(np.maximum(log_theta, -MOST_LOG_THETA), MOST_LOG_THETA))


def log_rising_factorial(value: Tensor, col: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`scuvae.model.likelihoods.rising_factorial.log_rising_factorial`."""
    out, slope = torch.empty_like(value), torch.empty_like(value)
    arguments = value, col, log_theta, out, slope
    _rising(*(argument.detach().numpy() for argument in arguments))
    return out, slope
