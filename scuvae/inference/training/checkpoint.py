"""How far a fit has come, in one dict."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from scuvae._random import random_state, set_random_state
from scuvae.batches import Batch
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.history import Losses
from scuvae.inference.training.step import Step
from scuvae.model import VAE


class HeldOut(Protocol):
    """Cells to judge the decoder by."""

    def elbo(self, model: VAE) -> float:
        """Mean ELBO in nats a cell, q optimised with the decoder frozen: not a number where
        training should end with an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a judgement leaves for the next, by reference."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """Where training is, and with it everything that its next steps depend on.

    Rates and weights are not in it: they follow from the epoch and from the settings.

    Parameters
    ----------
    step
        With the model, the posterior and the optimiser.
    cells
        Batches; what orders them anew in each epoch is their ``generator``, if they have one.
    losses, held_out, early_stopping
        Those of the loop.
    """

    step: Step
    cells: Iterable[Batch]
    losses: Losses
    held_out: HeldOut | None
    early_stopping: EarlyStopping | None
    epoch: int = 0
    """Epochs that are over."""
    batch: int = 0
    """Batches of the present epoch that are done."""
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    _order: Tensor | None = None

    def begin(self) -> int:
        """Begin an epoch, or the rest of one: how many of its batches are done."""
        self._order = self._order_now()
        return self.batch

    def end_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self._order = self._order_now()

    def state_dict(self) -> dict[str, Any]:
        """Everything, by reference as torch has it, in nested dicts of tensors and plain values:
        what safetensors and JSON hold."""
        columns = self.history[0] if self.history else {}
        history = {
            name: torch.tensor([row[name] for row in self.history], dtype=torch.float64)
            for name in columns
        }
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "stopped": self.stopped,
            "history": history,
            "losses": self.losses.state_dict(),
            "random": random_state(self._device),
            **self.step.state_dict(),
        }
        if self._order is not None:
            state["order"] = self._order
        for name, part in self._judges():
            state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, of the same cells and settings."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.stopped = bool(state["stopped"])
        columns = {name: values.tolist() for name, values in state["history"].items()}
        rows = zip(*columns.values(), strict=True)
        self.history = [dict(zip(columns, row, strict=True)) for row in rows]
        self.losses.load_state_dict(state["losses"], self._device)
        self.step.load_state_dict(state)
        for name, part in self._judges():
            part.load_state_dict(state[name])
        generator = self._generator()
        if generator is not None and "order" in state:
            generator.set_state(state["order"])
        self._order = self._order_now()
        set_random_state(state["random"], self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.step.model.parameters()).device

    def _judges(self) -> list[tuple[str, HeldOut | EarlyStopping]]:
        named = (("held_out", self.held_out), ("early_stopping", self.early_stopping))
        return [(name, part) for name, part in named if part is not None]

    def _generator(self) -> torch.Generator | None:
        """What shuffles the cells."""
        return getattr(self.cells, "generator", None)

    def _order_now(self) -> Tensor | None:
        """Its state, from which the order of the next epoch, or of the present one, comes."""
        generator = self._generator()
        return None if generator is None else generator.get_state()
