"""Kinds of stored matrices by name, and the one for an object."""

from typing import Any

from scuvae.batches.stored.base import Stored
from scuvae.batches.stored.csr_group import CSRGroup
from scuvae.batches.stored.dask_array import DaskArray
from scuvae.batches.stored.dense_array import DenseArray

STORED: dict[str, type[Stored]] = {
    "csr_group": CSRGroup,
    "dense_array": DenseArray,
    "dask_array": DaskArray,
}


def kind_of(x: Any) -> type[Stored] | None:
    """The kind that takes an object, the one that was registered last; None for what none does."""
    return next((kind for kind in reversed(STORED.values()) if kind.takes(x)), None)
