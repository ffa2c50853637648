"""What glibc does with the memory that a step frees."""

import ctypes
from functools import cache
from typing import Any

import torch


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next: it gives back what exceeds twice the largest
    block ever freed, and pages taken anew cost a step as much as its elementwise work. Up to 32 MB
    count; the block here is never touched. Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def give_back_freed_memory() -> None:
    """Have glibc give back what is free now, of all threads: what is no step's, such as a start's,
    a step does not use again. Elsewhere this does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no such library
        return None
