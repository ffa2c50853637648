"""Several processes that fit one model, each with cells of its own, and all that they exchange.

``torchrun`` starts them and says to each who it is. A process owns a run of neighbouring cells and
these cells' rows, which nobody else sees. What all share, decoder, encoder, prior, starts alike
and is moved alike: gradients are summed once a step, so that a step is one on the cells that all
processes take together. Everything else that is decided, from what is judged, is decided on sums.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from scuvae._checks import random_generator, real
from scuvae.batches import Batch, SparseRows
from scuvae.batches.loader import Loader
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.training.history import Bad

logger = logging.getLogger("scuvae")

# Seconds that a process may be waited for; the environment may say otherwise.
TIMEOUT, TIMEOUT_VARIABLE = 300.0, "SCUVAE_TIMEOUT"
# Seconds between two signs of life.
_BEAT = 0.3
# Rows that one process collects at once.
_ROWS = 2**16

# Groups that this process was in: each has names of its own where they meet.
_groups = count()


def own_rows(held_out: np.ndarray, rank: int, size: int) -> slice:
    """The rows of a process among all cells, of which some are held out.

    Runs of neighbours, in the order of the processes, with as many training cells in each, but
    for one.
    """
    training = np.flatnonzero(~held_out)
    if len(training) < size:
        raise ValueError(
            f"{size} processes, but {len(training)} cells to train on: each needs some. Start fewer"
        )
    cuts = [0, *training[np.arange(1, size) * len(training) // size], len(held_out)]
    return slice(int(cuts[rank]), int(cuts[rank + 1]))


class LostProcess(ConnectionError):
    """Another process has ended, or no longer answers."""


class Processes:
    """The processes of a fit as one of them sees them; of one alone, nothing is exchanged.

    Attributes
    ----------
    rank, size
        The number of this process, and how many there are.
    first
        The row number of its first cell among those of all.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, first: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.first, self.store = rank, size, first, store
        self._n_exchanges = 0
        self._flat: Tensor | None = None
        self._over = threading.Event()
        if store is not None:
            self._beat(0)
            threading.Thread(target=self._beats, name="scuvae-beat", daemon=True).start()

    @property
    def several(self) -> bool:
        return self.size > 1

    # --- who has what ---------------------------------------------------------------------------

    def check_alike(self, params: dict[str, Any]) -> None:
        """Raise where processes were asked for other fits."""
        texts = self.texts("\n".join(f"{name}={value!r}" for name, value in params.items()))
        for rank, text in enumerate(texts):
            differ = sorted(set(texts[0].split("\n")) ^ set(text.split("\n")))
            if differ:
                raise ValueError(
                    f"processes 0 and {rank} fit with other settings, of their arguments or of "
                    f"what their cells' values are: {', '.join(differ)}. Pass all the same, and "
                    "likelihood= by name"
                )

    def share(self, batch_size: int) -> int:
        """This process's cells of a step: as many in each, rounded up."""
        return -(-batch_size // self.size)

    def paced(self, loader: Loader) -> "Loader | Paced":
        """The same batches, and as many an epoch as every other process has."""
        if not self.several:
            return loader
        return Paced(loader, int(self.most(-(-len(loader.index) // loader.batch_size))))

    # --- what is exchanged ----------------------------------------------------------------------

    def reduce_gradients(self, gradients: Sequence[Tensor], n_cells: int) -> Callable[[], None]:
        """Begin to replace gradients, each an estimate from so many cells, by that from the cells
        of all processes. What is returned ends it."""
        n_numbers = sum(gradient.numel() for gradient in gradients) + 1
        if self._flat is None or len(self._flat) != n_numbers:
            self._flat = gradients[0].new_empty(n_numbers)
        flat = self._flat
        parts = flat[:-1].split([gradient.numel() for gradient in gradients])
        for part, gradient in zip(parts, gradients, strict=True):
            torch.mul(gradient.reshape(-1), n_cells, out=part)
        flat[-1] = n_cells
        with self._naming():
            work = dist.all_reduce(flat, async_op=True)

        def end() -> None:
            with self._naming():
                work.wait()
            for part, gradient in zip(parts, gradients, strict=True):
                torch.div(part.view_as(gradient), flat[-1], out=gradient)

        return end

    def add(self, *values: Tensor) -> None:
        """Replace values by their sums over all processes."""
        if self.several:
            for value in values:
                with self._naming():
                    dist.all_reduce(value)

    def most(self, value: float) -> float:
        """The largest of all processes' values."""
        if not self.several:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        with self._naming():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def alike(self, *values: Tensor) -> None:
        """Give every process the first one's values."""
        if self.several:
            for value in values:
                with self._naming():
                    dist.broadcast(value, 0)

    def gather(self, own: Tensor) -> list[Tensor]:
        """A tensor of every process; they may differ in their numbers of rows."""
        if not self.several:
            return [own]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self.add(lengths)
        room = own.new_zeros(int(lengths.max()), *own.shape[1:])
        room[: len(own)] = own
        parts = [torch.empty_like(room) for _ in range(self.size)]
        with self._naming():
            dist.all_gather(parts, room)
        return [part[:n] for part, n in zip(parts, lengths.tolist(), strict=True)]

    def numbers(self, own: int) -> list[int]:
        """A number of every process."""
        return [int(number) for number in self.together(torch.tensor([own]))]

    def together(self, own: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        return torch.cat(self.gather(own)) if self.several else own

    def texts(self, own: str) -> list[str]:
        """A text of every process."""
        parts = self.gather(torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8))
        return [part.numpy().tobytes().decode() for part in parts]

    def batch(self, own: Batch) -> Batch:
        """The cells of all processes in one batch."""
        if not self.several:
            return own
        x = own.x
        if isinstance(x, SparseRows):
            starts = torch.cat([x.starts.new_zeros(1), self.together(x.starts.diff()).cumsum(0)])
            joined: Tensor | SparseRows = SparseRows(
                starts, self.together(x.col), self.together(x.value), x.n_vars
            )
        else:
            joined = self.together(x)
        told = own.covariates
        return Batch(
            joined,
            self.together(own.index + self.first),
            self.together(own.size_factor),
            None if told is None else self.together(told),
            own.observed,
            size_of_all=own.size_of_all,
        )

    def posterior(self, own: Gaussian) -> Gaussian:
        """The q of all processes' cells."""
        return Gaussian(self.together(own.mean), self.together(own.factor)) if self.several else own

    def losses(
        self, rows: list[dict[str, float]], bad: Bad | None
    ) -> tuple[list[dict[str, float]], Bad | None]:
        """What :meth:`scuvae.inference.training.history.Losses.read` gives, of all cells: sums; or
        the first step of any process whose loss is no number."""
        if not self.several:
            return rows, bad
        own = torch.full((1, 4), -1.0, dtype=torch.float64)
        if bad is not None:
            own = own.new_tensor([[bad.epoch, bad.batch, bad.loss, bad.first]])
        steps = self.together(own)
        cells = self.gather(torch.tensor(bad.cells if bad else [], dtype=torch.int64))
        wrong = [(step[0], step[1], rank) for rank, step in enumerate(steps) if step[0] >= 0]
        if wrong:
            rank = min(wrong)[2]
            epoch, batch, loss, first = steps[rank].tolist()
            return [], Bad(loss, int(epoch), int(batch), cells[rank].tolist(), bool(first))
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
        self.add(values)
        return [dict(zip(rows[0], row, strict=True)) for row in values.tolist()], None

    def collected(
        self, own: np.ndarray, room: Callable[[int, int], np.ndarray]
    ) -> np.ndarray | None:
        """The rows of all processes, (cells, columns), at the first; None at the others.

        ``room`` makes what they are put into, of so many columns and rows.
        """
        if not self.several:
            return own
        lengths = self.numbers(len(own))
        whole = room(own.shape[1], sum(lengths)) if not self.rank else None
        at = np.cumsum([0, *lengths])
        for begin in range(0, max(lengths), _ROWS):
            some = torch.from_numpy(np.ascontiguousarray(own[begin : begin + _ROWS]))
            parts = self._to_first(some, min(_ROWS, max(lengths) - begin))
            for rank, part in enumerate(parts):
                n = max(0, min(_ROWS, lengths[rank] - begin))
                if whole is not None and n:
                    whole[at[rank] + begin : at[rank] + begin + n] = part[:n].numpy()
        return whole

    def _to_first(self, own: Tensor, n_rows: int) -> list[Tensor]:
        """Up to so many rows of every process at the first; nothing at the others."""
        room = own.new_zeros(n_rows, *own.shape[1:])
        room[: len(own)] = own
        parts = [torch.empty_like(room) for _ in range(self.size)] if not self.rank else None
        with self._naming():
            dist.gather(room, parts, 0)
        return parts or []

    # --- who is missing -------------------------------------------------------------------------

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """An exchange: where it fails, the error says who is missing."""
        self._n_exchanges += 1
        try:
            yield
        except RuntimeError as error:
            with _noting_sigterm() as noted:
                said = (
                    f"{self._missing()}: the fit has ended in process {self.rank} as well. With "
                    "checkpoint= it goes on from the last checkpoint when it is started again, "
                    "which torchrun --max-restarts 3 does by itself"
                )
                if noted:  # torchrun ends this one before anybody hears of it
                    logger.error(said)
            raise LostProcess(said) from error

    def _beats(self) -> None:
        with suppress(Exception):  # the place where they meet has ended
            for number in count(1):
                if self._over.wait(_BEAT):
                    return
                self._beat(number)

    def _beat(self, number: int) -> None:
        self.store.set(f"beat/{self.rank}", f"{number} {self._n_exchanges}")

    def _signs(self) -> list[list[str]]:
        ranks = range(self.size)
        return [self.store.get(f"beat/{rank}").decode().split() for rank in ranks]

    def _missing(self) -> str:
        others = [rank for rank in range(self.size) if rank != self.rank]
        if self.store is None:
            return f"one of the other {len(others)} processes has ended or does not answer"
        try:
            before = self._signs()
            self._over.wait(4 * _BEAT)
            now = self._signs()
        except Exception:
            return "process 0 of the fit has ended"
        silent = [rank for rank in others if now[rank][0] == before[rank][0]]
        if silent:
            return f"{_listed(silent)} of {self.size} has ended or hangs"
        done = [int(sign[1]) for sign in now]
        behind = [rank for rank in others if done[rank] <= min(done)] or others
        return f"{_listed(behind)} of {self.size} was waited for in vain: it is alive, but behind"

    def leave(self) -> None:
        self._over.set()


def _listed(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"


ALONE = Processes()


@dataclass(frozen=True)
class Paced:
    """A loader's batches, and empty ones for as long as other processes have cells left."""

    loader: Loader
    n_batches: int

    @property
    def generator(self) -> torch.Generator | None:
        return self.loader.generator

    def __iter__(self) -> Iterator[Batch]:
        left = self.n_batches
        for batch in self.loader:
            yield batch
            left -= 1
        for _ in range(left):
            yield batch.take(batch.index[:0])


def agreed_seed(
    rng: int | np.random.Generator | None, processes: Processes
) -> int | np.random.Generator | None:
    """A seed that all processes have: the first one's, where each would draw its own."""
    if not processes.several or isinstance(rng, int | np.integer):
        return rng
    seed = torch.tensor(int(random_generator(rng).integers(2**63)))
    processes.alike(seed)
    return int(seed)


def _timeout() -> float:
    """Seconds to wait for others, at most."""
    given = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        return real(TIMEOUT_VARIABLE, float(given), above=0.0)
    except ValueError:
        raise ValueError(
            f"the environment's {TIMEOUT_VARIABLE} is {given!r}: set it to a number of seconds, or "
            "unset it"
        ) from None


@contextmanager
def joined(size: int, device: torch.device, first: int = 0) -> Iterator[Processes]:
    """Inside, the processes that were launched can exchange what they have.

    ``first`` is the row number of this one's first cell.

    By nccl between GPUs, by gloo between CPUs and for all that is small. A group that the caller
    has made is taken as it is.
    """
    if size == 1:
        yield ALONE
        return
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), first=first)
            return
        limit = timedelta(seconds=_timeout())
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun may hand the store of processes that were killed to those that follow them.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"scuvae/{life}/{next(_groups)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        processes = Processes(rank, size, first=first, store=store)
        try:
            yield processes
        finally:
            processes.leave()
            with suppress(Exception):
                dist.destroy_process_group()


@contextmanager
def _noting_sigterm() -> Iterator[list[int]]:
    """Inside, SIGTERM is only noted; afterwards it does what it would have done."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
    if noted:
        signal.raise_signal(signal.SIGTERM)
