"""KL, ELBO and the importance-weighted bound against closed forms and quadrature."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_models import (
    UNIQUE,
    as_q,
    batch_of,
    cells_of,
    exact_evidence,
    exact_posterior,
    kl_between,
    kl_to_prior,
    linear_gaussian,
    model_of,
    quadrature,
)
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae.batches import Batch
from scuvae.distributions.gaussian import COVARIANCES, Gaussian, n_scale_parameters, pack, unpack
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.evaluation.importance_sampling import draw_weights, log_mean
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.refine import fixed_elbo
from scuvae.model import VAE

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def random_q(n_cells: int, n_latent: int, covariance: str) -> Distribution:
    raw = torch.randn(n_cells, n_scale_parameters(n_latent, covariance), dtype=torch.float64)
    return Gaussian.of(torch.randn(n_cells, n_latent, dtype=torch.float64), raw)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("n_latent", [1, 2, 5])
def test_kl_is_torchs(n_latent: int, covariance: str) -> None:
    q = random_q(6, n_latent, covariance)
    prior = Gaussian(torch.zeros_like(q.mean), torch.ones_like(q.mean)).as_family(q.family)
    expected = torch.distributions.kl_divergence(q.as_torch(), prior.as_torch())
    torch.testing.assert_close(kl_to_prior(q), expected, rtol=1e-12, atol=1e-12)  # roundings


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_is_the_expected_log_ratio(covariance: str) -> None:
    q = random_q(1, 2, covariance)
    # Gauss–Hermite is exact for the log-ratio, which is quadratic in z
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    grid = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    weight = torch.tensor(np.outer(weights, weights).ravel() / (2 * math.pi))
    z = q.mean + grid @ torch.linalg.cholesky(covariance_of(q)[0]).T
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    expected = weight @ (q.as_torch().log_prob(z) - log_prior)
    assert kl_to_prior(q).item() == pytest.approx(expected.item(), rel=1e-10)  # roundings


def covariance_of(q: Distribution) -> Tensor:
    return q.as_torch().covariance_matrix if q.full else torch.diag_embed(q.variance)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_q_is_torchs(covariance: str) -> None:
    """Density, moments, precision, entropy, families, against torch's own distributions."""
    q = random_q(6, 3, covariance)
    truth, z, points = q.as_torch(), torch.randn(4, 6, 3).double(), torch.randn(4, 6, 3).double()
    close = {"rtol": 1e-9, "atol": 1e-10}  # roundings of solves
    for found, expected in [
        (q.log_prob(z), truth.log_prob(z)),
        (q.log_prob_of_points(points), truth.log_prob(q.draw(points))),
        (q.whiten(q.draw(points)), points),
        (q.stddev, truth.stddev),
        (q.entropy(), truth.entropy()),
        (q.precision_matrix @ q.covariance_matrix, torch.eye(3).double().expand(6, -1, -1)),
        (q.covariance_matrix, covariance_of(q)),
        (q.draw(points) - q.mean, (q.scale_tril @ points.unsqueeze(-1)).squeeze(-1)),
        (q.as_family("diagonal").stddev, truth.stddev),
        (q.as_family("full").covariance_matrix, covariance_of(q)),
        (q[torch.tensor([4, 1])].log_prob(z[:, [4, 1]]), truth.log_prob(z)[:, [4, 1]]),
        (q.moved(z[0]).log_prob(z + z[0]), truth.log_prob(z)),
    ]:
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_scales_survive_their_parametrisation(covariance: str) -> None:
    q = random_q(6, 4, covariance)
    again = Gaussian.of(q.mean, q.raw)
    assert type(again) is type(q)
    # softplus and its inverse, in float64
    torch.testing.assert_close(covariance_of(again), covariance_of(q), rtol=1e-10, atol=1e-12)
    packed = torch.randn(3, 10)
    torch.testing.assert_close(pack(unpack(packed, 4)), packed, rtol=0, atol=0)  # a reordering
    rows = [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [4.0, 5.0, 6.0]]
    assert unpack(torch.arange(1.0, 7.0), 3).tolist() == rows


def test_tiny_and_huge_scales_stay_finite() -> None:
    raw = torch.tensor([[-1e4, -50.0, 50.0, 1e4]])
    q = Gaussian.of(torch.zeros(1, 4), raw)
    assert kl_to_prior(q).isfinite().all()
    assert q.raw.isfinite().all()


@pytest.mark.parametrize("n_draws", [1, 7, 23])
@pytest.mark.parametrize("name", UNIQUE)
def test_bound_is_its_definition(name: str, n_draws: int) -> None:
    model = model_of(name)
    x = cells_of(model, 5)
    batch, q = batch_of(x), random_q(5, 2, "full")
    torch.manual_seed(3)
    found, _ = log_mean(draw_weights(model, batch, [q], n_draws)[0].log_weight)
    torch.manual_seed(3)
    sizes = [10] * (n_draws // 10) + ([n_draws % 10] if n_draws % 10 else [])
    noise = torch.cat([torch.randn(n, 5, 2, dtype=torch.float64) for n in sizes])
    z = q.mean + (q.scale_tril @ noise[..., None])[..., 0]
    log_prior = -0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    with torch.no_grad():
        log_p = model.likelihood.log_prob(x, model.decoder(z), x.sum(1))
    expected = (log_p + log_prior - q.log_prob(z)).exp().mean(0).log()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # roundings


def test_exact_posterior_has_no_variance() -> None:
    """Every single draw from the exact posterior weighs the evidence."""
    model = linear_gaussian()
    x = cells_of(model, 8)
    mean, precision = exact_posterior(model, x)
    q = as_q(MultivariateNormal(mean, precision_matrix=precision))
    evidence = exact_evidence(model, x)
    for _ in range(5):
        found, _ = log_mean(draw_weights(model, batch_of(x), [q], 1)[0].log_weight)
        torch.testing.assert_close(found, evidence, rtol=1e-10, atol=1e-9)  # roundings


def sampled_elbo(model: VAE, batch: Batch, q: Distribution, n: int = 4000) -> tuple[Tensor, Tensor]:
    """ELBO by plain draws, and its standard error."""
    with torch.no_grad():
        draws = model.log_likelihood(batch, q.sample((n,)))
    return draws.mean(0) - kl_to_prior(q), draws.std(0) / math.sqrt(n)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("n_samples", [1, 4])
def test_elbo_is_evidence_less_kl_to_the_posterior(n_samples: int, covariance: str) -> None:
    model = linear_gaussian(scale=1.5)
    x = cells_of(model, 3)
    batch = batch_of(x)
    mean, precision = exact_posterior(model, x)
    posterior = as_q(MultivariateNormal(mean, precision_matrix=precision))
    q = Gaussian.of(mean + 0.1, raw_of(3, 3, covariance))
    full = MultivariateNormal(q.mean, covariance_of(q))
    expected = exact_evidence(model, x) - kl_between(full, posterior)
    with torch.no_grad():
        runs = [elbo(model, batch, q, n_samples) for _ in range(2000 // n_samples)]
    values = torch.stack([run.elbo for run in runs])
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() < 5 * error).all()  # standard errors
    for run in runs[:3]:
        assert run.elbo.shape == (3,)
        torch.testing.assert_close(run.kl, kl_to_prior(q))


def raw_of(n_cells: int, n_latent: int, covariance: str) -> Tensor:
    return torch.full((n_cells, n_scale_parameters(n_latent, covariance)), -1.0).double()


def test_elbo_at_the_exact_posterior_is_the_evidence() -> None:
    model = linear_gaussian()
    x = cells_of(model, 8)
    mean, precision = exact_posterior(model, x)
    q = as_q(MultivariateNormal(mean, precision_matrix=precision))
    found, error = sampled_elbo(model, batch_of(x), q)
    assert ((found - exact_evidence(model, x)).abs() < 5 * error).all()  # standard errors


def test_elbo_has_the_gradient_of_its_expectation() -> None:
    """Linear model: ∂ELBO/∂m = Wᵀ(x − W m − b)/σ² − m, whatever the draws average to."""
    model = linear_gaussian()
    x = cells_of(model, 4)
    mean = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q = Gaussian.of(mean, raw_of(4, 3, "diagonal"))
    target, precision = exact_posterior(model, x)
    slopes = []
    for _ in range(50):
        value = elbo(model, batch_of(x), q, 8).elbo.sum()
        slopes.append(torch.autograd.grad(value, mean, retain_graph=True)[0])
    slope = torch.stack(slopes)
    expected = (target - mean.detach()) @ precision
    error = slope.std(0) / math.sqrt(len(slope))
    assert ((slope.mean(0) - expected).abs() < 5 * error).all()  # standard errors


def adaptive_gauss_hermite(model: VAE, x: Tensor, q: Distribution, n_nodes: int = 40) -> Tensor:
    """log p(x) with one latent dimension: nodes laid by each cell's q."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    node = torch.tensor(nodes)[:, None, None]
    z = q.mean + q.stddev * node
    log_weight = torch.tensor(np.log(weights))[:, None] + 0.5 * node[..., 0].square()
    with torch.no_grad():
        log_joint = model.log_likelihood(batch_of(x), z) - 0.5 * z.square().sum(-1)
    constant = q.stddev.log().sum(-1) - 0.5 * math.log(2 * math.pi)
    return (log_weight + log_joint).logsumexp(0) + constant


@pytest.mark.parametrize("n_layers", [0, 1])
@pytest.mark.parametrize("name", UNIQUE)
def test_one_latent_dimension_against_quadrature(name: str, n_layers: int) -> None:
    model = model_of(name, n_latent=1, n_layers=n_layers)
    x = cells_of(model, 5)
    batch = batch_of(x)
    evidence, q = quadrature(model, x)
    if n_layers == 0:
        # a smooth integrand: 40 adaptive nodes reach this
        torch.testing.assert_close(adaptive_gauss_hermite(model, x, q), evidence, rtol=0, atol=1e-5)
    # wider than the posterior, so that the weights' variance is finite
    wide = Gaussian(q.mean, 1.5 * q.stddev)
    n_draws = 2000
    log_weight = draw_weights(model, batch, [wide], n_draws)[0].log_weight
    spread = (log_weight - evidence).exp().std(0) / math.sqrt(n_draws)
    bound, _ = log_mean(log_weight)
    assert ((bound - evidence).exp() - 1).abs().lt(5 * spread).all()  # standard errors

    value, error = sampled_elbo(model, batch, q, 2000)
    assert (value < evidence + 5 * error).all()  # standard errors
    assert (value > evidence - 3).all()  # q has the posterior's moments: nearly as good as it


@pytest.mark.parametrize("name", UNIQUE)
def test_bound_rises_with_the_number_of_draws(name: str) -> None:
    """The same draws in groups of 1, 4 and 16."""
    model = model_of(name)
    batch = batch_of(cells_of(model, 10))
    q = Gaussian.of(torch.zeros(10, 2).double(), torch.zeros(10, 2).double())
    n_runs = 6
    log_weight = draw_weights(model, batch, [q], n_runs * 16)[0].log_weight
    means = []
    for size in (1, 4, 16):
        bounds = torch.stack([log_mean(group)[0] for group in log_weight.split(size)])
        means.append(bounds.view(n_runs, -1, 10).mean(1).flatten())
    for fewer, more in pairwise(means):
        difference = more - fewer
        # 5 standard errors over pairs of runs and cells
        assert difference.mean() > 5 * difference.std() / math.sqrt(len(difference))


def test_fixed_points_are_standard_normal() -> None:
    like = torch.zeros(1, 3, dtype=torch.float64)
    points = normal_points(512, like).squeeze(1)
    # antithetic pairs: odd moments vanish; quasi-random: others to about 1/n
    torch.testing.assert_close(points.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(points.T @ points / 512, torch.eye(3).double(), rtol=0, atol=0.03)
    assert not torch.equal(points, normal_points(512, like, seed=1).squeeze(1))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_fixed_elbo_is_the_elbo(covariance: str) -> None:
    model = model_of("negative_binomial")
    batch = batch_of(cells_of(model, 6))
    q = Gaussian.of(torch.randn(6, 2).double(), raw_of(6, 2, covariance))
    expected, error = sampled_elbo(model, batch, q)
    found = fixed_elbo(model, batch, q, n_samples=4096)
    # 5 standard errors of the plain draws; those of the fixed ones are smaller
    assert ((found - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("n_latent", [1, 2, 3, 10])
def test_fixed_elbo_of_a_linear_model_is_its_evidence(n_latent: int) -> None:
    """The draws are the same for every cell: what they err by does not average out."""
    model = linear_gaussian(n_latent=n_latent)
    x = cells_of(model, 8)
    mean, precision = exact_posterior(model, x)
    q = as_q(MultivariateNormal(mean, precision_matrix=precision))
    # nats: with draws of unit variance only the prior's share of q is left
    torch.testing.assert_close(
        fixed_elbo(model, batch_of(x), q), exact_evidence(model, x), rtol=0, atol=0.1
    )
