"""What a call sets up and leaves as it was: device, random state, progress, log."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from scuvae._checks import one_of, random_generator

logger = logging.getLogger("scuvae")

# Cells that inference with a frozen decoder takes at once.
CHUNK = 512

# And at most on a GPU, which they should keep busy; there they may take most of what is free, at so
# many numbers a gene: 16 arrays of twenty draws.
_MOST, _NUMBERS, _SHARE = 16_384, 320, 0.8

DEVICES = ("auto", "cpu", "cuda", "mps")


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
    """Inside, torch's random state comes from ``rng``; outside, nothing has changed."""
    generator = random_generator(rng)
    seed = int(generator.integers(2**63))
    if isinstance(rng, int | np.integer):  # then as torch.manual_seed(rng) would have it
        seed = int(rng) % 2**63
    metal = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed every device, also those that nothing restores.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif metal is not None:
            torch.mps.manual_seed(seed)
        try:
            yield generator
        finally:
            if metal is not None:
                torch.mps.set_rng_state(metal)


def show_progress(progress: bool | None) -> bool:
    """``progress`` itself, or by default whether anybody is watching: a terminal or a notebook."""
    if progress is not None:
        return progress
    shell = sys.modules.get("IPython")
    notebook = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return notebook or sys.stderr.isatty()
