"""What is wide is as wide as it should be: against closed forms, or exact draws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import SMALL, small_data
from scipy import stats

from scuvae import get, tl
from scuvae.inference.evaluation.annealed_importance_sampling import move
from scuvae.inference.evaluation.importance_sampling import Draws, ledger
from scuvae.inference.mapping.neighbour_residuals import Residuals
from scuvae.model.likelihoods.negative_binomial import NegativeBinomial

LINEAR = {**SMALL, "likelihood": "gaussian", "n_layers": 0, "n_latent": 2, "max_epochs": 5}


def linear_fit(**options: Any) -> AnnData:
    adata = small_data("gaussian")
    tl.fit(adata, **{**LINEAR, **options})
    return adata


def parts_of(adata: AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loadings, intercepts and noise of a linear Gaussian fit, by its own decoder."""
    model = get.model(adata)
    with torch.no_grad():
        n = adata.uns["scuvae"]["params"]["n_latent"]
        eta = model.decoder(torch.cat([torch.zeros(1, n), torch.eye(n)]))
        scale = model.likelihood.scale * torch.ones(adata.n_vars)
    b = eta[0].double().numpy()
    return (eta[1:].double().numpy() - b).T, b, scale.double().numpy()


def unpacked(packed: np.ndarray, n: int) -> np.ndarray:
    found = np.zeros((len(packed), n, n))
    rows, columns = np.tril_indices(n)
    found[:, rows, columns] = found[:, columns, rows] = packed
    return found


@pytest.mark.parametrize("kl_weight", [0.2, 1.0, 5.0])
def test_the_last_refinement_keeps_the_weight_of_the_kl(kl_weight: float) -> None:
    """E_q[ln p] − β KL is highest at Λ = I + WᵀW / (β σ²), for every cell."""
    adata = linear_fit(kl_weight=kl_weight, validation_fraction=0.2)
    w, b, scale = parts_of(adata)
    precision = np.eye(2) + (w.T / scale**2) @ w / kl_weight
    covariance = np.linalg.inv(precision)
    found = unpacked(adata.obsm["X_scuvae_covariance"], 2)
    # Of single precision, in a matrix of a few hundred.
    np.testing.assert_allclose(
        found, np.broadcast_to(covariance, found.shape), rtol=1e-3, atol=1e-6
    )
    mean = (adata.X - b) / scale**2 @ w @ covariance / kl_weight
    np.testing.assert_allclose(adata.obsm["X_scuvae"], mean, atol=2e-3)


def widened(adata: AnnData, scale: float) -> AnnData:
    """The same means, and q as wide as the scale in every direction."""
    n = adata.obsm["X_scuvae"].shape[1]
    adata.obsm["X_scuvae_scale"] = np.full_like(adata.obsm["X_scuvae_scale"], scale)
    rows, columns = np.tril_indices(n)
    adata.obsm["X_scuvae_covariance"][:] = scale**2 * (rows == columns)
    return adata


def test_samples_are_as_wide_as_q_and_the_noise() -> None:
    """Var[x] = W S Wᵀ + σ²: of 400 draws of 60 cells, a gene's is within 10 % (5 standard errors:
    5 √(2/24000) = 4.6 %, the draws of a cell being independent)."""
    adata = widened(linear_fit(), 2.0)
    w, b, scale = parts_of(adata)
    tl.sample(adata, n_samples=400)
    draws = np.stack([adata.layers[f"scuvae_sample_{i}"] for i in range(400)])
    expected = 4 * np.square(w).sum(1) + scale**2
    assert (expected > 1.5 * scale**2).mean() > 0.5, "q's width must matter, to be seen"
    np.testing.assert_allclose(draws.var(0, ddof=1).mean(0), expected, rtol=0.1)
    middle = draws.mean((0, 1)) - (adata.obsm["X_scuvae"].mean(0) @ w.T + b)
    assert np.abs(middle / np.sqrt(expected / 24_000)).max() < 5.5


def test_predictive_checks_know_the_spread_between_draws() -> None:
    """The scale of a gene's mean: √(Σ Var[x]) / n, with W S Wᵀ + σ² for every cell's variance."""
    adata = widened(linear_fit(), 2.0)
    w, _, scale = parts_of(adata)
    tl.predictive_check(adata, n_samples=256)
    table = adata.uns["scuvae_predictive_check"]
    expected = np.sqrt((4 * np.square(w).sum(1) + scale**2) / adata.n_obs)
    # Quasi-random draws give second moments to a few per cent.
    np.testing.assert_allclose(table["mean_predicted_scale"], expected, rtol=0.05)


def test_effective_sample_sizes_are_kishs() -> None:
    """(Σ w)² / Σ w², not the perplexity of the weights, which is larger."""
    weights = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    draws = Draws(torch.zeros(3, 2).double(), weights.log() - 700, torch.zeros(2).double())
    found = ledger(draws)["effective_sample_size"]
    np.testing.assert_allclose(found, [25 / 11, 3.0], rtol=1e-12)


def test_a_move_keeps_its_target() -> None:
    """Chains that start at N(0, s²) stay there. Leaps are long beside s, so that without the
    Metropolis test their variance would grow to s² / (1 − ε²/4s²), 1.8 times."""
    s, n = 0.3, 40_000
    generator = torch.Generator().manual_seed(0)
    u = s * torch.randn(n, 1, 1, generator=generator)

    def look(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = (0.5 * u.square() - 0.5 * (u / s).square()).sum(-1).double()
        return ratio, u - u / s**2

    ratio, slope = look(u)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(12):
            u, ratio, slope = move(look, u, ratio, slope, 1.0)
    # Five standard errors of a variance of independent chains: 5 √(2/40000) = 3.5 %.
    assert math.isclose(float(u.var()), s**2, rel_tol=0.035)
    assert abs(float(u.mean())) < 5 * s / math.sqrt(n)


def test_overdispersion_goes_with_the_square_of_a_factor() -> None:
    """A negative binomial of mean f μ has variance f μ + (f μ)²/θ."""
    mu, theta, factor = (
        torch.tensor([[2.0, 5.0]]),
        torch.tensor([0.5, 3.0]),
        torch.tensor([3.0, 0.2]),
    )
    cells = Residuals(torch.zeros(1, 1), mu, mu, mu + mu.square() / theta)
    found = cells.times(factor)
    np.testing.assert_allclose(found.expected, factor * mu)
    np.testing.assert_allclose(
        found.variance, factor * mu + (factor * mu).square() / theta, rtol=1e-6
    )


def test_scores_of_a_wide_q_are_those_of_its_draws() -> None:
    """The ELBO under a linear Gaussian: E_q[ln p] has a closed form in the covariance."""
    adata = widened(linear_fit(), 0.7)
    w, b, scale = parts_of(adata)
    tl.score(adata, n_samples=2000)
    residual = adata.X - adata.obsm["X_scuvae"] @ w.T - b
    expected = -0.5 * (
        np.square(residual / scale).sum(1)
        + 0.49 * np.square(w / scale[:, None]).sum()
        + np.log(2 * np.pi * scale**2).sum()
    )
    z = (adata.obs["scuvae_reconstruction"] - expected) / adata.obs["scuvae_elbo_se"]
    assert np.abs(z).max() < 5
    mean = adata.obsm["X_scuvae"]
    kl = 0.5 * (2 * 0.49 + np.square(mean).sum(1) - 2 - 2 * math.log(0.49))
    np.testing.assert_allclose(adata.obs["scuvae_kl"], kl, rtol=1e-4, atol=1e-4)


def test_moments_of_a_negative_binomial_are_scipys() -> None:
    """Variance and chance of a zero, by the parametrisation n = θ, p = θ / (θ + μ)."""
    likelihood = NegativeBinomial(3)
    theta = np.array([0.3, 2.0, 50.0])
    with torch.no_grad():
        likelihood.log_theta.copy_(torch.tensor(theta).log())
        eta = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]])
        found = likelihood.moments(eta, torch.tensor([30.0, 5.0]))
    mu = eta.double().softmax(-1).numpy() * np.array([[30.0], [5.0]])
    truth = stats.nbinom(theta, theta / (theta + mu))
    np.testing.assert_allclose(found.mean, truth.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.variance, truth.var(), rtol=1e-5)
    np.testing.assert_allclose(found.zero, truth.pmf(0), rtol=1e-5)
