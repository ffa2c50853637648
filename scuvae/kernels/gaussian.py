"""Compiled passes over the small matrices of a batch's posteriors: a dozen calls in one.

For full-covariance q in float32 on a CPU; elsewhere their callers take torch's operators. Every
cell is on its own.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.vector_math import exact, exp, f32, log1p


@exact
def _unpack(raw: Any, least: Any, out: Any) -> None:
    n_latent = out.shape[1]
    for i in range(len(raw)):
        k = 0
        for a in range(n_latent):
            for b in range(a):
                out[i, a, b] = raw[i, k]
                out[i, b, a] = f32(0.0)
                k += 1
            small = exp(-abs(raw[i, k]))
            positive = max(raw[i, k], f32(0.0)) + log1p(small, f32(1.0) / (f32(1.0) + small))
            # What is no number stays none.
            out[i, a, a] = max(positive, least) + f32(0.0) * raw[i, k]
            k += 1


@exact
def _through_covariance(tril: Any, vector: Any, inner: Any, out: Any) -> None:
    """C Cᵀ v of one cell; ``inner`` is room."""
    inner[:] = f32(0.0)
    for b in range(len(vector)):
        for a in range(b + 1):
            inner[a] += tril[b, a] * vector[b]
    for a in range(len(vector)):
        out[a] = f32(0.0)
        for b in range(a + 1):
            out[a] += tril[a, b] * inner[b]


@exact
def _draw(mean: Any, tril: Any, points: Any, out: Any) -> None:
    n_cells, n_latent = mean.shape
    for i in range(n_cells):
        for r in range(i, len(points), n_cells):
            for a in range(n_latent):
                z = mean[i, a]
                for b in range(a + 1):
                    z += tril[i, a, b] * points[r, b]
                out[r, a] = z


@exact
def _kl_to_standard_normal(mean: Any, tril: Any, kl: Any) -> None:
    n_cells, n_latent = mean.shape
    for i in range(n_cells):
        total, log_det = f32(0.0), 0.0
        for a in range(n_latent):
            total += mean[i, a] * mean[i, a] - f32(1.0)
            for b in range(a + 1):
                total += tril[i, a, b] * tril[i, a, b]
            log_det += math.log(tril[i, a, a])
        kl[i] = f32(0.5) * total - f32(log_det)


@exact
def _precondition(tril: Any, gradient: Any, out: Any) -> None:
    inner = np.empty(gradient.shape[1], f32)
    for i in range(len(gradient)):
        _through_covariance(tril[i], gradient[i], inner, out[i])


@exact
def _move(
    means: Any,
    rows: Any,
    tril: Any,
    slope: Any,
    rate: Any,
    longest: Any,
    by: Any,
) -> None:
    n_latent = slope.shape[1]
    ascent, inner, step = np.empty(n_latent, f32), np.empty(n_latent, f32), np.empty(n_latent, f32)
    for i in range(len(slope)):
        for a in range(n_latent):
            ascent[a] = rate * slope[i, a]
        _through_covariance(tril[i], ascent, inner, step)
        squares = f32(0.0)
        for a in range(n_latent):
            squares += step[a] * step[a]
        length = math.sqrt(squares)
        part = by * f32(longest / length) if length > longest else by
        for a in range(n_latent):
            means[rows[i], a] += part * step[a]


def unpack(raw: Tensor, n_latent: int, least: float) -> Tensor:
    """The factors C, (cells, latent, latent), that ``raw`` stands for."""
    out = raw.new_empty(len(raw), n_latent, n_latent)
    _unpack(raw.numpy(), f32(least), out.numpy())
    return out


def draw(mean: Tensor, tril: Tensor, points: Tensor) -> Tensor:
    """m + C ε of each cell for ε, (..., cells, latent)."""
    out = torch.empty_like(points)
    rows = (part.view(-1, mean.shape[1]).numpy() for part in (points, out))
    _draw(mean.numpy(), tril.numpy(), *rows)
    return out


def kl_to_standard_normal(mean: Tensor, tril: Tensor) -> Tensor:
    """KL(N(m, C Cᵀ) ‖ N(0, I)) in nats, (cells,)."""
    kl = mean.new_empty(len(mean))
    _kl_to_standard_normal(mean.numpy(), tril.numpy(), kl.numpy())
    return kl


def precondition(tril: Tensor, gradient: Tensor) -> Tensor:
    """C Cᵀ g of each cell, (cells, latent)."""
    out = torch.empty_like(gradient)
    _precondition(tril.numpy(), gradient.numpy(), out.numpy())
    return out


def move(
    means: Tensor,
    rows: Tensor,
    tril: Tensor,
    slope: Tensor,
    rate: float,
    longest: float,
    by: float,
) -> None:
    """As :func:`scuvae.distributions.precision.move_rows`."""
    arrays = (t.numpy() for t in (means, rows, tril, slope))
    _move(*arrays, f32(rate), f32(longest), f32(by))
