"""The whitened PCA against numpy's SVD and its memory; the likeliest points against scipy."""

import numpy as np
import pytest
import torch
from scipy import sparse as sp
from scipy import special, stats
from small_models import UNIQUE, batch_of, cells_of, model_of
from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.sources.in_memory import SparseSource
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.whitened_pca import WhitenedPCA
from scuvae.inference.refinement.initialization import likeliest
from scuvae.model import VAE

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
    scores = WhitenedPCA(batch, 3, inputs="profile" if is_counts else "values")(batch).numpy()
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
        found.append(WhitenedPCA(batch, 4, inputs="profile" if is_counts else "values")(batch))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)  # sums reordered


def test_other_cells_are_projected() -> None:
    x = counts()
    pca = WhitenedPCA(batch_of(x, sparse=True), 3, inputs="profile")
    everyone = pca(batch_of(x, sparse=True))
    some = torch.tensor([3, 70, 11])
    close = {"rtol": 1e-10, "atol": 1e-10}  # roundings
    torch.testing.assert_close(pca(batch_of(x[some], sparse=True)), everyone[some], **close)
    torch.testing.assert_close(pca(batch_of(x[some])), everyone[some], **close)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (1, 5), (40, 1)])
def test_fewer_components_than_asked_for_are_filled_with_zeros(shape: tuple[int, int]) -> None:
    x = torch.poisson(torch.full(shape, 2.0, dtype=torch.float64))
    batch = batch_of(x, sparse=True)
    scores = WhitenedPCA(batch, 6, inputs="values")(batch)
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
        WhitenedPCA(batch, 5, inputs="profile")(batch)
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    # blocks of cells or genes × 15 directions
    assert 0 < largest < n_cells * n_vars * 4 / 20


def joint(model: VAE, x: Tensor, z: Tensor, covariates: Tensor | None) -> np.ndarray:
    """log p(x | z) + log p(z) of each cell at each point by scipy, (cells, points).

    Counts given their total are multinomial draws from the softmax.
    """
    with torch.no_grad():
        eta = model.decoder(z, covariates).numpy()
    prior = stats.norm.logpdf(z.numpy()).sum(1)
    if model.likelihood.link == "logit":
        return stats.bernoulli.logpmf(x.numpy()[:, None], special.expit(eta)).sum(-1) + prior
    if model.likelihood.link == "identity":
        scale = model.likelihood.scale.detach().numpy()
        return stats.norm.logpdf(x.numpy()[:, None], eta, scale).sum(-1) + prior
    profile = special.softmax(eta, axis=1)
    total = x.sum(1).numpy()[:, None].astype(int)
    return stats.multinomial.logpmf(x.numpy()[:, None], total, profile) + prior


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n_covariates", [0, 3])
@pytest.mark.parametrize("name", UNIQUE)
def test_cells_begin_at_the_likeliest_point(name: str, n_covariates: int, sparse: bool) -> None:
    model = model_of(name, n_latent=3, n_vars=8, n_covariates=n_covariates)
    x = cells_of(model_of(name, n_latent=3, n_vars=8), 12)
    kind = torch.arange(12) % 3
    covariates = torch.eye(3).double()[kind] if n_covariates else None
    found = likeliest(model, batch_of(x, covariates=covariates, sparse=sparse))
    mean = torch.zeros(1, 3).double()
    z = torch.cat([mean, normal_points(512, mean).squeeze(1)])
    for i in range(12):
        told = None if covariates is None else covariates[i].expand(len(z), -1)
        values = joint(model, x[i : i + 1], z, told)[0]
        own = (z == found[i]).all(1)
        assert own.sum() == 1  # one of the points
        # float64 roundings of sums over genes
        assert values[own.numpy()] >= values.max() - 1e-8


@pytest.mark.parametrize("name", UNIQUE)
def test_genes_that_are_missing_say_nothing_of_where_to_begin(name: str) -> None:
    model = model_of(name, n_latent=2, n_vars=10)
    x = cells_of(model, 9)
    seen = torch.arange(10) % 3 > 0
    found = likeliest(model, batch_of(torch.where(seen, x, 0.0), observed=seen, sparse=True))
    other = torch.where(seen, x, 7.0)
    torch.testing.assert_close(
        likeliest(model, batch_of(other, observed=seen)), found, rtol=0, atol=0
    )
    assert (found != likeliest(model, batch_of(x))).any()


def test_an_empty_cell_begins_at_the_priors_mean() -> None:
    model = model_of("negative_binomial", n_latent=2, n_vars=10)
    assert (likeliest(model, batch_of(torch.zeros(3, 10).double(), sparse=True)) == 0).all()
