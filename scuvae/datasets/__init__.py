"""Data to try the models on: a simulation whose truth is known, and real counts, both offline."""

from ._pbmc import pbmc68k_counts
from ._simulate import linear_factor

__all__ = ["linear_factor", "pbmc68k_counts"]
