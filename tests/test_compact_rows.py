"""Counts in three bytes: every one exact, by either way of taking them."""

import numpy as np
import pytest
import torch
from helpers import assert_same_posterior, small_counts, small_fit
from scipy import sparse as sp

from scuvae.batches import SparseRows
from scuvae.batches.compact_rows import CompactRows, is_count
from scuvae.batches.sources.compact import CompactSource
from scuvae.batches.sources.registry import source_of

CPU = torch.device("cpu")


def counts(n_vars: int = 300, share_large: float = 0.02, dtype: type = np.float32) -> sp.csr_matrix:
    """Counts of 1 to 2²⁴, with those around the byte's end, and empty rows."""
    rng = np.random.default_rng(0)
    at = rng.integers(200, size=6000), rng.integers(n_vars, size=6000)
    x = sp.coo_matrix((np.ones(6000), at), shape=(200, n_vars)).tocsr()
    values = rng.integers(1, 254, len(x.data))
    large = rng.random(len(x.data)) < share_large
    values[large] = 2 ** rng.uniform(8, 24, large.sum())
    values[:6] = 253, 254, 255, 256, 2**24 - 1, 2**24
    x.data = values.astype(dtype)
    x = sp.csr_matrix(x.multiply(np.arange(200)[:, None] % 7 > 0)).astype(dtype)
    x.eliminate_zeros()
    x.sort_indices()
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint32, np.float64])
@pytest.mark.parametrize("n_vars", [300, 2**17])
def test_every_count_is_exact(n_vars: int, dtype: type) -> None:
    x = counts(n_vars, dtype=dtype)
    assert x.indices.max() > 0.9 * n_vars
    small = CompactRows.of(x, counts=True)
    assert small.shape == x.shape
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150]
    expected = x[rows.numpy()].astype(np.float32)
    for block in (small.take(rows), small.to(CPU).padded(rows, None)):
        assert isinstance(block, SparseRows)
        assert (block.col.dtype, block.value.dtype) == (torch.int32, torch.float32)
        np.testing.assert_array_equal(block.starts, expected.indptr)
        np.testing.assert_array_equal(block.col, expected.indices)
        np.testing.assert_array_equal(block.value, expected.data)
    np.testing.assert_allclose(small.totals(), x.astype(np.float64).sum(1).A1, rtol=1e-5)


def test_it_is_padded_as_other_rows_are() -> None:
    """On a GPU arrays have a size that the number of cells alone sets."""
    x = counts()
    small = CompactRows.of(x, counts=True).to(CPU)
    arrays = (x.indptr.astype(np.int64), x.indices.astype(np.int32), x.data)
    plain = SparseRows(*map(torch.from_numpy, arrays), x.shape[1])
    rows = torch.tensor([3, 199, 7, 0, 40])
    size = int(np.diff(x.indptr)[rows].sum()) + 11
    ours, theirs = small.padded(rows, size), plain.padded(rows, size)
    for name in ("starts", "value", "row"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.dense, theirs.dense)
    assert len(ours.value) == size


def test_three_bytes_a_nonzero() -> None:
    x = sp.random(2000, 2000, 0.07, format="csr", dtype=np.float32, random_state=0)
    x.data = np.ceil(np.random.default_rng(0).pareto(1.5, x.nnz)).astype(np.float32)
    assert (x.data > 254).any()
    small = CompactRows.of(x, counts=True)
    assert small.nbytes - small.starts.nbytes <= 3.2 * x.nnz


def test_other_values_keep_their_own() -> None:
    x = counts()
    x.data = np.random.default_rng(0).normal(size=x.nnz).astype(np.float32)
    x.data[:2] = 255.0, np.nan
    block = CompactRows.of(x, counts=False).take(torch.arange(200))
    np.testing.assert_array_equal(block.value, x.data)
    np.testing.assert_array_equal(block.col, x.indices)


def test_what_a_count_is() -> None:
    values = np.array([0.0, 255.0, 2.0**24, 2.0**24 + 2, -1.0, 0.5, np.nan, np.inf])
    assert is_count(values).tolist() == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64, np.float64])
def test_a_fit_of_other_types_is_that_of_float32(dtype: type) -> None:
    """Bit for bit; other values of float64 are taken as they were."""
    plain, other = small_counts(), small_counts()
    plain.X = sp.csr_matrix(plain.X)
    other.X = plain.X.astype(dtype)
    assert isinstance(source_of(other.X, CPU), CompactSource)
    assert not isinstance(source_of(plain.X, CPU), CompactSource)
    assert_same_posterior(small_fit(other), small_fit(plain))
    assert other.X.dtype == dtype
    halves = other.X.astype(np.float64) / 2
    assert not isinstance(source_of(halves, CPU), CompactSource)
