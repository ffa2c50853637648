"""Local steps against exact posteriors and a long optimisation, and what they must not touch."""

import math

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
from scuvae.distributions.gaussian import (
    COVARIANCES,
    Gaussian,
    concatenate,
    n_scale_parameters,
    select,
)
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.refinement.gauss_newton import Ascent, climb
from scuvae.inference.refinement.initialization import likeliest_start, prior_start
from scuvae.inference.refinement.refine import LOCAL_STEPS, THOROUGH, fixed_elbo, refine
from scuvae.model import VAE
from scuvae.model.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def likelihood_of(name: str) -> torch.nn.Module:
    return LIKELIHOODS[name](1)


def covariance_of(q: Distribution) -> Tensor:
    full = q.full
    return q.covariance_matrix if full else torch.diag_embed(q.variance)


def exact_elbo(model: VAE, x: Tensor, q: Distribution) -> Tensor:
    """ELBO of a linear Gaussian model: evidence less KL(q ‖ posterior)."""
    mean, precision = exact_posterior(model, x)
    posterior = as_q(MultivariateNormal(mean, precision_matrix=precision))
    full = MultivariateNormal(q.mean, covariance_of(q))
    return exact_evidence(model, x) - kl_between(full, posterior)


def cells_near_and_far(model: VAE) -> Tensor:
    """Cells of a linear model, two of them where the prior's mean already is the posterior's."""
    x = cells_of(model, 8)
    x[0] = model.decoder(torch.zeros(model.n_latent).double()).detach()
    x[1] = x[0] + 0.01 * torch.randn_like(x[0])
    return x


@pytest.mark.parametrize("max_steps", [1, 10])
@pytest.mark.parametrize("n_latent", [1, 2, 3, 10])
def test_one_natural_step_is_exact_for_a_linear_model(n_latent: int, max_steps: int) -> None:
    model = linear_gaussian(n_latent=n_latent)
    x = cells_near_and_far(model)
    q = refine(model, batch_of(x), [prior_start(model, 8, "full")], max_steps=max_steps)
    mean, precision = exact_posterior(model, x)
    assert mean.norm(dim=1).max() < 4  # within the longest step
    torch.testing.assert_close(q.mean, mean, rtol=1e-8, atol=1e-8)  # float64 roundings
    exact = torch.linalg.inv(precision).expand(8, -1, -1)
    torch.testing.assert_close(covariance_of(q), exact, rtol=1e-8, atol=1e-8)  # the same
    gap = exact_evidence(model, x) - exact_elbo(model, x, q)
    assert gap.abs().max() < 1e-3  # nats, as promised; roundings are far below


@pytest.mark.parametrize("max_steps", [1, 10])
@pytest.mark.parametrize("n_latent", [2, 3, 10])
def test_diagonal_optimum_of_a_linear_model(n_latent: int, max_steps: int) -> None:
    model = linear_gaussian(n_latent=n_latent)
    x = cells_near_and_far(model)
    q = refine(model, batch_of(x), [prior_start(model, 8, "diagonal")], max_steps=max_steps)
    mean, precision = exact_posterior(model, x)
    torch.testing.assert_close(q.mean, mean, rtol=1e-8, atol=1e-8)  # float64 roundings
    scale = precision.diagonal().rsqrt().expand(8, -1)
    torch.testing.assert_close(q.stddev, scale, rtol=1e-8, atol=1e-8)  # the same
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    found = exact_evidence(model, x) - exact_elbo(model, x, q)
    torch.testing.assert_close(found, gap.expand(8), rtol=1e-6, atol=1e-8)  # the same


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_weighted_kl_shifts_the_optimum(covariance: str) -> None:
    """E_q[log p] − β KL has its optimum at Λ = I + WᵀW / βσ², where the noise is √β σ."""
    beta = 0.25
    model, tempered = linear_gaussian(scale=1.0), linear_gaussian(scale=1.0 * math.sqrt(beta))
    tempered.decoder.load_state_dict(model.decoder.state_dict())
    x = cells_of(model, 5)
    start = prior_start(model, 5, covariance)
    q = refine(model, batch_of(x), [start], kl_weight=beta)
    expected = refine(tempered, batch_of(x), [start])
    torch.testing.assert_close(q.mean, expected.mean, rtol=1e-6, atol=1e-6)  # float64 roundings
    torch.testing.assert_close(covariance_of(q), covariance_of(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradient_steps_approach_the_linear_optimum(covariance: str) -> None:
    model = linear_gaussian()
    x = cells_near_and_far(model)
    q = refine(model, batch_of(x), [prior_start(model, 8, covariance)], local_step="gradient")
    best = refine(model, batch_of(x), [prior_start(model, 8, covariance)], local_step="natural")
    # Adam stops where its rate does: a tenth of a nat
    assert (exact_elbo(model, x, q) > exact_elbo(model, x, best) - 0.1).all()


def starts_of(model: VAE, batch: Batch, covariance: str) -> dict[str, Distribution]:
    n_cells = len(batch)
    n_raw = n_scale_parameters(model.n_latent, covariance)
    with torch.no_grad():
        return {
            "prior": prior_start(model, n_cells, covariance),
            "encoder": model.encode(batch).as_family(covariance),
            "far": Gaussian.of(
                3 * torch.randn(n_cells, model.n_latent).double(),
                torch.zeros(n_cells, n_raw).double(),
            ),
        }


def compare(model: VAE, batch: Batch, a: Distribution, b: Distribution) -> tuple[Tensor, Tensor]:
    """ELBO of a less that of b by common fresh draws, and its standard error."""
    n = 2000
    noise = torch.randn(n, 1, model.n_latent, dtype=a.mean.dtype)
    with torch.no_grad():
        values = [
            model.log_likelihood(batch, q.mean + (tril(q) @ noise[..., None])[..., 0])
            for q in (a, b)
        ]
        difference = values[0] - values[1]
        return (
            difference.mean(0) - kl_to_prior(a) + kl_to_prior(b),
            difference.std(0) / math.sqrt(n),
        )


def tril(q: Distribution) -> Tensor:
    return q.scale_tril if q.full else torch.diag_embed(q.stddev)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_no_cell_ends_below_its_start(name: str, local_step: str, covariance: str) -> None:
    model = model_of(name, n_latent=3, n_vars=25, encoder=True)
    batch = batch_of(cells_of(model, 30), sparse=True)
    for label, start in starts_of(model, batch, covariance).items():
        q = refine(model, batch, [start], local_step=local_step)
        assert type(q) is type(start)
        gain, error = compare(model, batch, q, start)
        # a few hundredths of a nat: what few fixed draws do not tell apart
        assert (gain > -5 * error - 0.05).all(), (label, gain.min())
        assert gain.mean() > 1, label  # the starts are poor


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_one_latent_dimension_is_fitted_as_well_as_by_its_moments(
    name: str, local_step: str, covariance: str
) -> None:
    model = model_of(name, n_latent=1, n_layers=0)
    x = cells_of(model, 20)
    x[:2] = model.likelihood.mean(model.decoder(torch.zeros(2, 1).double()), x[:2].sum(1)).round()
    batch = batch_of(x, sparse=True)
    _, moments = quadrature(model, x)
    options = THOROUGH if local_step == "natural" else {}
    first = prior_start(model, 20, covariance)
    q = refine(model, batch, [first], local_step=local_step, **options)
    difference, error = compare(model, batch, q, moments)
    # the posterior's own moments are the best q's but for its skew
    assert (difference > -0.1 - 5 * error).all()


def long_adam(model: VAE, batch: Batch, start: Distribution) -> Distribution:
    """The optimum by plain means: Adam on mean and factor, 64 antithetic draws, 300 steps."""
    mean = start.mean.clone().requires_grad_()
    full = start.full
    n_cells, n_latent = mean.shape
    log_scale = start.stddev.log().clone().requires_grad_()
    below = torch.zeros(n_cells, n_latent, n_latent).double().requires_grad_()
    noise = torch.randn(32, 1, n_latent, 1, dtype=mean.dtype)
    noise = torch.cat([noise, -noise])
    optimizer = torch.optim.Adam([mean, log_scale, below], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        factor = torch.diag_embed(log_scale.exp()) + (below.tril(-1) if full else 0)
        q = Gaussian(mean, factor)
        expected = model.log_likelihood(batch, mean + (factor @ noise)[..., 0]).mean(0)
        optimizer.zero_grad()
        (kl_to_prior(q) - expected).sum().backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()
    if full:
        return Gaussian(mean.detach(), factor.detach())
    return Gaussian(mean.detach(), log_scale.detach().exp())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("name", UNIQUE)
def test_natural_steps_reach_what_a_long_optimisation_reaches(name: str, covariance: str) -> None:
    model = model_of(name, n_latent=2, n_vars=15)
    batch = batch_of(cells_of(model, 12), sparse=True)
    start = prior_start(model, 12, covariance)
    reference = long_adam(model, batch, start)
    found = refine(model, batch, [start], **THOROUGH)
    difference, error = compare(model, batch, found, reference)
    # On average: the Gauss–Newton curvature is not the Hessian, and its draws are few.
    assert difference.mean() > -0.1 - 5 * error.mean()


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_a_cell_is_refined_by_itself(name: str, local_step: str, covariance: str) -> None:
    model = model_of(name, n_latent=3, n_vars=10)
    x = cells_of(model, 9)
    few: dict[str, int] = {"max_steps": 20}  # however many there are
    whole = refine(
        model,
        batch_of(x, sparse=True),
        [prior_start(model, 9, covariance)],
        local_step=local_step,
        **few,
    )
    order = torch.tensor([4, 8, 0, 2, 7, 1, 3, 6, 5])
    parts = [
        refine(
            model,
            batch_of(x[part], index=part, sparse=True),
            [prior_start(model, len(part), covariance)],
            local_step=local_step,
            **few,
        )
        for part in order.split([1, 5, 3])
    ]
    found = concatenate(parts)
    close = {"rtol": 1e-7, "atol": 1e-7}  # sums reordered, through some steps
    torch.testing.assert_close(found.mean, whole.mean[order], **close)
    torch.testing.assert_close(covariance_of(found), covariance_of(whole)[order], **close)


@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_the_model_is_left_alone(name: str, local_step: str) -> None:
    model = model_of(name, encoder=True)
    batch = batch_of(cells_of(model, 4))
    model.log_likelihood(batch, torch.zeros(4, 2).double()).sum().backward()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert any(g is not None for g in gradients)
    random_state = torch.get_rng_state()
    starts = starts_of(model, batch, "full")["far"]
    torch.set_rng_state(random_state)
    before = starts.mean.clone()
    q = refine(model, batch, [starts], local_step=local_step, max_steps=10)
    assert not model.training
    assert not q.mean.requires_grad
    assert torch.equal(starts.mean, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
def test_no_gradient_reaches_the_start(local_step: str, covariance: str) -> None:
    model = model_of("poisson", encoder=True, covariance=covariance)
    batch = batch_of(cells_of(model, 4))
    start = model.encode(batch)
    assert start.mean.requires_grad
    q = refine(model, batch, [start], local_step=local_step, max_steps=2)
    assert not q.mean.requires_grad
    assert not covariance_of(q).requires_grad


@pytest.mark.parametrize("name", UNIQUE)
def test_the_best_start_wins_in_each_cell(name: str) -> None:
    model = model_of(name, n_latent=2, encoder=True)
    batch = batch_of(cells_of(model, 12))
    starts = list(starts_of(model, batch, "full").values())
    best = refine(model, batch, starts, max_steps=2)
    for start in starts:
        single = refine(model, batch, [start], max_steps=2)
        gain, error = compare(model, batch, best, single)
        # chosen by eight fixed draws, which tell some tenths of a nat apart
        assert (gain > -5 * error - 0.5).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_select_takes_each_cells_choice(covariance: str) -> None:
    n_raw = n_scale_parameters(3, covariance)
    options = [Gaussian.of(torch.randn(4, 3), torch.randn(4, n_raw)) for _ in range(3)]
    q = select(options, torch.tensor([2, 0, 1, 2]))
    for cell, choice in enumerate([2, 0, 1, 2]):
        torch.testing.assert_close(q.mean[cell], options[choice].mean[cell])
        torch.testing.assert_close(covariance_of(q)[cell], covariance_of(options[choice])[cell])


@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_missing_genes_are_conditioned_out(name: str, local_step: str) -> None:
    """q given some genes is that of the model which has no others."""
    model = model_of(name, n_vars=10)
    observed = torch.tensor([True, True, False, True, False, True, True, True, False, True])
    alone = model_of(name, n_vars=7)
    state = model.state_dict()
    for key, value in state.items():
        if len(value) == 10:
            state[key] = value[observed]
    alone.load_state_dict(state)
    x = cells_of(model, 5)
    start = prior_start(model, 5, "full")
    few = {"local_step": local_step, "max_steps": 20}
    q = refine(model, batch_of(x, observed=observed), [start], **few)
    expected = refine(alone, batch_of(x[:, observed]), [start], **few)
    torch.testing.assert_close(q.mean, expected.mean, rtol=1e-7, atol=1e-7)  # sums reordered
    torch.testing.assert_close(covariance_of(q), covariance_of(expected), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
def test_any_number_of_draws_will_do(local_step: str, n_samples: int) -> None:
    model = model_of("negative_binomial")
    batch = batch_of(cells_of(model, 4))
    start = prior_start(model, 4, "full")
    q = refine(model, batch, [start], local_step=local_step, n_samples=n_samples, max_steps=20)
    assert q.mean.isfinite().all()
    assert not torch.equal(q.mean, start.mean)


@pytest.mark.parametrize("n_hidden", [2, 32])
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize(
    ("name", "theta"),
    [
        (name, theta)
        for name in UNIQUE
        for theta in ([1e-3, 1.0, 1e8] if hasattr(likelihood_of(name), "log_theta") else [1.0])
    ],
)
def test_extreme_cells_stay_finite(name: str, local_step: str, theta: float, n_hidden: int) -> None:
    """In float32; with two hidden units and six latent dimensions the curvature is singular."""
    model = model_of(name, n_latent=6, n_vars=30, n_hidden=n_hidden, gain=8.0, dtype=torch.float32)
    if hasattr(model.likelihood, "log_theta"):
        torch.nn.init.constant_(model.likelihood.log_theta, math.log(theta))
    x = torch.poisson(torch.full((6, 30), 1.0))
    x[0] = 0.0
    x[1] = 0.0
    x[1, 3] = 1e6
    x[2, 3] = 1e6
    x[3] = 1e6
    batch = batch_of(x, sparse=True)
    start = prior_start(model, 6, "full")
    # enough steps to settle: on the way there, roundings choose among a steep decoder's slopes
    steps = {"max_steps": 60} if local_step == "natural" else {}
    q = refine(model, batch, [start], local_step=local_step, **steps)
    assert q.mean.isfinite().all()
    assert covariance_of(q).isfinite().all()
    assert (q.stddev > 0).all()
    if model.likelihood.support == "counts":
        # a cell without counts knows nothing: its posterior is the prior
        torch.testing.assert_close(q.mean[0], torch.zeros(6), rtol=0, atol=1e-3)
        torch.testing.assert_close(q.stddev[0], torch.ones(6), rtol=0, atol=1e-3)
    # the cells beside them are as they are by themselves, but for float32
    others = batch_of(x[4:], sparse=True)
    alone = refine(model, others, [prior_start(model, 2, "full")], local_step=local_step, **steps)
    beside = Gaussian.of(q.mean[4:], q.raw[4:])
    # so steep a decoder has optima some tenths of nats apart, and roundings choose among them
    torch.testing.assert_close(
        fixed_elbo(model, others, beside), fixed_elbo(model, others, alone), rtol=0, atol=1.0
    )


@pytest.mark.parametrize("seed", [3, 5, 8, 9])
def test_a_steep_decoder_and_deep_cells_are_survived(seed: int) -> None:
    """float32 leaves a curvature of rank below L and size 1e8 no longer positive definite."""
    torch.manual_seed(seed)
    model = model_of(
        "poisson", n_latent=10, n_vars=200, n_hidden=32, gain=100.0, dtype=torch.float32
    )
    x = torch.poisson(torch.full((4, 200), 1.0))
    x[1, 3] = 1e6
    x[2] = torch.poisson(torch.full((200,), 5000.0))
    for local_step in LOCAL_STEPS:
        start = prior_start(model, 4, "full")
        q = refine(model, batch_of(x, sparse=True), [start], local_step=local_step)
        assert q.mean.isfinite().all()
        assert covariance_of(q).isfinite().all()


def test_few_cells_are_stuck_under_a_sharp_decoder() -> None:
    """Where z is nearly determined, the climb from the prior's mean often ends in a wrong mode."""
    model = model_of("gaussian", n_latent=3, n_vars=30, n_layers=2, gain=3.0)
    with torch.no_grad():
        model.likelihood.scale_raw.fill_(math.log(math.expm1(0.05)))
    truth = torch.randn(60, 3).double()
    with torch.no_grad():
        x = model.decoder(truth) + 0.05 * torch.randn(60, 30)
    batch = batch_of(x)
    near = Gaussian(truth, torch.full_like(truth, 0.05))
    best = fixed_elbo(model, batch, refine(model, batch, [near]))

    def stuck(start: Distribution) -> int:
        return int((fixed_elbo(model, batch, refine(model, batch, [start])) < best - 10).sum())

    from_the_mean = stuck(prior_start(model, 60, "diagonal"))
    assert from_the_mean > 5  # else there is nothing to be seen here
    assert stuck(likeliest_start(model, batch, "diagonal")) <= from_the_mean / 2


def test_a_step_that_lowers_the_objective_is_taken_back() -> None:
    """And is a quarter as long next time; one that is lower by rounding is taken."""
    x = torch.zeros(3, 4).double()
    before, slope = torch.tensor([-5.0, -5.0, -5.0]).double(), torch.ones(3, 2).double()
    cells = Ascent(batch_of(x), before, slope)
    after = before + torch.tensor([1.0, -1e-4, -1.0]).double()
    better, gain = cells.settle(after, 2 * slope)
    assert better.tolist() == [True, True, False]
    torch.testing.assert_close(cells.value, torch.where(better, after, before))
    torch.testing.assert_close(cells.slope, torch.tensor([2.0, 2.0, 1.0]).double()[:, None] * slope)
    assert cells.rate.tolist() == [1.0, 1.0, 0.25]
    assert gain.tolist() == pytest.approx([1.0, -1e-4, math.inf])


def test_a_climb_with_points_around_the_mean() -> None:
    """Of a quadratic density the average over points whose mean is zero has the same peak."""
    model = linear_gaussian(n_latent=3)
    x = cells_of(model, 7)
    offsets = 0.3 * normal_points(4, torch.zeros(7, 3).double()).expand(-1, 7, -1)
    # A row of cells stops before the others: their points have to go on with them.
    first = exact_posterior(model, x)[0] + torch.tensor([0.0, 5.0]).double().repeat(4)[:7, None]
    found, _ = climb(model, batch_of(x), first, 5, 1e-9, offsets=offsets)
    torch.testing.assert_close(found, exact_posterior(model, x)[0], rtol=0, atol=1e-6)


def test_a_climb_takes_no_step_farther_than_asked() -> None:
    model = linear_gaussian(n_latent=3)
    x = cells_of(model, 7)
    mean, precision = exact_posterior(model, x)
    width = precision.diagonal().rsqrt()
    first = mean + 10 * width
    found, _ = climb(model, batch_of(x), first, 1, 1e-9, farthest=2.0)
    moved = ((found - first) / width).norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found - first, (mean - first) * 2 / (10 * 3**0.5), rtol=1e-5, atol=0)
    near, _ = climb(model, batch_of(x), mean + 0.1 * width, 1, 1e-9, farthest=2.0)
    torch.testing.assert_close(near, mean, rtol=0, atol=1e-6)
