"""How far a fit has come, in one dict; and a folder that keeps it, whatever ends the process.

The folder holds the tensors, ``state-N-R.safetensors`` of each process R, and ``checkpoint.json``:
all else, which fit it is of, and the digests of the tensors' files. Each is written under another
name, synced and renamed; the JSON comes last, once every process has written its tensors, and old
tensors go after that, so that at any moment the folder holds one complete checkpoint, once it held
one.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scuvae._random import random_state, set_random_state
from scuvae.batches import Batch
from scuvae.inference.training.distributed import ALONE, Processes
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


# What the folder's JSON says first: another layout has another number.
_FORMAT = 2
_MANIFEST = "checkpoint.json"
# Steps between two questions to other processes, whether one of them wants a checkpoint.
_ASK_EVERY = 16


class Checkpoint:
    """Keeps the state of a fit in a folder: called after every step, within ``with``.

    Inside, Ctrl-C and SIGTERM wait for the present step and a checkpoint, and then end the fit, by
    KeyboardInterrupt and SystemExit; a second signal is not waited with.

    Parameters
    ----------
    folder
        Made where it is missing.
    every
        Seconds from a checkpoint to the next.
    fit
        What makes the fit this one, by name: plain values.
    processes
        Those that fit together: all keep their state after the same step, in a folder that all of
        them see.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: float,
        fit: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.every, self.processes = Path(folder), every, processes
        self.fit: dict[str, Any] = _plain(fit)
        self._last = time.monotonic()
        self._n_steps = 0
        self._number = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def read(self) -> dict[str, Any] | None:
        """The state that the folder holds, or None where there is none.

        Raises
        ------
        ValueError
            It is of another fit, which is told from this one, or the files are damaged.
        """
        path = self.folder / _MANIFEST
        if not path.exists():
            return None
        try:
            whole = json.loads(_regular(path).read_text())
            content = whole["content"]
            intact = whole["sha256"] == _digest(_text(content).encode())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise ValueError(f"{path} is damaged: delete the folder, and fit anew")
        if content["format"] != _FORMAT:
            raise ValueError(
                f"{path} is of another version of scuvae (format {content['format']}, here "
                f"{_FORMAT}): go on with that one, or delete the folder and fit anew"
            )
        _check_same(content["fit"], self.fit, self.folder)
        part = content["parts"][self.processes.rank]
        tensors = self.folder / part["tensors"]
        try:
            intact = _digest_of(_regular(tensors)) == part["sha256"]
        except OSError:
            intact = False
        if not intact:
            raise ValueError(f"{tensors} is damaged or gone: delete the folder, and fit anew")
        self._number = int(content["number"])
        return _joined(part["state"], load_file(tensors))

    def __call__(self, state: Callable[[], dict[str, Any]], last: bool) -> None:
        """After a step, or at the end: write where it is time to."""
        due = last or time.monotonic() - self._last >= self.every
        number = self._signal or 0
        if self.processes.several:
            self._n_steps += 1
            if self._n_steps % _ASK_EVERY and self.every and not last:
                return
            # All do the same: what one of them wants.
            wanted = int(self.processes.most(number or -1 + due))
            due, number = wanted >= 0, max(wanted, 0)
        if not due and not number:
            return
        self.write(state())
        if number == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted: the fit goes on from {self.folder}")
        if number:
            raise SystemExit(128 + number)

    def write(self, state: dict[str, Any]) -> None:
        """Put a state into the folder, in place of the last; not one that holds no numbers."""
        processes = self.processes
        finite = _finite(state["model"]) and _finite(state["posterior"])
        if processes.most(not finite):
            return  # training is about to find it out
        self.folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        name = f"state-{self._number}-{processes.rank}.safetensors"
        tensors: dict[str, Tensor] = {}
        plain = _split(state, "", tensors)
        _put(self.folder / name, lambda path: save_file(_own(tensors), path))
        part = {"tensors": name, "sha256": _digest_of(self.folder / name), "state": plain}
        parts = processes.texts(_text(part))  # all are there, once they are here
        if not processes.rank:
            self._write_manifest([json.loads(text) for text in parts])
        processes.most(0)  # nobody ends before it is written
        self._last = time.monotonic()

    def _write_manifest(self, parts: list[dict[str, Any]]) -> None:
        content = {"format": _FORMAT, "number": self._number, "fit": self.fit, "parts": parts}
        text = _text({"sha256": _digest(_text(content).encode()), "content": content})
        _put(self.folder / _MANIFEST, lambda path: path.write_text(text))
        for old in self.folder.glob("state-*"):
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            elif old.name not in [part["tensors"] for part in parts]:
                old.unlink(missing_ok=True)

    def __enter__(self) -> "Checkpoint":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        handler = self._handlers.pop(number)  # a second one ends at once
        signal.signal(number, handler)


def digest(*parts: Tensor | Iterable[str]) -> str:
    """SHA-256 of some tensors and strings, which tells data sets apart."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            found.update("\0".join(part).encode())
        found.update(b"\0\0")
    return found.hexdigest()


def _regular(path: Path) -> Path:
    """The path of a file, which can be opened without waiting for anybody to write to it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    return path


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there as a whole or not at all: written beside, synced, renamed."""
    # A folder of its own: what writes may leave files of other names beside it, when killed.
    beside = path.with_name(f"{path.name}.tmp")
    beside.mkdir(exist_ok=True)
    write(beside / path.name)
    _sync(beside / path.name)
    os.replace(beside / path.name, path)
    shutil.rmtree(beside)
    _sync(path.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _check_same(kept: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """An error that lists what two fits differ in."""
    names = [name for name in {**kept, **asked} if kept.get(name) != asked.get(name)]
    if names:
        listed = "; ".join(
            f"{name}: {_shown(kept.get(name))} there, {_shown(asked.get(name))} here"
            for name in names
        )
        raise ValueError(
            f"checkpoint={str(folder)!r} holds another fit ({listed}). Pass what it was made with, "
            "or another folder"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _plain(value: Any) -> Any:
    """Settings as JSON has them, whatever arrays they are in."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _split(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state with names in place of its tensors, which are put into ``tensors``."""
    if isinstance(state, Tensor):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, Mapping):
        return {
            "dict": {key: _split(value, f"{name}/{key}", tensors) for key, value in state.items()}
        }
    return state


def _joined(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, dict) and "tensor" in plain:
        return tensors[plain["tensor"]]
    if isinstance(plain, dict):
        return {key: _joined(value, tensors) for key, value in plain["dict"].items()}
    return plain


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host, and no two over the same memory, which the format does not have."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return found


def _finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def _text(content: Any) -> str:
    return json.dumps(content, allow_nan=False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
