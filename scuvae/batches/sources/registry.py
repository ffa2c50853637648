"""The sources by name, and the one for a matrix."""

from typing import Any

import torch

from scuvae.batches.sources.base import Source
from scuvae.batches.sources.compact import CompactSource
from scuvae.batches.sources.in_memory import DenseSource, SparseSource
from scuvae.batches.sources.on_disk import OnDiskSource

SOURCES: dict[str, type[Source]] = {
    "dense": DenseSource,
    "sparse": SparseSource,
    "compact": CompactSource,
    "on_disk": OnDiskSource,
}


def source_of(x: Any, device: torch.device) -> Source:
    """The source for a matrix: of those that take it, the one that was registered last."""
    for kind in reversed(SOURCES.values()):
        if kind.takes(x):
            return kind(x, device)
    raise TypeError(
        f"no source takes a {type(x).__name__}: known are {', '.join(SOURCES)}. Pass a scipy CSR "
        "matrix or a numpy array, or register a source in SOURCES"
    )
