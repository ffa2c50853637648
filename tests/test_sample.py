"""Posterior predictive draws and checks against scipy, and against each other."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import (
    LIKELIHOOD_NAMES,
    N_OBS,
    N_VARS,
    fingerprint,
    small_counts,
    small_data,
    small_fit,
    unchanged,
    unsealed,
)
from scipy import sparse as sp
from scipy import stats
from scipy.special import expit, log_softmax
from small_models import likelihood_of

from scuvae import get, tl
from scuvae.model.likelihoods import LIKELIHOODS

COUNTS = [name for name in LIKELIHOOD_NAMES if LIKELIHOODS[name].support == "counts"]
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOOD_NAMES)


def scipy_moments(likelihood: torch.nn.Module, mu: np.ndarray) -> tuple[np.ndarray, ...]:
    """E[x], Var[x] and P(x = 0) at the means μ before dropout (or at η), by scipy.stats."""
    if likelihood.name == "bernoulli":
        bernoulli = stats.bernoulli(expit(mu))
        return bernoulli.mean(), bernoulli.var(), bernoulli.pmf(0)
    if likelihood.support == "real":
        normal = stats.norm(mu, likelihood.scale.detach().numpy())
        return normal.mean(), normal.var(), np.zeros_like(mu)
    if likelihood.name == "poisson":
        poisson = stats.poisson(mu)
        return poisson.mean(), poisson.var(), poisson.pmf(0)
    theta = likelihood.log_theta.detach().double().exp().numpy()
    nb = stats.nbinom(theta, theta / (theta + mu))
    if likelihood.name == "negative_binomial":
        return nb.mean(), nb.var(), nb.pmf(0)
    kept = 1 / (1 + np.exp(likelihood.logit_dropout.detach().double().numpy()))
    mean = kept * nb.mean()
    return mean, kept * (nb.var() + nb.mean() ** 2) - mean**2, 1 - kept + kept * nb.pmf(0)


@pytest.mark.usefixtures("fixed_random_state")
@every_likelihood
def test_moments_are_scipys(likelihood: str) -> None:
    model = likelihood_of(likelihood, 6)
    eta = torch.randn(3, 4, 6, dtype=torch.float64)
    size = torch.tensor([3.0, 20.0, 100.0, 1e4], dtype=torch.float64)
    mu = eta.numpy()
    if model.link == "softmax":
        mu = np.exp(log_softmax(mu, -1)) * size.numpy()[:, None]
    with torch.no_grad():
        found = model.moments(eta, size)
        for values, expected in zip(found, scipy_moments(model, mu), strict=True):
            # Differences of squares in scipy's terms: some digits of float64 are lost.
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-300)
        torch.testing.assert_close(found.mean, model.mean(eta, size))
        observed = torch.tensor([True, False, True, True, False, True])
        alone = likelihood_of(likelihood, 4)
        for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs[observed] if len(theirs) == 6 else theirs)
        torch.testing.assert_close(
            tuple(model.moments(eta, size, observed)),
            tuple(alone.moments(eta[..., observed], size)),
        )


@pytest.mark.usefixtures("fixed_random_state")
@every_likelihood
def test_draws_have_scipys_moments(likelihood: str) -> None:
    n_draws = 20_000
    model = likelihood_of(likelihood, 4, spread=0.4)
    eta = torch.tensor([0.3, -0.5, 1.0, 0.2], dtype=torch.float64)
    observed = torch.tensor([True, True, False, True])
    mu = eta[observed].numpy()
    if model.link == "softmax":
        mu = np.exp(log_softmax(mu)) * 9.0
    with torch.no_grad():
        size = torch.full((n_draws,), 9.0, dtype=torch.float64)
        x = model.sample(eta.expand(n_draws, -1), size, observed).numpy()
    assert (x[:, 2] == 0).all()
    x = x[:, observed.numpy()]
    alone = likelihood_of(likelihood, 3)
    with torch.no_grad():
        for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs[observed] if len(theirs) == 4 else theirs)
    mean, variance, zero = scipy_moments(alone, mu)
    squares = (x - mean) ** 2
    for values, expected in ((x, mean), (squares, variance), (x == 0, zero)):
        error = values.std(0) / n_draws**0.5
        assert (np.abs(values.mean(0) - expected) <= 5 * error + 1e-12).all()


# --- tl.sample ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nb() -> AnnData:
    return small_fit(small_counts(), likelihood="nb", batch_key="batch", max_epochs=20)


def samples(adata: AnnData) -> list[str]:
    return [name for name in adata.layers if name is not None]


@every_likelihood
def test_sample_writes_layers(likelihood: str) -> None:
    adata = small_fit(small_data(likelihood), likelihood=likelihood, mask_var="highly_variable")
    modelled = adata.var["highly_variable"].to_numpy()
    assert tl.sample(adata) is None
    layer = adata.layers["scuvae_sample"]
    assert layer.dtype == np.float32
    assert layer.shape == adata.shape
    if LIKELIHOODS[likelihood].support != "real":
        assert isinstance(layer, sp.csr_matrix)
        assert layer.has_canonical_format
        assert ((layer.data > 0) & (layer.data == np.rint(layer.data))).all()
        assert layer[:, ~modelled].nnz == 0
    else:
        assert isinstance(layer, np.ndarray)
        np.testing.assert_array_equal(np.isnan(layer), np.tile(~modelled, (N_OBS, 1)))


def test_samples_replace_each_other_and_are_cleared(nb: AnnData) -> None:
    adata = nb.copy()
    adata.layers["scuvae_sample_x"] = adata.X.copy()  # none of ours
    tl.sample(adata, n_samples=3, rng=1)
    assert samples(adata) == ["scuvae_sample_x", *(f"scuvae_sample_{i}" for i in range(3))]
    first, second = adata.layers["scuvae_sample_0"], adata.layers["scuvae_sample_1"]
    assert (first != second).nnz > 0
    once = nb.copy()
    tl.sample(once, rng=np.random.default_rng(1))
    tl.sample(once, n_samples=3, rng=1)
    assert fingerprint(once.layers["scuvae_sample_0"]) == fingerprint(first)
    tl.sample(adata)
    assert samples(adata) == ["scuvae_sample_x", "scuvae_sample"]
    tl.sample(adata, rng=2)
    tl.sample(once, rng=2)
    assert fingerprint(adata.layers["scuvae_sample"]) == fingerprint(once.layers["scuvae_sample"])
    small_fit(adata)
    assert samples(adata) == ["scuvae_sample_x"]


def test_a_sample_that_was_fitted_is_not_overwritten(nb: AnnData) -> None:
    adata = nb.copy()
    adata.layers["k_sample_0"] = adata.X.copy()
    small_fit(adata, layer="k_sample_0", key_added="other")
    tl.sample(adata, key="other")
    adata.uns["k"] = adata.uns["other"]
    for slot in ("", "_scale", "_covariance"):
        adata.obsm[f"k{slot}"] = adata.obsm[f"other{slot}"]
    with unchanged(adata), pytest.raises(ValueError, match="k_sample_0"):
        tl.sample(adata, key="k")


def test_genes_are_matched_by_name(nb: AnnData) -> None:
    straight, order = nb.copy(), np.random.default_rng(0).permutation(N_VARS)
    permuted = nb[:, order].copy()
    tl.sample(straight)
    tl.sample(permuted)
    layer = straight.layers["scuvae_sample"].toarray()
    np.testing.assert_array_equal(permuted.layers["scuvae_sample"].toarray(), layer[:, order])


def test_draws_of_fewer_genes_have_the_cells_totals(nb: AnnData) -> None:
    some = nb[:, 10:].copy()
    tl.sample(some, n_samples=50)
    totals = np.mean([some.layers[name].sum(1).A1 for name in samples(some)], axis=0)
    spread = np.std([some.layers[name].sum(1).A1 for name in samples(some)], axis=0)
    # μ sums to the total over the observed genes, whatever z.
    assert (np.abs(totals - some.X.sum(1)) < 5 * spread / 50**0.5).all()


def test_a_chain_of_draws_stays_where_the_model_is() -> None:
    """Geweke's check: x ~ p(x), then z ~ q(z | x) and x ~ p(x | z) leave p(x) as it is.

    With a linear Gaussian model q is the posterior: x stays N(b, W Wᵀ + σ² I).
    """
    adata = small_fit(small_data("gaussian"), likelihood="gaussian", n_layers=0, max_epochs=30)
    model = get.model(adata)
    (layer,) = model.decoder.layers
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    sigma = model.likelihood.scale.detach().double().numpy()
    covariance = w @ w.T + np.diag(sigma**2)
    rng = np.random.default_rng(0)
    n = 4000
    x = rng.multivariate_normal(b, covariance, n).astype(np.float32)
    cells = AnnData(x, var=adata.var)
    tl.project(cells, adata, covariance="full")
    tl.sample(cells)
    drawn = cells.layers["scuvae_sample"]
    # In the model's own coordinates everything is standard normal: means, and mean products.
    white = np.linalg.solve(np.linalg.cholesky(covariance), (drawn - b).T).T
    assert np.abs(white.mean(0)).max() < 5 / n**0.5
    error = np.where(np.eye(N_VARS) > 0, 2, 1) ** 0.5 / n**0.5
    assert (np.abs(white.T @ white / n - np.eye(N_VARS)) < 5 * error).all()
    # And the draw knows of x: their covariance is W Λ⁻¹ Wᵀ/σ² times p(x)'s, not zero.
    gain = w @ np.linalg.solve(np.eye(w.shape[1]) + (w.T / sigma**2) @ w, w.T / sigma**2)
    expected = gain @ covariance
    products = (drawn - b)[:, :, None] * (x - b)[:, None, :]
    assert (np.abs(products.mean(0) - expected) < 5 * products.std(0) / n**0.5).all()


# --- tl.predictive_check ------------------------------------------------------------------------


@every_likelihood
def test_check_at_the_posterior_mean_is_scipys(likelihood: str) -> None:
    adata = small_fit(
        small_data(likelihood), likelihood=likelihood, mask_var="highly_variable", max_epochs=10
    )
    tl.predictive_check(adata, n_samples=0)
    table = adata.uns["scuvae_predictive_check"]
    genes = adata.var["highly_variable"].to_numpy()
    assert list(table.index) == list(adata.var_names[genes])
    assert table.index.name == "gene"
    x = adata.X[:, genes].astype(np.float64)
    np.testing.assert_allclose(table["mean"], x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(table["variance"], x.var(0), rtol=1e-9)

    model = get.model(adata)
    with torch.no_grad():
        mu = model.decoder(torch.as_tensor(adata.obsm["X_scuvae"])).double().numpy()
    if model.likelihood.link == "softmax":
        mu = np.exp(log_softmax(mu, -1)) * x.sum(1, keepdims=True)
    mean, variance, zero = scipy_moments(model.likelihood, mu)
    near = {"rtol": 1e-4}  # the model's float32
    np.testing.assert_allclose(table["mean_predicted"], mean.mean(0), **near)
    variance = np.broadcast_to(variance, mean.shape)
    scale = variance.sum(0) ** 0.5 / N_OBS
    np.testing.assert_allclose(table["mean_predicted_scale"], scale, **near)
    expected = (variance + mean**2).mean(0) - mean.mean(0) ** 2 - scale**2
    np.testing.assert_allclose(table["variance_predicted"], expected, **near)
    if model.likelihood.support == "real":
        assert not [name for name in table if name.startswith("zero")]
        return
    np.testing.assert_array_equal(table["zero_fraction"], (x == 0).mean(0))
    np.testing.assert_allclose(table["zero_fraction_predicted"], zero.mean(0), **near)
    scale = (zero * (1 - zero)).sum(0) ** 0.5 / N_OBS
    np.testing.assert_allclose(table["zero_fraction_predicted_scale"], scale, rtol=1e-3)


def test_check_is_what_replicates_show(nb: AnnData) -> None:
    """Expectations and spreads are those of drawn data sets."""
    adata, n = nb.copy(), 300
    tl.predictive_check(adata, n_samples=256)
    tl.sample(adata, n_samples=n)
    table = adata.uns["scuvae_predictive_check"]
    drawn = np.stack([adata.layers[name].toarray() for name in samples(adata)])
    statistics = {
        "mean": drawn.mean(1, dtype=np.float64),
        "variance": drawn.var(1, dtype=np.float64),
        "zero_fraction": (drawn == 0).mean(1),
    }
    for name, values in statistics.items():
        error = values.std(0) / n**0.5
        assert (np.abs(values.mean(0) - table[f"{name}_predicted"]) < 5 * error + 1e-3).all()
        if name == "variance":
            continue
        # A standard deviation of n draws is off by about 1/√(2n) of itself, more with long tails.
        ratio = values.std(0) / table[f"{name}_predicted_scale"]
        seen = table[f"{name}_predicted_scale"] > 1e-3
        assert seen.sum() > N_VARS / 2
        assert (np.abs(ratio[seen] - 1) < 8 / (2 * n) ** 0.5).all()


def test_check_of_sparse_and_of_fewer_genes(nb: AnnData) -> None:
    dense, sparse = nb.copy(), nb.copy()
    sparse.X = sp.csr_matrix(sparse.X)
    some = nb[:, ::-2].copy()
    for adata in (dense, sparse, some):
        tl.predictive_check(adata)
    key = "scuvae_predictive_check"
    pd.testing.assert_frame_equal(dense.uns[key], sparse.uns[key])
    table = some.uns[key]
    assert list(table.index) == list(some.var_names)
    np.testing.assert_allclose(table["zero_fraction"], (some.X == 0).mean(0))
    # μ sums to the total over the observed genes, whatever z.
    np.testing.assert_allclose(table["mean_predicted"].sum(), some.X.sum(1).mean(), rtol=1e-5)


def test_predictive_check_names_the_worst_totals(caplog: pytest.LogCaptureFixture) -> None:
    """A gene whose decoder bias is put up by log 3 is predicted some three times too high."""
    adata = small_fit(small_counts(), likelihood="poisson", max_epochs=20)
    bias = next(
        name
        for name, value in reversed(adata.uns["scuvae"]["state"]["decoder"].items())
        if np.shape(value) == (adata.n_vars,)
    )
    unsealed(adata)["state"]["decoder"][bias][4] += np.log(3)
    with caplog.at_level("INFO", logger="scuvae"):
        tl.predictive_check(adata, n_samples=0)
    table = adata.uns["scuvae_predictive_check"]
    np.testing.assert_allclose(table["total"], adata.X.sum(0))
    tl.denoise(adata, n_samples=0)
    predicted = adata.layers["scuvae_denoised"].sum(0)
    np.testing.assert_allclose(table["total_predicted"], predicted, rtol=1e-4)  # float32
    ratio = (predicted + 1) / (adata.X.sum(0) + 1)
    np.testing.assert_allclose(table["total_ratio"], ratio, rtol=1e-4)
    (line,) = [m for m in caplog.messages if "off the most" in m]
    worst = adata.var_names[np.argsort(-np.abs(np.log(ratio)))[:5]]
    assert worst[0] == "gene4"
    assert [line.index(f"{name} ") for name in worst] == sorted(
        line.index(f"{name} ") for name in worst
    )
