"""Work of a thread beside the computation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


def ahead(make: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    """``map(make, jobs)``, each made by a thread while the last is in use: two at a time."""
    with ThreadPoolExecutor(1, "scuvae-read") as thread:
        pending = None
        for job in jobs:
            made = None if pending is None else pending.result()
            first, pending = pending is None, thread.submit(make, job)
            if not first:
                yield made  # type: ignore[misc]
        if pending is not None:
            yield pending.result()
