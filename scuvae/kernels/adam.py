"""A step of Adam on one parameter in one compiled pass."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from scuvae.kernels.vector_math import f32, sums

_LEAST = f32(1e-30)


@sums
def _step(
    parameter: Any,
    gradient: Any,
    first: Any,
    second: Any,
    kept_first: Any,
    kept_second: Any,
    rate: Any,
    shrink: Any,
    eps: Any,
) -> None:
    one = f32(1.0)
    for i in range(len(parameter)):
        g = gradient[i]
        m = kept_first * first[i] + (one - kept_first) * g
        v = kept_second * second[i] + (one - kept_second) * g * g
        # Moments of what gets no gradient fall below the normal numbers, where processors can take
        # many times as long; so small they move nothing.
        m = m if abs(m) > _LEAST else f32(0.0)
        v = v if v > _LEAST else f32(0.0)
        first[i], second[i] = m, v
        parameter[i] -= rate * m / (np.sqrt(v) * shrink + eps)


def flat(contiguous: Tensor) -> np.ndarray:
    """The numbers of a tensor as an array of one dimension, over the same memory."""
    array: np.ndarray = contiguous.detach().view(-1).numpy()
    return array


def step(
    gradient: Tensor,
    parameter: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    number: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Step ``number``, from 1, of a parameter and its moments, flat, in place."""
    unbiased = rate / (1 - betas[0] ** number)
    shrink = 1 / math.sqrt(1 - betas[1] ** number)
    slopes = flat(gradient.contiguous())
    constants = (f32(number) for number in (*betas, unbiased, shrink, eps))
    _step(parameter, slopes, first, second, *constants)
