"""Large tables in files of their own, which memory holds for as long as nothing else needs it.

The file has no name and is gone with its table. What is written goes through the system's cache to
the folder for temporary files, which ``TMPDIR`` names, and comes back from there.
"""

import mmap
import os
import tempfile
from weakref import WeakSet

import numpy as np

from scuvae.kernels.malloc import give_back_freed_memory

_open: WeakSet[mmap.mmap] = WeakSet()


def room(*shape: int) -> np.ndarray:
    """Zeros of a shape, float32."""
    n_bytes = 4 * int(np.prod(shape))
    if not n_bytes:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(prefix="scuvae-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            file.truncate(n_bytes)
        except OSError as error:
            raise OSError(
                f"no room for a table of {n_bytes / 1e9:.2f} GB in {tempfile.gettempdir()}: "
                f"{error.strerror}. Set TMPDIR to a folder that has it"
            ) from error
        memory = mmap.mmap(file.fileno(), n_bytes)
    if hasattr(mmap, "MADV_RANDOM"):
        # Otherwise Linux has such a file in pieces of megabytes, and maps all of one where a single
        # row is asked for.
        memory.madvise(mmap.MADV_RANDOM)
    _open.add(memory)
    return np.frombuffer(memory, np.float32).reshape(shape)


def release() -> None:
    """Let go of the memory that tables take, whose values stay in the system's cache or file, and
    where there are tables of what was freed beside them."""
    tables = list(_open)
    if hasattr(mmap, "MADV_DONTNEED"):
        for memory in tables:
            memory.madvise(mmap.MADV_DONTNEED)
    if tables:
        give_back_freed_memory()
