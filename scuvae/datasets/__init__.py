"""Data to try the models on: simulations whose truth is known, and real counts, all offline."""

from ._donors import two_conditions
from ._pbmc import pbmc68k_counts
from ._simulate import linear_factor

__all__ = ["linear_factor", "pbmc68k_counts", "two_conditions"]
