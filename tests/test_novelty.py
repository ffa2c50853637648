"""tl.novelty: calibrated, blind to depth, and its pieces against closed forms."""

import logging
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from helpers import SCHEMES, fingerprint, small_data, small_fit, unchanged
from scipy import sparse as sp
from scipy import stats
from scipy.spatial.distance import mahalanobis
from small_models import batch_of, cells_of, model_of

from scuvae import get, tl
from scuvae._keys import Keys
from scuvae.batches.sparse_rows import dense, sparse
from scuvae.batches.thinning import thinned
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.mapping.latent_distance import distance_to_posteriors
from scuvae.inference.mapping.tail_probabilities import DepthWeights, Residual, combine, log_tail
from scuvae.inference.mapping.typicality import typicality

N_GENES = 60


@cache
def _fit(likelihood: str, amortized: bool | str) -> AnnData:
    return small_fit(
        small_data(likelihood, n_obs=300, n_vars=N_GENES),
        likelihood=likelihood,
        amortized=amortized,
        n_latent=2,
        max_epochs=20,
    )


def simulated(
    n_obs: int,
    seed: int,
    likelihood: str = "negative_binomial",
    amortized: bool | str = False,
    depth: tuple[float, float] = (60, 600),
) -> AnnData:
    """Cells drawn from a fitted model, all marked as held out; totals differ 10-fold."""
    fit = _fit(likelihood, amortized)
    model = get.model(fit)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        size = torch.exp(torch.empty(n_obs).uniform_(*np.log(depth)))
        x = model.likelihood.sample(model.decoder(torch.randn(n_obs, 2)), size).numpy()
    adata = AnnData(x, obs=pd.DataFrame(index=[f"s{seed}c{i}" for i in range(n_obs)]))
    adata.var_names = fit.var_names
    adata.uns["scuvae"] = fit.uns["scuvae"]
    adata.obs["scuvae_split"] = pd.Categorical(
        ["validation"] * n_obs, categories=["train", "validation"]
    )
    return adata


def novelty(adata: AnnData, reference: AnnData, **options: object) -> np.ndarray:
    tl.novelty(adata, reference, **options)
    return adata.obs["scuvae_novelty"].to_numpy()


def programme(adata: AnnData, share: float = 0.3, n_genes: int = 6) -> AnnData:
    """The same cells, ``share`` of each one's counts moved to genes that are low in all."""
    out, rng = adata.copy(), np.random.default_rng(0)
    genes = np.argsort(adata.X.mean(0))[:n_genes]
    moved = rng.binomial(adata.X.astype(int), share)
    x = adata.X - moved
    for row, total in enumerate(moved.sum(1)):
        x[row, genes] += rng.multinomial(total, np.full(n_genes, 1 / n_genes))
    out.X = x.astype(np.float32)
    return out


def auroc(usual: np.ndarray, novel: np.ndarray) -> float:
    return float(stats.mannwhitneyu(novel, usual).statistic / (len(novel) * len(usual)))


# --- what it promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("amortized", SCHEMES)
def test_cells_of_the_model_are_usual_and_a_programme_is_not(amortized: bool | str) -> None:
    reference, new = (simulated(300, seed, amortized=amortized) for seed in (1, 2))
    found = novelty(new, reference)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    for share in (0.5, 0.2, 0.1):
        # Both the new cells and those that the tail was read from are random.
        error = math.sqrt(2 * share * (1 - share) / 300)
        assert abs((found > -math.log10(share)).mean() - share) < 3.3 * error
    for part in ("counts", "latent", "distance"):
        z = new.obs[f"scuvae_novelty_{part}"]
        assert abs(z.mean()) < 3.3 * math.sqrt(2 / 300)
        # A distance's tail is long, and its standard deviation uncertain; that of a KL, which is
        # about as long-tailed as an exponential, is by 12 % in a ratio of two samples of 300.
        low, high = {"distance": (0, np.inf), "latent": (0.65, 1.4), "counts": (0.8, 1.25)}[part]
        assert low < z.std() < high
    # 10-fold differences in depth say nothing: .3 where depth's effect stays in. The correlation's
    # error is 1/√300, and √2 times that where reference cells of like depth, random too, say what
    # is usual.
    depth = np.log(new.X.sum(1))
    for score, error in ((new.obs["scuvae_novelty_latent"], 1.0), (found, math.sqrt(2))):
        assert abs(stats.spearmanr(score, depth).statistic) < 3.3 * error / math.sqrt(300)
    assert auroc(found, novelty(programme(new), reference)) > 0.9


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "zinb"])
def test_other_likelihoods(likelihood: str) -> None:
    reference, new = (simulated(150, seed, likelihood) for seed in (1, 2))
    found = novelty(new, reference)
    assert abs((found > -math.log10(0.2)).mean() - 0.2) < 3.3 * math.sqrt(2 * 0.16 / 150)
    strange = new.copy()
    strange.X = 2 * strange.X[:, ::-1]  # other genes, and far from the mean
    assert auroc(found, novelty(strange, reference)) > 0.9


def test_no_other_cell_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without neighbours; nor does it matter which cells are looked at together."""
    reference, new = simulated(60, 1), simulated(40, 2)
    alone = partial(novelty, n_neighbors=1)
    whole = alone(new.copy(), reference)
    rows = np.random.default_rng(0).permutation(40)[:15]
    # Sums of float32 in another order, which a local step may amplify.
    np.testing.assert_allclose(alone(new[rows].copy(), reference), whole[rows], atol=5e-3)
    together = novelty(new.copy(), reference)
    monkeypatch.setattr("scuvae.runtime.CHUNK", 7)
    monkeypatch.setattr("scuvae.tl._novelty.CHUNK", 7)
    np.testing.assert_allclose(alone(new.copy(), reference), whole, atol=5e-3)
    np.testing.assert_allclose(novelty(new.copy(), reference), together, atol=5e-3)


def test_a_kind_is_found_by_its_many_cells() -> None:
    """Where single ones, of few counts, hardly show."""
    reference, new = simulated(300, 1), simulated(300, 2)
    new.X[:100] = programme(new[:100], share=0.12, n_genes=12).X
    alone, together = novelty(new.copy(), reference, n_neighbors=1), novelty(new, reference)
    assert auroc(alone[100:], alone[:100]) < 0.65
    assert auroc(together[100:], together[:100]) > 0.75
    assert (together[100:] > 1).mean() < 0.2  # their neighbours make no others novel


def test_what_all_new_cells_have_in_common_can_be_taken_out() -> None:
    reference, new = simulated(300, 1), simulated(300, 3)
    lost = np.random.default_rng(0).uniform(0.3, 1, N_GENES)
    new.X = np.random.default_rng(1).binomial(new.X.astype(int), lost).astype(np.float32)
    options: list[dict[str, Any]] = [{}, {"adjust_genes": True}, {"n_neighbors": 1}]
    usual, adjusted, alone = ((novelty(new.copy(), reference, **o) > 1).mean() for o in options)
    # Shares of 300 cells, by tails read off 300: alone and adjusted differ by up to .06 over five
    # seeds, and what all have in common adds .28 or more.
    assert usual > alone + 0.2
    assert adjusted < alone + 0.1


def test_sparse_or_dense_files_and_genes_by_name(tmp_path: Path) -> None:
    reference, new = simulated(60, 1), simulated(40, 2)
    whole = novelty(new.copy(), reference)
    sparse = new.copy()
    sparse.X = sp.csr_matrix(sparse.X)
    reference.write_h5ad(tmp_path / "reference.h5ad")
    by_path = novelty(sparse[:, ::-1].copy(), str(tmp_path / "reference.h5ad"))  # type: ignore[arg-type]
    np.testing.assert_allclose(by_path, whole, atol=5e-3)
    new.obs["scuvae_novelty"] = whole
    new.write_h5ad(tmp_path / "new.h5ad")
    np.testing.assert_array_equal(read_h5ad(tmp_path / "new.h5ad").obs["scuvae_novelty"], whole)


def test_missing_genes_are_left_out_for_both() -> None:
    reference, new = simulated(200, 1), simulated(200, 2)
    found = novelty(new[:, : N_GENES // 2].copy(), reference)
    assert abs((found > -math.log10(0.2)).mean() - 0.2) < 3.3 * math.sqrt(2 * 0.16 / 200)


def test_slots_seed_and_a_second_projection() -> None:
    reference, new = simulated(60, 1), simulated(30, 2)
    with unchanged(new, reference):
        result = tl.novelty(new, reference, copy=True, key_added="k", rng=3)
    assert result is not None
    parts = ("", "_counts", "_latent", "_distance", "_shared")
    names = {f"k_novelty{part}" for part in parts}
    assert set(result.obs) - set(new.obs) == names
    again = tl.novelty(new, reference, copy=True, key_added="k", random_state=3)
    assert fingerprint(again) == fingerprint(result)
    other = tl.novelty(new, reference, copy=True, key_added="k", rng=4)
    assert fingerprint(other) != fingerprint(result)
    tl.novelty(result, reference, key_added="k", n_neighbors=1)
    assert set(result.obs) - set(new.obs) == names - {"k_novelty_shared"}
    alone = tl.novelty(new[:1].copy(), reference, copy=True)
    assert "scuvae_novelty_shared" not in alone.obs  # a single cell has no neighbours
    Keys.of("k").clear(result)
    assert not names & set(result.obs)


def test_empty_cells_and_many_reference_cells() -> None:
    reference, new = simulated(60, 1), simulated(5, 2)
    new.X[0] = 0
    found = novelty(new, reference, n_reference=30)
    assert np.isfinite(found).all()
    assert (found != novelty(new, reference)).any()


def test_without_held_out_cells_all_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    reference, new = simulated(60, 1), simulated(5, 2)
    del reference.obs["scuvae_split"]
    with caplog.at_level(logging.WARNING, "scuvae"):
        novelty(new, reference)
    assert "marks 0 cells held out" in caplog.text


def test_errors() -> None:
    new = simulated(5, 2)
    few = simulated(19, 1)
    with unchanged(new, few):
        with pytest.raises(ValueError, match=r"19 cells.*needs 20.*more cells"):
            tl.novelty(new, few)
        with pytest.raises(ValueError, match=r"n_reference=3.*>= 20"):
            tl.novelty(new, few, n_reference=3)
        with pytest.raises(ValueError, match=r"n_neighbors=0.*>= 1"):
            tl.novelty(new, few, n_neighbors=0)
        with pytest.raises(TypeError, match="adjust_genes"):
            tl.novelty(new, few, adjust_genes="yes")
        with pytest.raises(ValueError, match="holds no fit"):
            tl.novelty(new, few, key="k")
        with pytest.raises(TypeError, match="reference is a"):
            tl.novelty(new, few.X)
        with pytest.raises(ValueError, match="share no gene"):
            tl.novelty(AnnData(np.ones((2, 3), np.float32)), simulated(30, 1))


# --- its pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_expected_log_likelihood_against_sums_over_counts(masked: bool) -> None:
    torch.manual_seed(0)
    model = model_of("negative_binomial")
    x = cells_of(model, 3, total=20.0)
    observed = torch.arange(12) % 3 != 0 if masked else None
    batch = batch_of(x, observed=observed)
    mean = torch.randn(3, 2, dtype=torch.float64)
    # So narrow a q is a point.
    q = Gaussian(mean, torch.full_like(mean, 1e-9))
    found = typicality(model, batch, q, 4000)

    genes = slice(None) if observed is None else observed
    with torch.no_grad():
        share = model.decoder(mean)[:, genes].softmax(-1)
        theta = model.likelihood.log_theta[genes].exp()
    mu = (batch.size_factor[:, None] * share).numpy()
    p = (theta / (theta + torch.as_tensor(mu))).numpy()
    counts = np.arange(3000)[:, None, None]
    log_p = stats.nbinom.logpmf(counts, theta.numpy(), p)
    log_p[~np.isfinite(log_p)] = -1e4  # where p is zero to the last bit
    weight = np.exp(log_p)
    first = (weight * log_p).sum(0)
    variance = ((weight * log_p**2).sum(0) - first**2).sum(1)
    error = np.abs(found.expected.numpy() - first.sum(1))
    assert (error < 4 * np.sqrt(variance / 4000)).all()
    at_x = stats.nbinom.logpmf(x[:, genes].numpy(), theta.numpy(), p).sum(1)
    np.testing.assert_allclose(found.reconstruction.numpy(), at_x, rtol=1e-6)


def test_residuals_are_those_of_leaving_each_cell_out() -> None:
    rng = np.random.default_rng(0)
    covariates = rng.normal(size=(50, 2)) * [1, 30] + [5, -700]
    score = covariates @ [3, 0.5] + rng.normal(size=50)
    line, usual = Residual.of(torch.tensor(score), torch.tensor(covariates))
    left_out = []
    for i in range(50):
        keep = np.arange(50) != i
        design = np.column_stack([np.ones(50), covariates])
        b = np.linalg.lstsq(design[keep], score[keep], rcond=None)[0]
        left_out.append(score[i] - design[i] @ b)
    scale = np.array(left_out) / usual.numpy()
    # The scale is log-linear in the first covariate.
    slope, intercept, *_ = stats.linregress(covariates[:, 0], np.log(scale))
    np.testing.assert_allclose(np.log(scale), intercept + slope * covariates[:, 0], atol=1e-9)
    assert np.square(usual.numpy()).mean() == pytest.approx(1)
    far = torch.tensor([[100.0, -700.0]], dtype=torch.float64)
    z = line(torch.tensor([300.0 - 350.0], dtype=torch.float64), far)
    assert abs(z) < 100  # the scale is not extrapolated


def test_fishers_combination() -> None:
    # Where a score's tail is known to be exponential, its ln P is minus the score.
    n = 4000
    usual = torch.tensor(stats.expon.ppf((np.arange(n) + 0.5) / n))
    scores = torch.tensor([[0.2, 1.0, 5.0, 9.0], [3.0, 0.1, 0.0, 7.0]], dtype=torch.float64)
    p = stats.expon.sf(scores.numpy())
    truth = [stats.combine_pvalues(pair).statistic / 2 for pair in p.T]
    found = combine((score, usual) for score in scores)
    np.testing.assert_allclose(found.numpy(), truth, rtol=0.02)  # as that of tails, below


@pytest.mark.parametrize("full", [False, True])
def test_distances_are_scipys(full: bool) -> None:
    rng = np.random.default_rng(0)
    mean, root = rng.normal(size=(9, 3)), rng.normal(size=(9, 3, 3)) + 2 * np.eye(3)
    covariance = root @ root.transpose(0, 2, 1)
    if full:
        q = Gaussian(torch.tensor(mean), torch.linalg.cholesky(torch.tensor(covariance)))
    else:
        scale = np.sqrt(np.einsum("nii->ni", covariance))
        q = Gaussian(torch.tensor(mean), torch.tensor(scale))
        covariance = np.stack([np.diag(s**2) for s in scale])
    points = np.vstack([rng.normal(size=(600, 3)), mean[4]])  # more than are taken at once
    inverse = np.linalg.inv(covariance)
    every = np.array(
        [[mahalanobis(z, m, v) for m, v in zip(mean, inverse, strict=True)] for z in points]
    )
    every[-1, 4] = np.inf  # itself
    truth = np.sort(every, 1)[:, :4].mean(1)
    found = distance_to_posteriors(torch.tensor(points), q, 4)
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-9)


def test_thinned_counts_are_binomial() -> None:
    torch.manual_seed(0)
    x = torch.zeros(3, 4000)
    x[0], x[1, ::2] = 6.0, 1.0
    batch = thinned(batch_of(x))
    found = dense(batch.x)
    assert (
        stats.chisquare(
            np.bincount(found[0].int(), minlength=7), 4000 * stats.binom.pmf(range(7), 6, 0.5)
        ).pvalue
        > 1e-3
    )
    assert set(found[1].unique().tolist()) == {0.0, 1.0}
    assert not found[1, 1::2].any()
    assert (sparse(batch.x).value > 0).all()  # likelihoods take every entry for a count
    torch.testing.assert_close(batch.size_factor, found.sum(1))
    given = thinned(replace(batch_of(x), size_factor=torch.ones(3), size_of_all=True))
    torch.testing.assert_close(given.size_factor, torch.full((3,), 0.5))


def test_tails_of_an_exponential() -> None:
    n = 1000
    reference = torch.tensor(stats.expon.ppf((np.arange(n) + 0.5) / n))
    score = torch.linspace(0, 12, 200, dtype=torch.float64)
    found = log_tail(score, reference)
    # Exact but for half a cell, and for the mean excess of a hundred quantiles.
    np.testing.assert_allclose(found.numpy(), -score.numpy(), rtol=0.02, atol=2e-3)
    assert (found.diff() < 0).all()


def test_tails_are_those_of_cells_of_like_depth() -> None:
    """Scores whose spread changes with depth: a tenth is above the last tenth everywhere."""
    rng = np.random.default_rng(0)

    def cells(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        depth = rng.uniform(4, 10, n)
        return torch.as_tensor(depth), torch.as_tensor(rng.gamma(2, np.exp(0.4 * (depth - 7)), n))

    (depth, score), (new_depth, new_score) = cells(2000), cells(8000)
    quarter = np.searchsorted(np.quantile(new_depth.numpy(), [0.25, 0.5, 0.75]), new_depth.numpy())
    plain = log_tail(new_score, score).exp()
    local = log_tail(new_score, score, DepthWeights.of(new_depth, depth)).exp()
    shares = [
        [float((p[quarter == i] < 0.1).double().mean()) for i in range(4)] for p in (plain, local)
    ]
    assert max(shares[0]) > 0.25  # what depth does if nothing is done
    assert min(shares[0]) < 0.01
    # The kernel's width smooths what is left: .069 to .104.
    assert all(0.06 < share < 0.13 for share in shares[1])
    # Equal depths say nothing: all reference cells weigh the same.
    same = torch.zeros(8000).double(), torch.zeros(2000).double()
    torch.testing.assert_close(log_tail(new_score, score, DepthWeights.of(*same)).exp(), plain)
    # A reference cell is not among those that it is compared with.
    weight = DepthWeights.of(depth, depth)(torch.arange(5, 9))
    assert (weight[torch.arange(4), torch.arange(5, 9)] == 0).all()
    assert (weight > 0).sum() == 4 * 1999


def test_tails_of_scores_of_either_sign() -> None:
    n = 1000
    reference = torch.tensor(stats.norm.ppf((np.arange(n) + 0.5) / n))
    score = torch.linspace(-6, 1.2, 200, dtype=torch.float64)
    found = log_tail(score, reference)
    # Half a cell of the hundred that are left there.
    np.testing.assert_allclose(found.numpy(), stats.norm.logsf(score.numpy()), atol=6e-3)
    assert (found.diff() <= 0).all()
    assert found[0] <= 0
