"""The sources by name, and the one for a matrix."""

from collections.abc import Callable
from typing import Any

import torch
from scipy import sparse as sp

from scuvae.batches.sources.base import Source
from scuvae.batches.sources.in_memory import DenseSource, SparseSource

SOURCES: dict[str, Callable[[Any, torch.device], Source]] = {
    "dense": DenseSource,
    "sparse": SparseSource,
}


def source_of(x: Any, device: torch.device) -> Source:
    """The source for a matrix in memory, sparse or dense."""
    return SOURCES["sparse" if sp.issparse(x) else "dense"](x, device)
