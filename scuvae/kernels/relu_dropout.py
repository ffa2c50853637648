"""ReLU and dropout of a hidden layer in one compiled pass."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.vector_math import exact, f32


@exact
def _gate(entered: Any, draws: Any, gate: Any, out: Any, least: Any, gain: Any) -> None:
    for i in range(len(entered)):
        open_ = (entered[i] > f32(0.0)) & (draws[i] >= least)
        gate[i] = gain if open_ else f32(0.0)
        out[i] = entered[i] * gate[i]


def gated(entered: Tensor, draws: Tensor, least: int, gain: float) -> tuple[Tensor, Tensor]:
    """What entered times its gate, and that: ``gain`` where it is positive and its draw, int16, is
    at ``least`` so, else 0."""
    gate, out = torch.empty_like(entered), torch.empty_like(entered)
    arrays = (array.view(-1).numpy() for array in (entered, draws, gate, out))
    _gate(*arrays, np.int16(least), f32(gain))
    return out, gate
