"""What a call sets up and leaves as it was: device, random state, progress, log."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from scuvae._checks import called_right, flags, one_of, plain, random_generator
from scuvae._launched import launched, local_number
from scuvae._random import using

logger = logging.getLogger("scuvae")

# Cells that inference with a frozen decoder takes at once.
CHUNK = 512

# And at most on a GPU, which they should keep busy; there they may take most of what is free, at so
# many numbers a gene: 16 arrays of twenty draws.
_MOST, _NUMBERS, _SHARE = 16_384, 320, 0.8

DEVICES = ("auto", "cpu", "cuda", "mps")

P = ParamSpec("P")
R = TypeVar("R")


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """A verb that neither minds nor changes how the process has set torch.

    Inside, gradients can be asked for, new tensors are float32 on the CPU, and nothing is cast.
    Keywords that are numpy's strings or truth values become Python's; those that it does not have
    are errors that name the one that was meant.
    """
    parameters = signature(function).parameters

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        called_right(parameters, function.__name__, args, kwargs)
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_single_precision())
            if _forked and torch.get_num_threads() > 1:
                stack.enter_context(_one_thread())
            for name, value in kwargs.items():
                kwargs[name] = plain(value)
            flags(parameters, kwargs)
            return function(*args, **kwargs)

    return inside


# Whether this process is a fork of one that had torch, whose threads did not come along: work that
# is given to them never ends.
_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    logger.info("in a forked process torch's %d threads are gone: using one", n_threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


_lock = Lock()
# Calls inside that found other settings, and these: they are the whole process's.
_changed: list[tuple[Any, ...]] = []
# Where torch says how exact products of float32 are; before 2.9 one setting was for all.
PRODUCTS = [
    part.matmul
    for part in (torch.backends.mkldnn, torch.backends.cuda)
    if hasattr(getattr(part, "matmul", None), "fp32_precision")
]
_EXACT = "ieee" if PRODUCTS else "highest"


@contextmanager
def _single_precision() -> Iterator[None]:
    """New tensors are float32, and products of such are no less exact."""
    own: tuple[Any, ...] = (torch.float32, *[_EXACT] * max(len(PRODUCTS), 1))
    with _lock:
        found = _precision()
        changed = bool(_changed) or found != own
        if changed:
            _changed.append(_changed[0] if _changed else found)
            _set_precision(*own)
    try:
        yield
    finally:
        if changed:
            with _lock:
                before = _changed.pop()
                if not _changed:  # the last call out
                    _set_precision(*before)


def _precision() -> tuple[Any, ...]:
    products = [part.fp32_precision for part in PRODUCTS]
    return (torch.get_default_dtype(), *(products or [torch.get_float32_matmul_precision()]))


def _set_precision(dtype: torch.dtype, *products: str) -> None:
    torch.set_default_dtype(dtype)
    if not PRODUCTS:
        torch.set_float32_matmul_precision(*products)
    for part, exact in zip(PRODUCTS, products, strict=False):
        part.fp32_precision = exact


def resolve_device(device: str) -> torch.device:
    """The torch device for ``device``; ``"auto"`` is CUDA where there is one, else the CPU."""
    kind = device.split(":")[0] if isinstance(device, str) else device
    one_of("device", kind, DEVICES)
    if kind == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device='auto': using %s", device)
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}: torch sees no CUDA device. Pass device='auto' or 'cpu'"
        )
    elif kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device={device!r}: torch sees no Metal device. Pass device='auto' or 'cpu'"
        )
    return torch.device(device)


def own_device(device: torch.device, n_processes: int) -> torch.device:
    """The device of this process: of several, each has a GPU of its own."""
    if n_processes == 1 or device.type != "cuda" or device.index is not None:
        return device
    number, found = local_number(), torch.cuda.device_count()
    if number >= found:
        raise ValueError(
            f"process {launched()[0]} has no GPU of its own: torch sees {found} on this machine. "
            f"Start torchrun --nproc-per-node {found}, or pass device='cpu'"
        )
    return torch.device("cuda", number)


def memory_of(device: torch.device) -> float:
    """Bytes of memory that a device has, all told; infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return float("inf")


def chunk_on(device: torch.device, n_vars: int) -> int:
    """Cells of so many genes that inference with a frozen decoder takes at once on a device."""
    if device.type != "cuda":
        return CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fitting = int(_SHARE * (free + kept) / (4 * _NUMBERS * n_vars))
    return max(1, min(fitting, _MOST))


@contextmanager
def random_state(
    rng: int | np.random.Generator | None, device: torch.device
) -> Iterator[np.random.Generator]:
    """Inside, random numbers come from ``rng``; no random state outside is read or changed."""
    generator = random_generator(rng)
    seed = int(generator.integers(2**63))
    if isinstance(rng, int | np.integer):  # then as torch.manual_seed(rng) would have it
        seed = int(rng) % 2**63
    with using(torch.Generator().manual_seed(seed)), _seeded(device, seed):
        yield generator


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The device's own generator from a seed, and then as it was. The CPU's is not touched."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        state = torch.mps.get_rng_state()
        torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            torch.mps.set_rng_state(state)
    else:
        yield


def show_progress(progress: bool | None) -> bool:
    """``progress`` itself, or by default whether anybody is watching: a terminal or a notebook."""
    if progress is not None:
        return progress and sys.stderr is not None  # as where there is no console
    shell = sys.modules.get("IPython")
    notebook = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    try:
        return notebook or bool(getattr(sys.stderr, "isatty", bool)())
    except ValueError:  # it has been closed
        return False
