"""What training steps lost, looked at every so many steps."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Steps whose losses lie together: small blocks that outlive a step, one by one between its large
# ones, keep these from being used again, and a long epoch would grow by gigabytes.
_ROWS = 1024


@dataclass(frozen=True)
class Bad:
    """The first step whose loss is no number: where it was, counted from 0."""

    loss: float
    epoch: int
    batch: int
    cells: list[int]
    first: bool
    """Whether no step before it was looked at with it."""


@dataclass
class Losses:
    """Losses of steps, on their device until they are read: a look makes a GPU wait for the host.

    Parameters
    ----------
    n_obs, kl_weight
        As in :func:`scuvae.inference.training.loop.train`.
    first
        The row number of this process's first cell among those of all.
    """

    n_obs: int
    kl_weight: float
    first: int = 0
    n_epochs: int = 0
    """Epochs read so far."""
    _blocks: list[Tensor] = field(default_factory=list)
    _cells: list[Tensor] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    @property
    def n_steps(self) -> int:
        """Steps not read yet."""
        return len(self._cells)

    def add(self, losses: Tensor, cells: Tensor) -> None:
        """What :class:`scuvae.inference.training.step.Step` returns, and its cells."""
        row = self.n_steps % _ROWS
        if not row:
            self._blocks.append(losses.new_zeros(3, _ROWS))
        self._blocks[-1][:, row] = losses
        self._cells.append(cells)

    def end_epoch(self) -> None:
        self._ends.append(self.n_steps)

    def last(self) -> tuple[int, int, list[int]]:
        """Epoch, batch and cells of the last step."""
        begin = self._ends[-2] if len(self._ends) > 1 else 0
        epoch = self.n_epochs + len(self._ends) - 1
        return epoch, self.n_steps - begin - 1, (self._cells[-1] + self.first).tolist()

    def read(self) -> tuple[list[dict[str, float]], Bad | None]:
        """A row for each epoch that was not read yet, in nats a cell; or no rows, and the first
        step whose loss is no number."""
        fits, divergences, extras = torch.cat(self._blocks, 1)[:, : self.n_steps].cpu()
        values = self.kl_weight * divergences - fits + extras
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            return [], self._bad(int(wrong[0]), values)
        rows = []
        for begin, end in zip([0, *self._ends], self._ends, strict=False):
            sums = (part[begin:end].double().sum() for part in (fits, divergences))
            fit, kl = (float(total) / self.n_obs for total in sums)
            rows.append(
                {
                    "loss": self.kl_weight * kl - fit,
                    "elbo": fit - kl,
                    "reconstruction": fit,
                    "kl": kl,
                    "validation_elbo": math.nan,
                }
            )
        self.n_epochs += len(rows)
        self._blocks, self._cells, self._ends = [], [], []
        return rows, None

    def state_dict(self) -> dict[str, Any]:
        """What was not read yet, on the host."""
        state: dict[str, Any] = {"n_epochs": self.n_epochs, "ends": list(self._ends)}
        if self.n_steps:
            state["losses"] = torch.cat(self._blocks, 1)[:, : self.n_steps].cpu()
            state["cells"] = torch.cat(self._cells).cpu()
            state["sizes"] = [len(cells) for cells in self._cells]
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.n_epochs, self._ends = int(state["n_epochs"]), list(state["ends"])
        self._blocks, self._cells = [], []
        if "losses" in state:
            losses = state["losses"].to(device)
            self._blocks = list(F.pad(losses, (0, -losses.shape[1] % _ROWS)).split(_ROWS, 1))
            self._cells = list(state["cells"].split(state["sizes"]))

    def _bad(self, step: int, values: Tensor) -> Bad:
        epoch = sum(end <= step for end in self._ends)
        batch = step - (self._ends[epoch - 1] if epoch else 0)
        cells = (self._cells[step] + self.first).tolist()
        return Bad(values[step].item(), self.n_epochs + epoch, batch, cells, step == 0)
