"""Likelihoods against scipy, multiple precision, finite differences and their own definitions."""

import copy
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy import sparse as sp
from scipy import special, stats
from small_models import COUNTS, EPS, UNIQUE, batch_of, likelihood_of, model_of
from torch import Tensor

from scuvae.batches import SparseRows
from scuvae.batches.sources.registry import SOURCES
from scuvae.model import VAE
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.likelihoods.negative_binomial import log_prob as negative_binomial_log_prob
from scuvae.model.likelihoods.rising_factorial import log_rising_factorial
from scuvae.model.likelihoods.support import SUPPORTS

pytestmark = pytest.mark.usefixtures("fixed_random_state")

THETAS = [1e-3, 0.1, 1.0, 30.0, 1e4, 1e6, 1e8]
VALUES = [0, 1, 2, 5, 50, 1000, 10**6]
MEANS = [1e-3, 0.3, 4.0, 60.0, 1e4]
DTYPES = [torch.float32, torch.float64]
DROPOUT = 0.2


def with_dispersion(name: str, theta: float, dtype: torch.dtype) -> Likelihood:
    """A one-gene likelihood with these parameters, where it has them."""
    likelihood = LIKELIHOODS[name](1).to(dtype)
    with torch.no_grad():
        if hasattr(likelihood, "log_theta"):
            likelihood.log_theta.fill_(math.log(theta))
        if hasattr(likelihood, "logit_dropout"):
            likelihood.logit_dropout.fill_(math.log(DROPOUT / (1 - DROPOUT)))
    return likelihood


def exact_nb(x: float, mu: float, theta: float) -> mpmath.mpf:
    """log NB in 60 digits, by the formula as it is written."""
    with mpmath.workdps(60):
        x, mu, theta = mpmath.mpf(int(x)), mpmath.mpf(mu), mpmath.mpf(theta)
        return (
            mpmath.loggamma(x + theta)
            - mpmath.loggamma(theta)
            - mpmath.loggamma(x + 1)
            + theta * mpmath.log(theta / (theta + mu))
            + x * mpmath.log(mu / (theta + mu))
        )


def exact_zinb(x: float, mu: float, theta: float) -> float:
    with mpmath.workdps(60):
        nb = exact_nb(x, mu, theta)
        if x == 0:
            return float(mpmath.log(DROPOUT + (1 - DROPOUT) * mpmath.exp(nb)))
        return float(mpmath.log(1 - DROPOUT) + nb)


EXACT: dict[str, Callable[[float, float, float], float]] = {
    "poisson": lambda x, mu, theta: float(stats.poisson.logpmf(x, mu)),
    "negative_binomial": lambda x, mu, theta: float(exact_nb(x, mu, theta)),
    "zero_inflated_negative_binomial": exact_zinb,
}


def series(theta: float) -> float:
    """What is left of Stirling's series after three terms at θ + 4: its fourth."""
    return 1 / (1680 * (theta + 4) ** 7)


def roundings(x: np.ndarray, mu: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Some roundings of the largest terms of a log-likelihood: no formula does better."""
    size = x * (1 + np.abs(np.log(mu))) + mu + np.array([math.lgamma(v + 1) for v in x]) + 10
    return 8 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", EXACT)
def test_log_prob_of_counts_is_exact(name: str, theta: float, dtype: torch.dtype) -> None:
    x, mu = (grid.ravel() for grid in np.meshgrid(VALUES, MEANS))
    # With one gene the mean is the size factor, whatever η.
    size = torch.tensor(mu, dtype=dtype)
    found = with_dispersion(name, theta, dtype).log_prob(
        torch.tensor(x, dtype=dtype)[:, None], torch.full((len(x), 1), 0.7, dtype=dtype), size
    )
    # the truth at the parameters as they were rounded
    theta = math.exp(torch.tensor(math.log(theta), dtype=dtype).item())
    exact = np.array([EXACT[name](a, b, theta) for a, b in zip(x, size.tolist(), strict=True)])
    error = np.abs(found.detach().double().numpy() - exact)
    allowed = roundings(x, mu, dtype) + series(theta)
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("theta", [1e-3, 0.1, 1.0, 30.0])
def test_negative_binomial_is_scipys(theta: float) -> None:
    x = np.arange(200)
    found = with_dispersion("nb", theta, torch.float64).log_prob(
        torch.tensor(x, dtype=torch.float64)[:, None],
        torch.zeros(200, 1, dtype=torch.float64),
        torch.full((200,), 7.0, dtype=torch.float64),
    )
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + 7.0))
    # scipy's own lgamma difference is good to about 1e-10
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9, atol=series(theta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_gene", [False, True])
def test_gaussian_is_scipys(per_gene: bool, dtype: torch.dtype) -> None:
    likelihood = LIKELIHOODS["gaussian"](6, per_gene=per_gene).to(dtype)
    torch.nn.init.normal_(likelihood.scale_raw)
    x, eta = torch.randn(4, 6, dtype=dtype), torch.randn(3, 4, 6, dtype=dtype)
    scale = np.log1p(np.exp(likelihood.scale_raw.detach().double().numpy()))
    expected = stats.norm.logpdf(x.numpy(), eta.numpy(), scale).sum(-1)
    # some roundings of terms of order 10
    tolerance = 100 * torch.finfo(dtype).eps
    np.testing.assert_allclose(likelihood.log_prob(x, eta).detach(), expected, rtol=tolerance)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bernoulli_is_scipys(dtype: torch.dtype, sparse: bool) -> None:
    x = (torch.randn(4, 6) > 0.5).to(dtype)
    # some roundings of terms of order 10; scipy's 1 − p has few digits beyond
    close = {"rtol": 1e5 * torch.finfo(dtype).eps if dtype == torch.float64 else 1e-5}
    eta = (5 * torch.randn(3, 4, 6, dtype=dtype)).clamp(-10, 10)
    likelihood = LIKELIHOODS["bernoulli"](6)
    found = likelihood.log_prob(SparseRows.from_dense(x) if sparse else x, eta)
    p = special.expit(eta.double().numpy())
    np.testing.assert_allclose(found, stats.bernoulli.logpmf(x.numpy(), p).sum(-1), **close)
    np.testing.assert_allclose(likelihood.mean(eta), p, **close)
    moments = likelihood.moments(eta)
    torch.testing.assert_close(moments.mean + moments.zero, torch.ones_like(eta))


def test_far_logits_of_a_bernoulli_stay_finite() -> None:
    eta = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    for x, nats in (([[1.0], [0.0]], 0.0), ([[0.0], [1.0]], -200.0)):
        value = LIKELIHOODS["bernoulli"](1).log_prob(torch.tensor(x), eta)
        assert value.tolist() == [nats, nats]
        (gradient,) = torch.autograd.grad(value.sum(), eta)
        assert gradient.isfinite().all()


def test_the_stabilised_coordinate_of_a_bernoulli_is_its_definitions() -> None:
    """dv/dη = (dp/dη) / √(p (1 − p)) = √(p (1 − p))."""
    eta = torch.linspace(-8, 8, 41, dtype=torch.float64)[:, None].requires_grad_()
    likelihood = LIKELIHOODS["bernoulli"](1)
    (slope,) = torch.autograd.grad(likelihood.stabilised(eta).sum(), eta)
    torch.testing.assert_close(slope, likelihood.moments(eta).variance.sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_binomial_tends_to_poisson(dtype: torch.dtype) -> None:
    x, mu = (grid.ravel() for grid in np.meshgrid([0, 1, 2, 5, 50], MEANS[:4]))
    found = with_dispersion("nb", 1e8, dtype).log_prob(
        torch.tensor(x, dtype=dtype)[:, None],
        torch.zeros(len(x), 1, dtype=dtype),
        torch.tensor(mu, dtype=dtype),
    )
    difference = np.abs(found.detach().double().numpy() - stats.poisson.logpmf(x, mu))
    # they differ by ((x − μ)² − x) / 2θ to first order
    assert (difference <= ((x - mu) ** 2 + x) / 1e8 + roundings(x, mu, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", THETAS)
def test_gradient_in_the_dispersion_is_exact(theta: float, dtype: torch.dtype) -> None:
    """θ ∂/∂θ log NB = θ (ψ(x+θ) − ψ(θ) + ln(θ/(θ+μ)) + (μ−x)/(θ+μ)), in 60 digits."""
    for x in VALUES:
        for mu in MEANS:
            likelihood = with_dispersion("nb", theta, dtype)
            size = torch.tensor([mu], dtype=dtype)
            likelihood.log_prob(
                torch.tensor([[float(x)]], dtype=dtype), torch.zeros(1, 1, dtype=dtype), size
            ).backward()
            with mpmath.workdps(60):
                t = mpmath.exp(mpmath.mpf(likelihood.log_theta.item()))
                m = mpmath.mpf(size.item())
                exact = t * (
                    mpmath.digamma(x + t)
                    - mpmath.digamma(t)
                    + mpmath.log(t / (t + m))
                    + (m - x) / (t + m)
                )
            # some roundings of the two rates, x and μ, that cancel where θ is large
            tolerance = 16 * torch.finfo(dtype).eps * (x + mu + 1)
            tolerance += 7 * theta / (theta + 4) * series(theta)  # the series's remainder
            assert abs(likelihood.log_theta.grad.item() - float(exact)) <= tolerance, (x, mu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", UNIQUE)
def test_gradients_are_those_of_finite_differences(name: str, masked: bool) -> None:
    likelihood = likelihood_of(name, 5)
    x = torch.poisson(torch.full((3, 5), 1.5, dtype=torch.float64))
    x[0] = 0.0
    size = torch.tensor([3.0, 8.0, 40.0], dtype=torch.float64)
    observed = torch.tensor([True, False, True, True, False]) if masked else None
    eta = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda eta, *_: likelihood.log_prob(x, eta, size, observed),
        (eta, *likelihood.parameters()),
        # float64 central differences: 1e-6² of third derivatives, and rounding / 1e-6
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", UNIQUE)
def test_float32_gradients_are_those_of_float64(name: str) -> None:
    likelihood = likelihood_of(name, 30)
    x = torch.poisson(torch.full((8, 30), 1.0, dtype=torch.float64))
    eta = torch.randn(8, 30, dtype=torch.float64)
    gradients = {}
    for dtype in DTYPES:
        copied = LIKELIHOODS[name](30).to(dtype)
        copied.load_state_dict(likelihood.state_dict())
        leaf = eta.to(dtype).requires_grad_()
        copied.log_prob(x.to(dtype), leaf).sum().backward()
        gradients[dtype] = [leaf.grad, *(p.grad for p in copied.parameters())]
    for single, double in zip(*gradients.values(), strict=True):
        # roundings of sums over cells or genes of terms of order 10
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=300 * EPS)


def scores(likelihood: Likelihood, x: Tensor, mu: Tensor) -> Tensor:
    """∂/∂log μ of counts, else ∂/∂η, as in the table."""
    if likelihood.name == "bernoulli":
        return x - mu
    if likelihood.name == "gaussian":
        return (x - mu) / likelihood.scale**2
    if likelihood.name == "poisson":
        return x - mu
    theta = likelihood.log_theta.exp()
    nb = theta * (x - mu) / (theta + mu)
    if likelihood.name == "negative_binomial":
        return nb
    dropped = likelihood.logit_dropout.sigmoid()
    zero = (theta / (theta + mu)) ** theta
    kept = torch.where(x > 0, 1.0, (1 - dropped) * zero / (dropped + (1 - dropped) * zero))
    return kept * nb


def weights(likelihood: Likelihood, x: Tensor, mu: Tensor) -> Tensor:
    """Fisher weights, as in the table."""
    if likelihood.name == "bernoulli":
        return mu * (1 - mu)
    if likelihood.name == "gaussian":
        return (1 / likelihood.scale**2).expand_as(mu)
    if likelihood.name == "poisson":
        return mu
    theta = likelihood.log_theta.exp()
    nb = mu * theta / (mu + theta)
    if likelihood.name == "negative_binomial":
        return nb
    dropped = likelihood.logit_dropout.sigmoid()
    zero = (theta / (theta + mu)) ** theta
    return nb * torch.where(x > 0, 1.0, (1 - dropped) * zero / (dropped + (1 - dropped) * zero))


TABLE = ["bernoulli", "gaussian", "poisson", "negative_binomial", "zero_inflated_negative_binomial"]


@pytest.mark.parametrize("name", TABLE)
def test_score_and_fisher_weight_are_the_tables(name: str) -> None:
    likelihood = likelihood_of(name, 7)
    x = torch.poisson(torch.full((6, 7), 1.5, dtype=torch.float64))
    size = torch.linspace(1.0, 50.0, 6, dtype=torch.float64)
    eta = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    pi = eta.detach().softmax(-1)
    softmax = likelihood.link == "softmax"
    mu = size[:, None] * pi if softmax else eta.detach()
    if likelihood.link == "logit":
        mu, x = mu.sigmoid(), (x > 0).double()
    with torch.no_grad():
        score, weight = scores(likelihood, x, mu), weights(likelihood, x, mu)
    # the softmax takes its share of the scores' sum
    expected = score - pi * score.sum(-1, keepdim=True) if softmax else score
    (found,) = torch.autograd.grad(likelihood.log_prob(x, eta, size).sum(), eta)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # float64 roundings

    found_weight, centre = likelihood.fisher(x, eta, size)
    torch.testing.assert_close(found_weight, weight, rtol=1e-10, atol=1e-10)  # the same
    if softmax:
        torch.testing.assert_close(centre, pi, rtol=1e-12, atol=0.0)  # the same
    else:
        assert centre is None


@pytest.mark.parametrize("theta", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("mu", [0.02, 1.0, 12.0])
@pytest.mark.parametrize("name", ["poisson", "negative_binomial"])
def test_fisher_weight_is_the_expected_squared_score(name: str, mu: float, theta: float) -> None:
    likelihood = with_dispersion(name, theta, torch.float64)
    x = np.arange(20_000)
    if name == "poisson":
        probability, score = stats.poisson.pmf(x, mu), x - mu
    else:
        probability = stats.nbinom.pmf(x, theta, theta / (theta + mu))
        score = theta * (x - mu) / (theta + mu)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    weight, _ = likelihood.fisher(zero, zero, torch.tensor([mu], dtype=torch.float64))
    # summed to where the tail is below 1e-9
    assert weight.item() == pytest.approx((probability * score**2).sum(), rel=1e-8)


def test_gaussian_fisher_weight_is_the_expected_squared_score() -> None:
    likelihood = likelihood_of("gaussian", 1)
    scale = likelihood.scale.item()
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(5)
    score = nodes * scale / scale**2
    expected = (node_weights * score**2).sum() / math.sqrt(2 * math.pi)
    weight, _ = likelihood.fisher(*torch.zeros(2, 1, 1, dtype=torch.float64))
    assert weight.item() == pytest.approx(expected, rel=1e-12)  # the quadrature is exact


@pytest.mark.parametrize("name", UNIQUE)
def test_probabilities_sum_to_one_and_have_the_moments(name: str) -> None:
    likelihood = likelihood_of(name, 1)
    if likelihood.support != "real":
        n_values = 2 if likelihood.support == "binary" else 4000
        x, step = torch.arange(n_values, dtype=torch.float64), 1.0
    else:
        x = torch.linspace(-40, 40, 8001, dtype=torch.float64)
        step = float(x[1] - x[0])
    eta = torch.full((len(x), 1), 1.3, dtype=torch.float64)
    size = torch.full((len(x),), 5.0, dtype=torch.float64)
    with torch.no_grad():
        probability = step * likelihood.log_prob(x[:, None], eta, size).exp()
        mean = likelihood.mean(eta[:1], size[:1]).item()
        moments = likelihood.moments(eta[:1], size[:1])
    # tails cut below 1e-9; the trapezoidal rule is exact to rounding on a Gaussian
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-8)
    assert (probability * x).sum().item() == pytest.approx(mean, rel=1e-7)
    assert moments.mean.item() == pytest.approx(mean, rel=1e-12)
    variance = (probability * (x - mean).square()).sum().item()
    assert variance == pytest.approx(moments.variance.item(), rel=1e-6)
    zero = 0.0 if likelihood.support == "real" else probability[0].item()
    assert zero == pytest.approx(moments.zero.item(), rel=1e-9)


@pytest.mark.parametrize("name", UNIQUE)
def test_draws_follow_the_likelihood(name: str) -> None:
    """Draws have the mean of mean(), and log_prob's derivatives average to zero over them."""
    n_draws = 20_000
    likelihood = likelihood_of(name, 3, spread=0.4)
    eta = torch.tensor([[0.3, -0.5, 1.0]], dtype=torch.float64).repeat(n_draws, 1)
    size = torch.full((n_draws,), 9.0, dtype=torch.float64)
    with torch.no_grad():
        x = likelihood.sample(eta, size)
        mean = likelihood.mean(eta[:1], size[:1])[0]
    assert x.shape == eta.shape
    for outside in SUPPORTS[likelihood.support].outside:
        assert not outside(x.numpy()).any()
    error = x.std(0) / math.sqrt(n_draws)
    assert ((x.mean(0) - mean).abs() < 5 * error).all()  # 5 standard errors

    # A copy of the parameters for every draw would be their per-draw score; blocks do as well.
    blocks = []
    for part in torch.arange(n_draws).split(500):
        leaf = eta[:1].clone().requires_grad_()
        log_prob = likelihood.log_prob(x[part], leaf.expand(len(part), -1), size[part])
        gradient = torch.autograd.grad(log_prob.mean(), [leaf, *likelihood.parameters()])
        blocks.append(torch.cat([g.flatten() for g in gradient]))
    score = torch.stack(blocks)
    error = score.std(0) / math.sqrt(len(blocks))
    assert (score.mean(0).abs() < 5 * error + 1e-12).all()  # 5 standard errors


@pytest.mark.parametrize("name", COUNTS)
def test_draws_have_the_likelihoods_probabilities(name: str) -> None:
    n_draws = 20_000
    likelihood = likelihood_of(name, 1, spread=0.4)
    zero = torch.zeros(n_draws, 1, dtype=torch.float64)
    size = torch.full((n_draws,), 1.5, dtype=torch.float64)
    with torch.no_grad():
        x = likelihood.sample(zero, size).flatten()
        for value in range(4):
            one = torch.full((1, 1), float(value), dtype=torch.float64)
            p = likelihood.log_prob(one, zero[:1], size[:1]).exp().item()
            error = math.sqrt(p * (1 - p) / n_draws)
            assert abs((x == value).double().mean().item() - p) < 5 * error  # standard errors


@pytest.mark.parametrize("name", UNIQUE)
def test_a_gene_mask_is_the_model_of_those_genes_alone(name: str) -> None:
    likelihood = likelihood_of(name, 8)
    observed = torch.tensor([True, False, True, True, False, True, True, False])
    alone = LIKELIHOODS[name](5).double()
    alone.load_state_dict(
        {
            key: value[observed] if len(value) == 8 else value
            for key, value in likelihood.state_dict().items()
        }
    )
    x = torch.poisson(torch.full((4, 8), 2.0, dtype=torch.float64))
    eta = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    part = x[:, observed], eta[..., observed]
    close = {"rtol": 1e-12, "atol": 1e-12}  # the same sums in another order

    found = likelihood.log_prob(x, eta, None, observed)
    torch.testing.assert_close(found, alone.log_prob(*part, x[:, observed].sum(1)), **close)
    size = torch.tensor([1.0, 5.0, 9.0, 30.0], dtype=torch.float64)
    found = likelihood.log_prob(x, eta, size, observed)
    torch.testing.assert_close(found, alone.log_prob(*part, size), **close)

    (gradient,) = torch.autograd.grad(found.sum(), eta)
    assert (gradient[..., ~observed] == 0).all()
    found_weight, found_centre = likelihood.fisher(x, eta, size, observed)
    weight, centre = alone.fisher(*part, size)
    torch.testing.assert_close(found_weight[..., observed], weight, **close)
    assert (found_weight[..., ~observed] == 0).all()
    if likelihood.link == "softmax":
        torch.testing.assert_close(found_centre[..., observed], centre, **close)
        assert (found_centre[..., ~observed] == 0).all()
    mean = likelihood.mean(eta, size, observed)
    torch.testing.assert_close(mean[..., observed], alone.mean(eta[..., observed], size), **close)
    assert likelihood.link != "softmax" or (mean[..., ~observed] == 0).all()


def test_poisson_given_the_total_is_multinomial() -> None:
    """With ℓ the cell's total, log p = log Poisson(N; N) + log Multinomial(x; N, softmax η)."""
    likelihood = LIKELIHOODS["poisson"](6).double()
    x = torch.poisson(torch.full((4, 6), 3.0, dtype=torch.float64))
    eta = torch.randn(4, 6, dtype=torch.float64)
    for observed in (None, torch.tensor([True, True, False, True, False, True])):
        genes = slice(None) if observed is None else observed
        counts, total = x[:, genes].numpy(), x[:, genes].sum(1).numpy()
        expected = stats.poisson.logpmf(total, total) + stats.multinomial.logpmf(
            counts, total, eta[:, genes].softmax(-1).numpy()
        )
        found = likelihood.log_prob(x, eta, None, observed)
        np.testing.assert_allclose(found, expected, rtol=1e-11)  # float64 roundings


@pytest.mark.parametrize("name", UNIQUE)
def test_draws_may_have_any_leading_dimensions(name: str) -> None:
    likelihood = likelihood_of(name, 5)
    x = torch.poisson(torch.full((4, 5), 2.0, dtype=torch.float64))
    eta = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    size = torch.tensor([2.0, 7.0, 11.0, 40.0], dtype=torch.float64)
    close = {"rtol": 1e-13, "atol": 1e-13}  # the same arithmetic
    found = likelihood.log_prob(x, eta, size)
    weight, centre = likelihood.fisher(x, eta, size)
    mean = likelihood.mean(eta, size)
    assert found.shape == (2, 3, 4)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(found[i, j], likelihood.log_prob(x, eta[i, j], size), **close)
        one_weight, one_centre = likelihood.fisher(x, eta[i, j], size)
        torch.testing.assert_close(weight[i, j], one_weight, **close)
        torch.testing.assert_close(mean[i, j], likelihood.mean(eta[i, j], size), **close)
        if centre is not None:
            torch.testing.assert_close(centre[i, j], one_centre, **close)


def value_and_gradients(
    likelihood: Likelihood, x: Tensor | SparseRows, eta: Tensor
) -> list[Tensor]:
    likelihood.zero_grad()
    leaf = eta.detach().requires_grad_()
    value = likelihood.log_prob(x, leaf)
    value.sum().backward()
    weight, _ = likelihood.fisher(x, leaf)
    return [value.detach(), leaf.grad, weight, *(p.grad.clone() for p in likelihood.parameters())]


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "on_disk"])
@pytest.mark.parametrize("name", UNIQUE)
def test_rows_of_every_source_are_the_dense_matrix(name: str, source: str) -> None:
    likelihood = likelihood_of(name, 9, torch.float32)
    x = torch.poisson(torch.full((7, 9), 0.6))
    # explicit zeros, as after thresholding a sparse matrix in place
    stored = sp.csr_array(x.numpy() + 5.0)
    stored.data -= 5.0
    order = torch.tensor([5, 0, 3, 3 + 3])
    eta = torch.randn(2, 4, 9)
    rows = SOURCES[source](stored if source == "sparse" else x.numpy(), torch.device("cpu"))
    found = value_and_gradients(likelihood, rows.rows(order), eta)
    for a, b in zip(found, value_and_gradients(likelihood, x[order], eta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=30 * EPS)  # float32 sums reordered


@pytest.mark.parametrize("name", UNIQUE)
def test_memory_layout_does_not_matter(name: str) -> None:
    likelihood = likelihood_of(name, 6)
    x = torch.poisson(torch.full((4, 6), 1.0, dtype=torch.float64))
    eta = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = value_and_gradients(likelihood, x, eta)
    transposed = eta.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = value_and_gradients(likelihood, x.T.contiguous().T, transposed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums reordered


def test_negative_binomial_of_transposed_logits() -> None:
    x = torch.poisson(torch.full((4, 6), 1.0, dtype=torch.float64))
    eta = torch.randn(4, 6, dtype=torch.float64)
    size = torch.tensor([1.0, 4.0, 7.0, 20.0], dtype=torch.float64)
    parameters = torch.randn(2, 6, dtype=torch.float64)
    found = []
    for logits in (eta, eta.T.contiguous().T):
        leaf = logits.detach().requires_grad_()
        value = negative_binomial_log_prob(SparseRows.from_dense(x), leaf, size, *parameters)
        found.append((value, *torch.autograd.grad(value.sum(), leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums reordered


@pytest.mark.parametrize("name", COUNTS)
def test_an_empty_cell_says_nothing(name: str) -> None:
    likelihood = likelihood_of(name, 6, torch.float32)
    x = torch.poisson(torch.full((3, 6), 2.0))
    x[1] = 0.0
    value, gradient, weight, *parameters = value_and_gradients(likelihood, x, torch.randn(3, 6))
    # its means are all 1e-30: what is left is below float32's resolution
    assert value[1].item() == pytest.approx(0.0, abs=1e-6)
    assert gradient[1].abs().max() < 1e-6
    assert weight[1].abs().max() < 1e-6
    assert all(p.isfinite().all() for p in (value, gradient, weight, *parameters))


@pytest.mark.parametrize("theta", [1e-3, 1.0, 1e8])
@pytest.mark.parametrize("name", UNIQUE)
def test_a_million_counts_of_a_gene_stay_finite(name: str, theta: float) -> None:
    likelihood = likelihood_of(name, 6, torch.float32)
    if hasattr(likelihood, "log_theta"):
        torch.nn.init.constant_(likelihood.log_theta, math.log(theta))
    x = torch.zeros(2, 6)
    x[:, 2] = 1e6
    x[1, 0] = 3.0
    # means of e±30 relative to each other, for and against the gene that is there
    eta = torch.tensor([[0.0, 1.0, 30.0, -30.0, 0.0, 2.0], [30.0, 0.0, -30.0, 0.0, 0.0, 0.0]])
    for found in value_and_gradients(likelihood, x, eta):
        assert found.isfinite().all()


@pytest.mark.parametrize("name", UNIQUE)
def test_fisher_weights_are_no_negative_numbers(name: str) -> None:
    likelihood = likelihood_of(name, 6)
    x = torch.poisson(torch.full((5, 6), 2.0, dtype=torch.float64))
    weight, centre = likelihood.fisher(x, torch.randn(4, 5, 6, dtype=torch.float64))
    assert weight.shape == (4, 5, 6)
    assert (weight >= 0).all()
    assert weight.max() > 0
    if likelihood.link == "softmax":
        torch.testing.assert_close(centre.sum(-1), torch.ones(4, 5).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_draws_of_a_gaussian_need_no_outputs(
    n_layers: int, masked: bool, dtype: torch.dtype
) -> None:
    """Values and gradients of several draws are those of log_prob at the decoder's outputs."""
    model = model_of("gaussian", n_layers=n_layers, n_vars=9)
    with torch.no_grad():  # outputs far from zero: squares must not be expanded around it
        model.decoder.layers[-1].bias += 300.0
        model.likelihood.scale_raw.fill_(-3.0)
    observed = torch.rand(9) < 0.6 if masked else None
    z = 0.1 * torch.randn(2, 3, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        x = model.likelihood.sample(model.decoder(z[0, 0]))

    def found(model: VAE, z: Tensor, x: Tensor, outputs: bool) -> list[Tensor]:
        z = z.detach().requires_grad_()
        if outputs:
            value = model.likelihood.log_prob(x, model.decoder(z), None, observed)
        else:
            value = model.log_likelihood(batch_of(x, observed=observed), z)
        # every draw of every cell has a gradient of its own
        weights = torch.linspace(0.5, 2.0, value.numel(), dtype=x.dtype).view_as(value)
        gradients = torch.autograd.grad((value * weights).sum(), [z, *model.parameters()])
        return [value.detach(), *gradients]

    expected = found(model, z, x, outputs=True)
    plain = found(copy.deepcopy(model).to(dtype), z.to(dtype), x.to(dtype), outputs=True)
    expanded = found(copy.deepcopy(model).to(dtype), z.to(dtype), x.to(dtype), outputs=False)
    for truth, direct, value in zip(expected, plain, expanded, strict=True):
        size = truth.abs().max()
        error = (value.double() - truth).abs().max() / size
        # No worse than the plain formula in this precision, but for some roundings: float64's
        # are of outputs that are 6,000 times σ.
        least = 200 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-11
        assert error <= 3 * (direct.double() - truth).abs().max() / size + least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", THETAS)
def test_table_of_small_counts_is_the_exact_ratio(theta: float, dtype: torch.dtype) -> None:
    """Γ(x+θ) / (Γ(θ) θˣ x!) of whole counts, looked up and not, and of fractions."""
    x = torch.tensor([1.0, 2.0, 3.0, 15.0, 16.0, 17.0, 400.0, 2.5], dtype=dtype)
    parameter = torch.tensor([theta, 5.0], dtype=dtype)
    col = torch.zeros(len(x), dtype=torch.long)
    value, slope = log_rising_factorial(x, col, parameter.log())
    with mpmath.workdps(60):
        t = mpmath.exp(mpmath.mpf(parameter.log()[0].item()))
        for i, number in enumerate(x.tolist()):
            n = mpmath.mpf(number)
            c = mpmath.loggamma(n + t) - mpmath.loggamma(t) - n * mpmath.log(t)
            exact = float(c - mpmath.loggamma(n + 1))
            exact_slope = float(t * (mpmath.digamma(n + t) - mpmath.digamma(t)) - n)
            size = abs(exact) + number * (1 + abs(math.log(theta))) + math.lgamma(number + 1)
            # roundings of the largest terms, and what the series leaves out
            tolerance = 16 * torch.finfo(dtype).eps
            remainder = series(theta) + 7 * theta / (theta + 4) * series(theta)
            assert abs(value[i].item() - exact) <= tolerance * size + series(theta)
            assert abs(slope[i].item() - exact_slope) <= tolerance * (number + 1) + remainder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel, torch's operators
def test_dropout_logits_of_their_own_for_every_entry(dtype: torch.dtype) -> None:
    """Against the formula in float64, its slopes by automatic differentiation."""
    draws = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((4, 6), 1.0, dtype=torch.float64), generator=draws)
    eta = torch.randn(3, 4, 6, dtype=torch.float64, generator=draws)
    logit = 2 * torch.randn(3, 4, 6, dtype=torch.float64, generator=draws)
    log_theta = torch.randn(6, dtype=torch.float64, generator=draws)
    size = torch.tensor([1.0, 4.0, 7.0, 20.0], dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=draws)
    leaves = [t.requires_grad_() for t in (eta, logit, log_theta)]
    mu = size[:, None] * eta.softmax(-1)
    theta = log_theta.exp()
    count = torch.distributions.NegativeBinomial(theta, logits=mu.log() - log_theta)
    log_count = count.log_prob(x)
    drop = torch.nn.functional.logsigmoid(logit)
    kept = torch.nn.functional.logsigmoid(-logit) + log_count
    expected = torch.where(x == 0, torch.logaddexp(drop, kept), kept).sum(-1)
    slopes = torch.autograd.grad((expected * weight).sum(), leaves)

    own = [t.detach().to(dtype).requires_grad_() for t in leaves]
    rows = SparseRows.from_dense(x.to(dtype))
    value = negative_binomial_log_prob(rows, own[0], size.to(dtype), own[2], own[1])
    found = torch.autograd.grad((value * weight.to(dtype)).sum(), own)
    # Stirling's series is good to 1e-8; float32 sums of some 20 terms.
    tolerance = 1e-7 if dtype == torch.float64 else 2e-5
    for a, b in zip((value, *found), (expected, *slopes), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
