"""How many threads a command may take."""

from collections.abc import Iterator
from contextlib import contextmanager

# No machine has more; libraries count them in few bytes.
MOST = 1024


@contextmanager
def use_threads(n: int | None) -> Iterator[None]:
    """At most ``n`` by torch, numba and the libraries of numpy and scipy; None leaves them."""
    if n is None:
        yield
        return
    import numba
    import torch
    from threadpoolctl import threadpool_limits

    n = min(n, MOST)
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        with threadpool_limits(n):
            torch.set_num_threads(n)
            numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
            yield
    finally:  # last: the limits that end give torch's library back a number of their own
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
