"""Training steps on a GPU, recorded once as CUDA graphs and then replayed.

A step is some hundred small kernels, and the host takes longer to launch each than the GPU to run
it. Steps of a kind on as many cells do the same with other numbers, so that one launch of their
recording does for all of them (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
With the environment variable SCUVAE_CUDA_GRAPHS=0 they are taken one by one.
"""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.inference.training.step import Step

# Steps of a kind that are taken as they are, by which all that is made once is there.
WARM = 2


@runtime_checkable
class Gathered(Protocol):
    """Batches that can be gathered by the row numbers of their cells."""

    device: torch.device
    resident: bool
    """Whether the host has no part in that."""

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The row numbers of an epoch's batches, on the device and on the host."""

    def gather(self, index: Tensor, on_host: Tensor | None = None) -> Batch:
        """One of these batches, its arrays of a size that the number of cells alone sets."""


def steps_over(
    cells: Iterable[Batch], step: Step
) -> tuple[Callable[[int], Iterator[tuple[Any, Tensor]]], Callable[[Any], Tensor]]:
    """An epoch's batches but for so many first ones, each with the row numbers of its cells; and
    what takes a step on such a batch and returns its losses, before the next is asked for."""
    if (
        isinstance(cells, Gathered)
        and cells.device.type == "cuda"
        and cells.resident
        and step.replayable
        and os.environ.get("SCUVAE_CUDA_GRAPHS") != "0"
    ):
        replays = Replays(cells, step)
        return replays.visits, replays.take

    def visits(n_done: int) -> Iterator[tuple[Batch, Tensor]]:
        for batch in islice(cells, n_done, None):
            step.posterior.visit(batch.host_index)
            yield batch, batch.index

    return visits, step


def capture(function: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor, Any]:
    """Record what a function does: its replay, the tensor that holds its result, their memory."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError as error:
        raise RuntimeError(
            f"recording a training step as a CUDA graph failed: {error}. Set the environment "
            "variable SCUVAE_CUDA_GRAPHS=0 and start anew, to take steps one by one"
        ) from error
    return graph.replay, result, graph.pool()


# The kind of a step, and its cells on the device and on the host.
_Visit = tuple[str | None, Tensor, Tensor]


@dataclass
class _Recording:
    index: Tensor
    losses: Tensor
    replay: Callable[[], None]


class Replays:
    def __init__(self, cells: Gathered, step: Step) -> None:
        self.cells, self.step = cells, step
        self.recorded: dict[Hashable, _Recording] = {}
        self.seen: Counter[Hashable] = Counter()
        # Recordings are replayed one after another, and may share their memory.
        self.pool: Any = None

    def visits(self, n_done: int) -> Iterator[tuple[_Visit, Tensor]]:
        for index, on_host in islice(self.cells.parts(), n_done, None):
            yield (self.step.posterior.visit(on_host), index, on_host), on_host

    def take(self, visit: _Visit) -> Tensor:
        kind, index, on_host = visit
        key = kind, len(index)
        if key not in self.recorded:
            self.seen[key] += 1
            if kind is None or self.seen[key] <= WARM:
                return self.step(self.cells.gather(index, on_host))
            self.recorded[key] = self._record(index)
        recording = self.recorded[key]
        recording.index.copy_(index)
        recording.replay()
        return recording.losses

    def _record(self, index: Tensor) -> _Recording:
        own = index.clone()
        replay, losses, self.pool = capture(lambda: self.step(self.cells.gather(own)), self.pool)
        return _Recording(own, losses, replay)
