"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def fixed_random_state() -> Iterator[None]:
    """torch's random state is the same at the start of each test, and as before after it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Test data are small: on a busy machine waiting for a second thread costs ten times the work.

    scanpy's neighbours (numba's OpenMP) set the number back, hence before every test.
    """
    import torch

    torch.set_num_threads(1)
