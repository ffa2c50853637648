"""Compiled passes over the small matrices of a batch's posteriors: a dozen calls in one.

For full-covariance q in float32 on a CPU; elsewhere their callers take torch's operators. Every
cell is on its own.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.model.vectors import exact, exp, f32, log1p


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
def _kl(mean: Any, tril: Any, out: Any) -> None:
    n_latent = mean.shape[1]
    for i in range(len(mean)):
        total, log_det = f32(0.0), 0.0
        for a in range(n_latent):
            total += mean[i, a] * mean[i, a] - f32(1.0)
            for b in range(a + 1):
                total += tril[i, a, b] * tril[i, a, b]
            log_det += math.log(tril[i, a, a])
        out[i] = f32(0.5) * total - f32(log_det)


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
    for r in range(len(points)):
        i = r % n_cells
        for a in range(n_latent):
            z = mean[i, a]
            for b in range(a + 1):
                z += tril[i, a, b] * points[r, b]
            out[r, a] = z


@exact
def _precondition(tril: Any, gradient: Any, out: Any) -> None:
    inner = np.empty(gradient.shape[1], f32)
    for i in range(len(gradient)):
        _through_covariance(tril[i], gradient[i], inner, out[i])


@exact
def _mean_step(
    mean: Any, tril: Any, slope: Any, factor: Any, rate: Any, longest: Any, out: Any
) -> None:
    n_latent = mean.shape[1]
    ascent, inner = np.empty(n_latent, f32), np.empty(n_latent, f32)
    for i in range(len(mean)):
        for a in range(n_latent):
            ascent[a] = rate * (factor * slope[i, a] - mean[i, a])
        _through_covariance(tril[i], ascent, inner, out[i])
        squares = f32(0.0)
        for a in range(n_latent):
            squares += out[i, a] * out[i, a]
        length = math.sqrt(squares)
        if length > longest:
            for a in range(n_latent):
                out[i, a] *= longest / length


def unpack(raw: Tensor, n_latent: int, least: float) -> Tensor:
    """The factors C, (cells, latent, latent), that ``raw`` stands for."""
    out = raw.new_empty(len(raw), n_latent, n_latent)
    _unpack(raw.numpy(), f32(least), out.numpy())
    return out


def kl(mean: Tensor, tril: Tensor) -> Tensor:
    """KL(N(m, C Cᵀ) ‖ N(0, I)) in nats, (cells,)."""
    out = mean.new_empty(len(mean))
    _kl(mean.numpy(), tril.numpy(), out.numpy())
    return out


def draw(mean: Tensor, tril: Tensor, points: Tensor) -> Tensor:
    """m + C ε of each cell for ε, (..., cells, latent)."""
    out = torch.empty_like(points)
    rows = (part.view(-1, mean.shape[1]).numpy() for part in (points, out))
    _draw(mean.numpy(), tril.numpy(), *rows)
    return out


def precondition(tril: Tensor, gradient: Tensor) -> Tensor:
    """C Cᵀ g of each cell, (cells, latent)."""
    out = torch.empty_like(gradient)
    _precondition(tril.numpy(), gradient.numpy(), out.numpy())
    return out


def mean_step(
    mean: Tensor, tril: Tensor, slope: Tensor, factor: float, rate: float, longest: float
) -> Tensor:
    """ρ C Cᵀ (``factor`` · ``slope`` − m) of each cell, no longer than so, (cells, latent)."""
    out = torch.empty_like(mean)
    arrays = (part.numpy() for part in (mean, tril, slope))
    _mean_step(*arrays, f32(factor), f32(rate), f32(longest), out.numpy())
    return out
