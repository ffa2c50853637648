"""Coverage of posterior intervals against closed forms, and what brings it to nominal."""

import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import N_LATENT, N_VARS, SCHEMES, small_counts, small_data, small_fit, unchanged
from scipy.stats import norm
from small_models import as_q, batch_of, exact_posterior, linear_gaussian, model_of
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae import get, tl
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.evaluation.simulation_based_calibration import (
    Residuals,
    coverage,
    diagonal_coverage,
    scale_ratio,
    simulate,
)
from scuvae.inference.refinement.adam import refine_gradient
from scuvae.inference.refinement.infer import infer
from scuvae.inference.refinement.moments import match_moments
from scuvae.inference.refinement.refine import fixed_elbo
from scuvae.inference.refinement.stein import polish
from scuvae.model import VAE

pytestmark = pytest.mark.usefixtures("fixed_random_state")

LEVELS = torch.tensor([0.5, 0.8, 0.95], dtype=torch.float64)
N_CELLS = 4000
MIXED = [[1.0, 1.0, 0.5], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]


def simulated(model: VAE, n_cells: int, total: float = 60.0) -> tuple[Tensor, Batch]:
    empty = torch.zeros(n_cells, model.n_vars, dtype=torch.float64)
    size = total * torch.exp(0.3 * torch.randn(n_cells, dtype=torch.float64))
    with torch.no_grad():
        return simulate(model, batch_of(empty, size_factor=size))


@pytest.fixture(scope="module")
def linear() -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = linear_gaussian(scale=1.5)
        (layer,) = model.decoder.layers
        with torch.no_grad():  # dimensions that do alike: posteriors are correlated
            layer.weight.copy_(layer.weight @ layer.weight.new_tensor(MIXED))
        return model


def ratio_of(precision: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(np.diag(precision) * np.diag(np.linalg.inv(precision)))


def test_simulated_cells_have_the_models_moments(linear: VAE) -> None:
    z, batch = simulated(linear, N_CELLS)
    x = batch.x
    assert isinstance(x, Tensor)
    (layer,) = linear.decoder.layers
    w, sigma = layer.weight.detach(), linear.likelihood.scale.detach()
    left = x - layer.bias.detach() - z @ w.T
    assert (left.mean(0).abs() < 5 * sigma / N_CELLS**0.5).all()
    assert (left.square().mean(0) / sigma**2 - 1).abs().max() < 5 * (2 / N_CELLS) ** 0.5
    assert (z.mean(0).abs() < 5 / N_CELLS**0.5).all()


def test_exact_posteriors_are_calibrated(linear: VAE) -> None:
    z, batch = simulated(linear, N_CELLS)
    q = infer(linear, batch, "full")
    found = Residuals.of(q, z)
    n = z.numel()
    # r is standard normal in every dimension, each independent of the others.
    assert abs(found.whitened.square().mean() - 1) < 5 * (2 / n) ** 0.5
    covered = coverage(found.z_score, LEVELS).mean(1)
    error = (LEVELS * (1 - LEVELS) / N_CELLS).sqrt()
    assert ((covered - LEVELS[:, None]).abs() < 5 * error[:, None]).all()


def test_diagonal_posteriors_cover_less_as_predicted(linear: VAE) -> None:
    z, batch = simulated(linear, N_CELLS)
    assert isinstance(batch.x, Tensor)
    full, diagonal = (infer(linear, batch, family) for family in ("full", "diagonal"))
    _, precision = exact_posterior(linear, batch.x)
    ratio = ratio_of(precision.numpy())
    assert ratio.min() < 0.8  # dimensions go together, or there were nothing to see
    np.testing.assert_allclose(scale_ratio(full), np.tile(ratio, (N_CELLS, 1)), rtol=1e-6)
    np.testing.assert_allclose(scale_ratio(diagonal), 1.0)
    expected = 2 * norm.cdf(norm.ppf(0.5 + LEVELS.numpy() / 2)[:, None] * ratio) - 1
    predicted = diagonal_coverage(scale_ratio(full), LEVELS).mean(1)
    np.testing.assert_allclose(predicted, expected, rtol=1e-6)
    covered = coverage(Residuals.of(diagonal, z).z_score, LEVELS).mean(1).numpy()
    error = np.sqrt(expected * (1 - expected) / N_CELLS)
    assert (np.abs(covered - expected) < 5 * error).all()


# --- polished posteriors ------------------------------------------------------------------------


def wrong(q: Distribution, by: float) -> Distribution:
    assert q.full
    return Gaussian(q.mean + 0.1, by * q.scale_tril)


@pytest.mark.parametrize("by", [0.6, 1.0, 1.7])
def test_polish_finds_the_exact_covariance(linear: VAE, by: float) -> None:
    _, batch = simulated(linear, 50)
    assert isinstance(batch.x, Tensor)
    mean, precision = exact_posterior(linear, batch.x)
    exact = as_q(MultivariateNormal(mean, precision_matrix=precision.expand(50, -1, -1)))
    q = polish(linear, batch, wrong(exact, by), tolerance=1e-9)
    assert q.full
    # Stein's identity over points with the normal's second moments is exact for a quadratic; the
    # tolerance ends the steps.
    torch.testing.assert_close(q.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, atol=1e-4, rtol=0)
    lower = q.scale_tril
    torch.testing.assert_close(lower, lower.tril(), atol=0, rtol=0)
    assert (lower.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_polish_brings_counts_nearer_to_calibrated() -> None:
    model = model_of("negative_binomial", n_latent=4, n_vars=60, n_hidden=32, gain=1.0)
    z, batch = simulated(model, 1000, total=150.0)
    q = infer(model, batch, "full")
    better = infer(model, batch, "full", polish=True)
    # Each step raises the ELBO over its own points; over others by as much as they agree.
    gain = fixed_elbo(model, batch, better, 64) - fixed_elbo(model, batch, q, 64)
    assert gain.mean() > 0.05
    first, second = (Residuals.of(each, z) for each in (q, better))
    short, left = (LEVELS - coverage(r.z_score, LEVELS).mean((1, 2)) for r in (first, second))
    assert (short > 0.05).all()
    # Most of it: what is left is what no Gaussian has, tails and further modes.
    assert (left.abs() < 0.5 * short).all()
    excess = [float(r.whitened.square().mean()) - 1 for r in (first, second)]
    assert abs(excess[1]) < 0.5 * excess[0]


def test_moments_are_the_posteriors() -> None:
    """Of one latent dimension, by quadrature; many draws, so that their noise is small."""
    model = model_of("negative_binomial", n_latent=1, n_vars=5)
    _, batch = simulated(model, 40, total=6.0)
    assert not isinstance(batch.x, Tensor)
    q = match_moments(model, batch, infer(model, batch, "full", polish=True), n_samples=3000)
    # The evidence by quadrature needs the size factors that were simulated with.
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_joint = model.log_likelihood(batch, z[:, None].expand(-1, 40, -1)) - 0.5 * z.square()
    density = log_joint.softmax(0)
    mean = (density * z).sum(0)
    scale = (density * (z - mean).square()).sum(0).sqrt()
    # 3,000 quasi-random draws: a few hundredths of a standard deviation.
    assert ((q.mean[:, 0] - mean).abs() < 0.05 * scale).all()
    assert ((q.stddev[:, 0] / scale - 1).abs() < 0.05).all()


def test_moments_put_what_is_left_right() -> None:
    model = model_of("negative_binomial", n_latent=4, n_vars=60, n_hidden=32, gain=1.0)
    z, batch = simulated(model, 600, total=150.0)
    q = infer(model, batch, "full", polish="moments")
    r = Residuals.of(q, z)
    assert abs(r.whitened.square().mean() - 1) < 0.15
    error = (LEVELS * (1 - LEVELS) / (4 * 600)).sqrt()
    short = LEVELS - coverage(r.z_score, LEVELS).mean((1, 2))
    assert (short.abs() < 0.02 + 3 * error).all()  # the two points
    margins = infer(model, batch, "diagonal", polish="moments")
    assert not margins.full
    torch.testing.assert_close(margins.stddev, q.stddev)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_polished_cells_end_where_a_falling_rate_ends(covariance: str) -> None:
    """Adam with fresh draws: another rule, other points."""
    model = model_of("negative_binomial", n_latent=4, n_vars=60, n_hidden=32, gain=1.0)
    _, batch = simulated(model, 200, total=150.0)
    q = infer(model, batch, covariance, polish=True)
    truth = refine_gradient(model, batch, q, max_steps=300, n_samples=16, learning_rate=0.05)
    short = fixed_elbo(model, batch, truth, 256) - fixed_elbo(model, batch, q, 256)
    assert (short > 0.2).float().mean() < 0.05
    plain = infer(model, batch, covariance, max_steps=20)
    behind = fixed_elbo(model, batch, truth, 256) - fixed_elbo(model, batch, plain, 256)
    assert short.median() < 0.5 * behind.median()


def test_project_and_refine_polish() -> None:
    reference = small_fit(small_counts(), likelihood="nb", max_epochs=20)
    plain, polished = small_counts(seed=3), small_counts(seed=3)
    tl.project(plain, reference, polish=False)
    tl.project(polished, reference)
    again = tl.project(plain, reference, polish=True, copy=True)
    np.testing.assert_array_equal(polished.obsm["X_scuvae"], again.obsm["X_scuvae"])  # the default
    for adata in (plain, polished):
        tl.score(adata, n_samples=400)
    refined = plain.copy()
    tl.refine(refined, polish=True)
    tl.score(refined, n_samples=400)
    exact = plain.copy()
    tl.refine(exact, polish="moments", key_added="moments")
    tl.project(polished, reference, polish="moments", key_added="moments")
    for slot in ("moments", "moments_scale"):
        difference = exact.obsm[slot] - polished.obsm[slot]
        # Two estimates of one thing, from different proposals of 256 draws.
        assert np.median(np.abs(difference) / polished.obsm["moments_scale"]) < 0.1
    gain = polished.obs["scuvae_elbo"] - plain.obs["scuvae_elbo"]
    again = refined.obs["scuvae_elbo"] - plain.obs["scuvae_elbo"]
    for values in (gain, again):
        assert values.mean() > -3 * values.std() / len(values) ** 0.5
    with unchanged(plain), pytest.raises(ValueError, match="polish=True moves the encoder"):
        tl.project(plain, reference, amortized=True, polish=True)
    for verb in (lambda v: tl.project(plain, reference, polish=v), None):
        call = verb or (lambda v: tl.refine(plain, polish=v))
        with unchanged(plain), pytest.raises(ValueError, match="polish=1"):
            call(1)


# --- tl.calibration -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    return small_fit(
        small_data("gaussian"), likelihood="gaussian", n_layers=0, max_epochs=30, amortized="semi"
    )


def test_a_linear_fit_is_calibrated(fitted: AnnData) -> None:
    adata = fitted.copy()
    with unchanged(adata.obs, adata.obsm):
        assert tl.calibration(adata, n_cells=2000) is None
    found = adata.uns["scuvae_calibration"]
    table = found["coverage"]
    families = ["full", "diagonal", "encoder"]
    columns = [*families, *(f"{name}_se" for name in families), "diagonal_predicted"]
    assert sorted(table) == sorted(columns)
    assert table.index.tolist() == [0.5, 0.8, 0.95]
    assert list(found["pit"]) == families
    for name in families:
        u = found["pit"][name]
        assert u.dtype == np.float32
        assert u.shape == (2000, N_LATENT)
        # The same intervals, from float32.
        inside = [(np.abs(2 * u - 1) <= level).mean() for level in table.index]
        np.testing.assert_allclose(table[name], inside, atol=1e-3)
        by_dimension = np.stack([found["dimensions"][f"{name}_{v:g}"] for v in table.index])
        np.testing.assert_allclose(by_dimension.mean(1), table[name], rtol=1e-9)
        z = norm.ppf(u.astype(np.float64).clip(1e-7, 1 - 1e-7))
        if name != "encoder":  # whose tails lie beyond what float32 can tell
            np.testing.assert_allclose(found["residuals"]["z2"][name], (z**2).mean(), rtol=1e-2)
    assert (np.abs(table["full"] - table.index) < 5 * table["full_se"]).all()
    residuals = found["residuals"].loc["full"]
    assert abs(residuals["r2"] - 1) < 5 * (2 / (2000 * N_LATENT)) ** 0.5
    # Independent normals: the error over cells is that of 3 squares each.
    assert residuals["r2_se"] == pytest.approx((2 / (2000 * N_LATENT)) ** 0.5, rel=0.2)

    model = get.model(adata)
    _, precision = exact_posterior(model, torch.zeros(1, N_VARS))
    ratio = ratio_of(precision.double().numpy())
    np.testing.assert_allclose(found["scale_ratio"], np.tile(ratio, (2000, 1)), rtol=1e-3)
    expected = 2 * norm.cdf(norm.ppf(0.5 + table.index.to_numpy() / 2)[:, None] * ratio) - 1
    np.testing.assert_allclose(table["diagonal_predicted"], expected.mean(1), rtol=1e-3)
    assert (np.abs(table["diagonal"] - expected.mean(1)) < 5 * table["diagonal_se"]).all()


@pytest.mark.parametrize("amortized", SCHEMES)
@pytest.mark.parametrize("covariance", [None, "full", "diagonal"])
def test_families(amortized: bool | str, covariance: str | None) -> None:
    adata = small_fit(small_counts(), amortized=amortized, batch_key="batch", key_added="k")
    tl.calibration(adata, key="k", n_cells=5, covariance=covariance, levels=[0.9, 0.1, 0.9])
    found = adata.uns["k_calibration"]
    expected = ["full", "diagonal"] if covariance is None else [covariance]
    expected += [] if amortized is False else ["encoder"]
    assert list(found["pit"]) == list(found["residuals"].index) == expected
    assert ("scale_ratio" in found) == (covariance is None)
    assert ("diagonal_predicted" in found["coverage"]) == (covariance is None)
    assert found["coverage"].index.tolist() == [0.1, 0.9]
    assert found["params"] == {"n_cells": 5, "polish": "False"}


def test_fewer_genes_and_one_cell(fitted: AnnData) -> None:
    some = fitted[:, 5:].copy()
    tl.calibration(some, n_cells=1)
    assert "encoder" not in some.uns["scuvae_calibration"]["pit"]
    assert some.uns["scuvae_calibration"]["coverage"]["full_se"].isna().all()


@pytest.mark.parametrize(
    ("levels", "kind", "message"),
    [
        ((0.5, 1.0), ValueError, r"levels\[1\]=1.0"),
        ((0.0,), ValueError, r"levels\[0\]=0.0"),
        (("0.5",), TypeError, r"levels\[0\]='0.5'"),
        (0.5, TypeError, "levels=0.5"),
        ("0.5", TypeError, "levels='0.5'"),
        ((), TypeError, r"levels=\(\)"),
    ],
)
def test_levels(fitted: AnnData, levels: object, kind: type[Exception], message: str) -> None:
    with unchanged(fitted), pytest.raises(kind, match=message):
        tl.calibration(fitted, levels=levels)  # type: ignore[arg-type]
