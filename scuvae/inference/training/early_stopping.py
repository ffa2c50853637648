"""When to stop: the held-out ELBO no longer rises."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class EarlyStopping:
    """Stop when the held-out ELBO has not risen by ``min_delta`` nats in ``patience`` epochs."""

    patience: int
    min_delta: float = 0.0
    best: float = -math.inf
    best_epoch: int = -1
    state: dict[str, Any] = field(default_factory=dict)

    def update(self, epoch: int, value: float, state: Callable[[], dict[str, Any]]) -> bool:
        if value > self.best + self.min_delta or self.best_epoch < 0:
            self.best, self.best_epoch, self.state = value, epoch, state()
        return epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """The best so far, by reference."""
        best = torch.tensor(self.best, dtype=torch.float64)
        return {"best": best, "best_epoch": self.best_epoch, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.best, self.best_epoch = float(state["best"]), int(state["best_epoch"])
        self.state = state["state"]
