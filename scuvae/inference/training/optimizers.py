"""Optimisers: Adam, compiled where parameters are float32 on a CPU, and torch's own."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.dispatch import compiled

_BETAS = 0.9, 0.999
_EPS = 1e-8


class Optimizer(Protocol):
    """What training asks of an optimiser: torch's have more."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Move every parameter that has a gradient."""


def adam(parameters: Iterable[Tensor], lr: float = 1e-3) -> Optimizer:
    """Adam with PyTorch's defaults (Kingma & Ba, ICLR 2015), by the kernel that suits it best."""
    parameters = list(parameters)
    if all(compiled(parameter) and parameter.is_contiguous() for parameter in parameters):
        return CompiledAdam(parameters, lr)
    # One pass over parameters, gradients and moments in place of ten.
    options: dict[str, Any] = {"betas": _BETAS, "eps": _EPS, "fused": True}
    return torch.optim.Adam(parameters, **options, **_replayable(parameters, lr))


def rmsprop(parameters: Iterable[Tensor], lr: float = 1e-2) -> Optimizer:
    """RMSprop with PyTorch's defaults; on a GPU its steps can be replayed."""
    parameters = list(parameters)
    return torch.optim.RMSprop(parameters, **_replayable(parameters, lr))


def _replayable(parameters: list[Tensor], lr: float) -> dict[str, Any]:
    """Rate and count of the steps, on a GPU kept there: see inference/training/cuda_graphs.py."""
    first = parameters[0]
    return {"lr": first.new_tensor(lr) if first.is_cuda else lr, "capturable": first.is_cuda}


class CompiledAdam:
    """The steps of :class:`torch.optim.Adam` to rounding, for float32 on a CPU.

    Not one of torch's optimisers: a call of theirs passes through hooks, at every step.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    def step(self) -> None:
        from scuvae.kernels.adam import flat, step

        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # Its memory as an array is kept: to make that takes as long as a small step.
                    own = flat(parameter)
                    first, second = np.zeros_like(own), np.zeros_like(own)
                    state.update(step=0, own=own, first=first, second=second)
                state["step"] += 1
                arrays = state["own"], state["first"], state["second"]
                step(gradient, *arrays, state["step"], group["lr"], _BETAS, _EPS)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "rmsprop": rmsprop,
    "sgd": torch.optim.SGD,
}
