"""Optimisers: Adam, compiled where parameters are float32 on a CPU, and torch's own; schedules."""

import math
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's: ``state`` by number of the parameter, and ``param_groups``."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


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

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`torch.optim.Adam`: each may go on from the other's ``state``."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = {}
        for number, parameter in enumerate(parameters):
            if state := self.state.get(parameter):
                states[number] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": torch.from_numpy(state["first"]).view(parameter.shape),
                    "exp_avg_sq": torch.from_numpy(state["second"]).view(parameter.shape),
                }
        groups = [{**group, "params": list(range(len(parameters)))} for group in self.param_groups]
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state as above; rates stay as they are."""
        from scuvae.kernels.adam import flat

        self.state.clear()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            parameter = parameters[number]
            first, second = (
                flat(state[name].to(parameter).clone(memory_format=torch.contiguous_format))
                for name in ("exp_avg", "exp_avg_sq")
            )
            self.state[parameter].update(
                step=int(state["step"]), own=flat(parameter), first=first, second=second
            )


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser knows of each parameter: its rates are the schedule's."""
    states = optimizer.state_dict()["state"].items()
    # What is None, as SGD's momentum may be, is as good as not there.
    return {
        str(number): {name: value for name, value in state.items() if value is not None}
        for number, state in states
    }


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Let an optimiser of the same parameters go on from what :func:`state_of` gave."""
    whole = optimizer.state_dict()
    whole["state"] = {int(number): dict(own) for number, own in state.items()}
    optimizer.load_state_dict(whole)


def cosine(progress: float) -> float:
    """A factor on learning rates that falls from one to zero along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "rmsprop": rmsprop,
    "sgd": torch.optim.SGD,
}
