"""ReLU and dropout of a hidden layer in one compiled pass."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.model.vectors import exact, f32


@exact
def _gate(entered: Any, draws: Any, least: Any, gain: Any, out: Any) -> None:
    for i in range(len(entered)):
        open_ = (entered[i] > f32(0.0)) & (draws[i] >= least)
        out[i] = gain if open_ else f32(0.0)


def gate(entered: Tensor, draws: Tensor, least: int, gain: float) -> Tensor:
    """``gain`` where what entered is positive and its draw, int16, is at ``least`` so, else 0."""
    out = torch.empty_like(entered)
    arrays = entered.view(-1).numpy(), draws.view(-1).numpy()
    _gate(*arrays, np.int16(least), f32(gain), out.view(-1).numpy())
    return out
