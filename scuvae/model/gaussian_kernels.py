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
def _precondition(tril: Any, gradient: Any, out: Any) -> None:
    n_latent = gradient.shape[1]
    inner = np.empty(n_latent, f32)
    for i in range(len(gradient)):
        for a in range(n_latent):
            inner[a] = f32(0.0)
            for b in range(a, n_latent):
                inner[a] += tril[i, b, a] * gradient[i, b]
        for a in range(n_latent):
            out[i, a] = f32(0.0)
            for b in range(a + 1):
                out[i, a] += tril[i, a, b] * inner[b]


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


def precondition(tril: Tensor, gradient: Tensor) -> Tensor:
    """C Cᵀ g of each cell, (cells, latent)."""
    out = torch.empty_like(gradient)
    _precondition(tril.numpy(), gradient.numpy(), out.numpy())
    return out
