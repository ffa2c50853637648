"""A cells × genes matrix that is not in memory."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

# Rows whose values nobody wants are read too where fewer than so many lie between others.
GAP = 64


class Stored(ABC):
    """A matrix that is not in memory, read by runs of rows.

    Objects are known by what they can do: nothing here imports the library that made them.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    sparse: bool
    """Whether :meth:`read` gives CSR matrices or arrays."""
    per_row: float
    """Values that are stored for a row, in the mean."""
    gap: int = GAP
    """So many rows are rather read than skipped."""

    @classmethod
    @abstractmethod
    def takes(cls, x: Any) -> bool:
        """Whether it is for objects such as ``x``."""

    @abstractmethod
    def __init__(self, x: Any) -> None: ...

    @abstractmethod
    def read(self, first: int, last: int) -> Any:
        """The rows from ``first`` to before ``last``, a CSR matrix or an array."""

    @abstractmethod
    def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
        """Where runs of about ``n_rows`` rows begin that are best read as a whole, and n_obs.

        They may be longer for that, where it can be helped not than ``most``.
        """

    def path(self) -> Path | None:
        """The file or folder that it is read from, where there is one."""
        return None

    def close_to(self, n_rows: int, most: int | None, chunk: float) -> np.ndarray:
        """Edges for data that come in chunks of so many rows, which are read as a whole."""
        step = max(1, n_rows, round(chunk if most is None else min(chunk, most)))
        return np.append(np.arange(0, self.shape[0], step), self.shape[0])


class RowsOf(Stored):
    """Some neighbouring rows of a stored matrix."""

    def __init__(self, whole: Stored, first: int, last: int) -> None:
        self.whole, self.first = whole, first
        self.shape = (last - first, whole.shape[1])
        self.dtype, self.sparse, self.per_row = whole.dtype, whole.sparse, whole.per_row
        self.gap = whole.gap

    @classmethod
    def takes(cls, x: Any) -> bool:
        return False  # it is made from what has been opened

    def read(self, first: int, last: int) -> Any:
        return self.whole.read(self.first + first, self.first + last)

    def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
        # Where the whole has its chunks.
        found = self.whole.edges(n_rows, most) - self.first
        inside = found[(found > 0) & (found < self.shape[0])]
        return np.concatenate([[0], inside, [self.shape[0]]])

    def path(self) -> Path | None:
        return self.whole.path()


def state_of(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when something is written to a file or folder: files, bytes, and their times."""
    if path is None:
        return None
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = [file.stat() for file in files]
    return len(found), sum(s.st_size for s in found), sum(s.st_mtime_ns for s in found)


def root_of(node: Any) -> Path | None:
    """The file of an HDF5 object, or the folder of a zarr node, as far as it can be told."""
    file = getattr(getattr(node, "file", None), "filename", None)
    if file is not None:
        return Path(file)
    store = getattr(node, "store", None)
    root = getattr(store, "root", None) or getattr(store, "path", None)
    if root is None or not Path(str(root)).exists():
        return None
    inner = Path(str(root)) / str(getattr(node, "path", ""))
    return inner if inner.is_dir() else Path(str(root))
