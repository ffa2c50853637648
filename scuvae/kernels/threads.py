"""Kernels over rows, by as many threads as torch may use."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import torch
from torch import Tensor

# Rows that are worth a thread of their own: 2^17 logits take it .2 ms.
NUMBERS_A_THREAD = 2**17
# Rows whose slopes are summed by one thread: sums are then the same for any number of threads.
BLOCK = 64
# numba can be told to interpret, as a debugger would have it.
ENABLED = not numba.config.DISABLE_JIT


def _array(argument: Any) -> Any:
    return argument.numpy() if isinstance(argument, Tensor) else argument


def over_rows(kernel: Any, eta: Tensor, *arguments: Any) -> None:
    """A kernel over all rows, by as many threads as torch may use where there is work for them."""
    n_rows = len(eta)
    arrays = [_array(argument) for argument in (eta, *arguments)]
    n_blocks = -(-n_rows // BLOCK)
    n_threads = min(torch.get_num_threads(), eta.numel() // NUMBERS_A_THREAD, n_blocks)
    if n_threads < 2:
        kernel(0, n_rows, *arrays)
        return
    ends = [min(n_rows, n_blocks * i // n_threads * BLOCK) for i in range(n_threads + 1)]
    list(_pool(n_threads).map(lambda a, b: kernel(a, b, *arrays), ends[:-1], ends[1:]))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "scuvae")


if hasattr(os, "register_at_fork"):  # threads do not outlive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
