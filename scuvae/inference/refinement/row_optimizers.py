"""Optimisers for the rows of a table: only the rows of a batch move, each with its own moments.

A dense optimiser would move every row at every step, by the momentum of gradients that the other
batches' cells never had.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class RowOptimizer(ABC):
    """One step on some rows of a table; with every row in the batch it is the torch optimiser."""

    moments: ClassVar[tuple[str, ...]]

    def __init__(self, table: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.state = {name: torch.zeros_like(table) for name in self.moments}
        self.state["steps"] = table.new_zeros(len(table), 1)

    def step(
        self, table: Tensor, rows: Tensor, gradient: Tensor, rate: float | Tensor = 1.0
    ) -> None:
        """Move ``table[rows]`` against ``gradient``, by ``rate`` of the step; rows are distinct."""
        own = {name: values[rows] for name, values in self.state.items()}
        own["steps"] = own["steps"] + 1
        table[rows] += rate * self.learning_rate * self._direction(gradient, own)
        for name, values in own.items():
            self.state[name][rows] = values

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts of all rows, by reference."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, values in self.state.items():
            values.copy_(state[name])

    @abstractmethod
    def _direction(self, gradient: Tensor, own: dict[str, Tensor]) -> Tensor:
        """The step per learning rate; renews the moments in ``own``."""


class RowAdam(RowOptimizer):
    """Adam (Kingma & Ba, ICLR 2015) with PyTorch's defaults and a step count for every row."""

    moments = ("first", "second")

    def _direction(self, gradient: Tensor, own: dict[str, Tensor]) -> Tensor:
        own["first"] = torch.lerp(own["first"], gradient, 0.1)
        own["second"] = 0.999 * own["second"] + 0.001 * gradient.square()
        first = own["first"] / (1 - 0.9 ** own["steps"])
        second = own["second"] / (1 - 0.999 ** own["steps"])
        return -first / (second.sqrt() + 1e-8)


class RowRMSprop(RowOptimizer):
    """RMSprop with PyTorch's defaults."""

    moments = ("second",)

    def _direction(self, gradient: Tensor, own: dict[str, Tensor]) -> Tensor:
        own["second"] = 0.99 * own["second"] + 0.01 * gradient.square()
        return -gradient / (own["second"].sqrt() + 1e-8)


class RowSGD(RowOptimizer):
    """Plain gradient descent."""

    moments = ()

    def _direction(self, gradient: Tensor, own: dict[str, Tensor]) -> Tensor:
        return -gradient


ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "adam": RowAdam,
    "rmsprop": RowRMSprop,
    "sgd": RowSGD,
}
