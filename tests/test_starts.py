"""The whitened PCA against numpy's SVD, and its memory against the dense matrix's."""

import numpy as np
import pytest
import torch
from scipy import sparse as sp
from small_models import batch_of
from torch import Tensor

from scuvae.inference.starts import WhitenedPCA
from scuvae.io.sources import SparseSource
from scuvae.model import Batch

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def counts(n_cells: int = 80, n_vars: int = 30, rank: int = 3) -> Tensor:
    """Counts with ``rank`` strong programmes, and an empty cell."""
    z, w = torch.randn(n_cells, rank), torch.randn(rank, n_vars)
    x = torch.poisson(3 * torch.exp((z @ w).clamp(-3, 3))).double()
    x[5] = 0.0
    return x


def log_normalised(x: Tensor) -> np.ndarray:
    """log(1 + x · median / ℓ), with the median as torch has it: the lower of the middle two."""
    total = x.sum(1).numpy()
    target = np.sort(total)[(len(total) - 1) // 2]
    return np.log1p(x.numpy() * (target / np.maximum(total, 1e-12))[:, None])


def normalised(x: Tensor, is_counts: bool) -> np.ndarray:
    return log_normalised(x) if is_counts else x.numpy()


@pytest.mark.parametrize("is_counts", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_scores_are_numpys_left_singular_vectors(sparse: bool, is_counts: bool) -> None:
    x = counts() if is_counts else counts().log1p()
    batch = batch_of(x, sparse=sparse)
    scores = WhitenedPCA(batch, 3, counts=is_counts)(batch).numpy()
    y = normalised(x, is_counts)
    left, singular, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
    assert singular[2] > 1.2 * singular[3]  # else the three are not determined
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-10)  # roundings
    # what four subspace iterations leave of the other directions
    np.testing.assert_allclose(scores.T @ scores / len(x), np.eye(3), atol=1e-4)
    overlap = np.linalg.svd(left[:, :3].T @ scores / np.sqrt(len(x)), compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-4)  # cosines of the angles between the spaces
    # each component by itself, up to its sign
    cosine = np.abs((left[:, :3] * scores).sum(0)) / np.sqrt(len(x))
    np.testing.assert_allclose(cosine, 1, atol=1e-3)  # the same


@pytest.mark.parametrize("is_counts", [True, False])
def test_sparse_is_dense(is_counts: bool) -> None:
    x = counts()
    found = []
    for sparse in (True, False):
        torch.manual_seed(1)
        batch = batch_of(x, sparse=sparse)
        found.append(WhitenedPCA(batch, 4, counts=is_counts)(batch))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)  # sums reordered


def test_other_cells_are_projected() -> None:
    x = counts()
    pca = WhitenedPCA(batch_of(x, sparse=True), 3, counts=True)
    everyone = pca(batch_of(x, sparse=True))
    some = torch.tensor([3, 70, 11])
    close = {"rtol": 1e-10, "atol": 1e-10}  # roundings
    torch.testing.assert_close(pca(batch_of(x[some], sparse=True)), everyone[some], **close)
    torch.testing.assert_close(pca(batch_of(x[some])), everyone[some], **close)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (1, 5), (40, 1)])
def test_fewer_components_than_asked_for_are_filled_with_zeros(shape: tuple[int, int]) -> None:
    x = torch.poisson(torch.full(shape, 2.0, dtype=torch.float64))
    batch = batch_of(x, sparse=True)
    scores = WhitenedPCA(batch, 6, counts=False)(batch)
    assert scores.shape == (shape[0], 6)
    y = x.numpy() - x.numpy().mean(0)
    rank = np.linalg.matrix_rank(y)
    variance = scores.square().mean(0).numpy()
    # small matrices: the randomised method is exact but for roundings
    np.testing.assert_allclose(variance, [1.0] * rank + [0.0] * (6 - rank), atol=1e-6)


def test_memory_stays_far_below_the_dense_matrix() -> None:
    n_cells, n_vars = 1500, 1200
    rng = np.random.default_rng(0)
    x = sp.random_array((n_cells, n_vars), density=2e-3, format="csr", rng=rng, dtype=np.float32)
    x.data = np.ceil(5 * x.data)
    source = SparseSource(x, torch.device("cpu"))
    batch = Batch(source.rows(torch.arange(n_cells)), torch.arange(n_cells), source.totals())
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        WhitenedPCA(batch, 5, counts=True)(batch)
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    # blocks of cells or genes × 15 directions
    assert 0 < largest < n_cells * n_vars * 4 / 20
