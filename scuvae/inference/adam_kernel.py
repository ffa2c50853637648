"""A step of Adam on one parameter in one compiled pass."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from scuvae.model.vectors import f32, sums


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
        first[i], second[i] = m, v
        parameter[i] -= rate * m / (np.sqrt(v) * shrink + eps)


def step(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    number: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Step ``number``, from 1, of a parameter and its moments, all contiguous, in place."""
    arrays = (
        t.detach().view(-1).numpy() for t in (parameter, gradient.contiguous(), first, second)
    )
    unbiased = rate / (1 - betas[0] ** number)
    shrink = 1 / math.sqrt(1 - betas[1] ** number)
    _step(*arrays, f32(betas[0]), f32(betas[1]), f32(unbiased), f32(shrink), f32(eps))
