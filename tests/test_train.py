"""The training loop: gradients that add up, rows that stay, states that return, PPCA's maximum."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from small_models import (
    COUNTS,
    UNIQUE,
    batch_of,
    cells_of,
    exact_evidence,
    exact_posterior,
    linear_gaussian,
    model_of,
    posterior_of,
)
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import COVARIANCES, concatenate
from scuvae.inference.posteriors import POSTERIORS, Posterior, objectives
from scuvae.inference.posteriors.unamortized import UnamortizedPosterior
from scuvae.inference.posteriors.whitened_pca import WhitenedPCA
from scuvae.inference.refinement.initialization import prior_start
from scuvae.inference.refinement.refine import LOCAL_STEPS, THOROUGH, refine
from scuvae.inference.training import loop
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.held_out import HeldOutCells
from scuvae.inference.training.loop import TrainingError, train
from scuvae.model import VAE, Decoder

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def minibatches(x: Tensor, parts: Iterable[Tensor]) -> list[Batch]:
    return [batch_of(x[part], index=part, sparse=True) for part in parts]


def sgd(model: VAE, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


class SameDraws(Posterior):
    """Any posterior, with draws that depend on the cell alone: those of a batch of all cells."""

    def __init__(self, inner: Posterior, noise: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.noise = noise
        self.visit = inner.visit
        self._index: Tensor | None = None

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        q: Distribution = self.inner(model, batch, kl_weight)
        self._index = batch.index
        return q

    def points(self, values: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """In place of N(0, 1) draws for the last q; other draws of a step stay random."""
        index, self._index = self._index, None
        if index is None:
            return normal_like(values, shape)
        own = self.noise[: shape[0]] if shape else self.noise[0]
        return own[..., index, :]

    def step(
        self,
        model: VAE,
        batch: Batch,
        slope: Tensor,
        *,
        scale: float,
        kl_weight: float,
        rate: float = 1.0,
    ) -> None:
        self.inner.step(model, batch, slope, scale=scale, kl_weight=kl_weight, rate=rate)

    def descend(
        self, model: VAE, batch: Batch, *, weight: float, kl_weight: float
    ) -> Tensor | None:
        return self.inner.descend(model, batch, weight=weight, kl_weight=kl_weight)


@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("name", UNIQUE)
def test_minibatch_gradients_add_up(
    name: str, kind: str, kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop weights B of n cells by n/B: B/n of its steps, summed, are the full batch's."""
    n = 13
    model = model_of(name, encoder=True)
    x = cells_of(model, n)
    noise = torch.randn(2, n, 2, dtype=torch.float64)
    given = posterior_of(kind, n, 2)

    def step_of(batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        moved, posterior = copy.deepcopy(model), SameDraws(copy.deepcopy(given), noise)
        monkeypatch.setattr(objectives, "normal_like", posterior.points)
        train(
            moved,
            posterior,
            [batch],
            n_obs=n,
            optimizer=sgd(moved, 1e-3),
            max_epochs=1,
            n_samples=2,
            kl_weight=kl_weight,
        )
        pairs = zip(moved.parameters(), model.parameters(), strict=True)
        return [(a - b).detach() / 1e-3 for a, b in pairs], posterior.inner.state_dict()

    everyone = torch.arange(n)
    (whole,) = minibatches(x, [everyone])
    parts = minibatches(x, torch.randperm(n).split([6, 1, 4, 2]))
    expected, rows = step_of(whole)
    assert any(step.abs().max() > 1 for step in expected)
    steps = [step_of(part) for part in parts]
    # What a semi-amortized fit's encoder learns from is drawn anew in each step.
    n_fixed = len(expected) - (kind == "semi") * len(list(model.encoder.parameters()))
    for i, total in enumerate(expected[:n_fixed]):
        found = sum(len(part) / n * step[i] for part, (step, _) in zip(parts, steps, strict=True))
        size = 1 + total.abs().max()
        # roundings: a step is a difference of parameters, divided by 1e-3
        assert (found - total).abs().max() < 1e-10 * size

    # a cell's own parameters move by its own loss, whatever the batch
    for key, table in rows.items():
        for part, (_, own) in zip(parts, steps, strict=True):
            close = {"rtol": 1e-9, "atol": 1e-9}  # roundings
            torch.testing.assert_close(own[key][part.index], table[part.index], **close)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
@pytest.mark.parametrize("name", UNIQUE)
def test_rows_outside_a_batch_do_not_move(name: str, local_step: str, covariance: str) -> None:
    model = model_of(name)
    x = cells_of(model, 9)
    posterior = posterior_of("unamortized", 9, 2, covariance, local_step=local_step)
    everyone, inside = torch.arange(9), torch.tensor([7, 2, 3])
    outside = torch.tensor([0, 1, 4, 5, 6, 8])
    options = {"n_obs": 9, "max_epochs": 1}
    train(model, posterior, minibatches(x, [everyone]), optimizer=sgd(model, 1e-3), **options)
    before = {key: value.clone() for key, value in posterior.state_dict().items()}
    assert before
    train(model, posterior, minibatches(x, [inside] * 16), optimizer=sgd(model, 1e-3), **options)
    for key, value in posterior.state_dict().items():
        assert torch.equal(value[outside], before[key][outside])
        assert (value[inside] != before[key][inside]).any(1).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("name", UNIQUE)
def test_natural_rows_settle_at_the_best_q(name: str, covariance: str) -> None:
    """With the decoder at rest the rows' ELBO becomes that of refinement, but for draws' noise."""
    model = model_of(name, n_vars=20)
    x = cells_of(model, 10)
    (batch,) = minibatches(x, [torch.arange(10)])
    posterior = posterior_of("unamortized", 10, 2, covariance, local_step="natural")
    train(
        model,
        posterior,
        [batch],
        n_obs=10,
        optimizer=sgd(model, 0.0),
        max_epochs=100,
        n_samples=64,
    )
    options = THOROUGH | {"n_samples": 64}
    best = refine(model, batch, [prior_start(model, 10, covariance)], **options)
    with torch.no_grad():
        found = posterior(model, batch)
    # the means are within a fifth of a standard deviation: nothing else moves them
    assert ((found.mean - best.mean) / best.stddev).abs().median() < 0.2
    assert (found.stddev / best.stddev).log().abs().median() < 0.2


class Recorded(Posterior):
    """The q of the last call of another posterior."""

    def __init__(self, inner: Posterior) -> None:
        super().__init__()
        self.inner = inner
        self.visit, self.step, self.descend = inner.visit, inner.step, inner.descend

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        self.q = self.inner(model, batch, kl_weight)
        return self.q


@pytest.mark.parametrize("kind", ["semi", "unamortized"])
def test_local_steps_heed_the_weight_of_the_kl_term(kind: str) -> None:
    """At weight β the exact posterior's precision is I + WᵀW / βσ²."""
    model = linear_gaussian(n_latent=2, scale=1.0)
    model.encoder = model_of("gaussian", n_vars=20, encoder=True, covariance="full").encoder
    (batch,) = minibatches(cells_of(model, 6), [torch.arange(6)])
    posterior = Recorded(posterior_of(kind, 6, 2, "full"))
    train(
        model,
        posterior,
        [batch],
        n_obs=6,
        optimizer=sgd(model, 0.0),
        max_epochs=3,
        kl_weight=0.25,
    )
    w = model.decoder.layers[0].weight.detach()
    precision = torch.eye(2).double() + w.T @ w / 0.25
    found = torch.linalg.inv(posterior.q.covariance_matrix.detach())
    # exact in one step, but for float64 roundings
    torch.testing.assert_close(found, precision.expand(6, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("local_step", LOCAL_STEPS)
def test_held_out_cells_are_judged_by_an_optimised_q(local_step: str, covariance: str) -> None:
    model = linear_gaussian(n_latent=2)
    x = cells_of(model, 11)
    judge = HeldOutCells(
        minibatches(x, torch.arange(11).split(4)), covariance=covariance, local_step=local_step
    )
    evidence = exact_evidence(model, x).mean().item()
    for _ in range(3):
        value = judge.elbo(model)
    mean, precision = exact_posterior(model, x)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    expected = evidence - (gap if covariance == "diagonal" else 0.0)
    # a tenth of a nat: gradient steps end when they may, and the ELBO is taken over eight draws
    assert value == pytest.approx(expected, abs=0.1)
    q = concatenate(list(judge.parts()))
    assert ((q.mean - mean) * precision.diagonal().sqrt()).abs().max() < 0.1
    # another decoder has another ELBO
    with torch.no_grad():
        model.decoder.layers[0].bias += 1.0
    assert judge.elbo(model) < value - 1


class Calls:
    """Minibatches that do something to the world before some of them."""

    def __init__(self, batches: list[Batch], before: Callable[[int], Batch | None]) -> None:
        self.batches = batches
        self.before = before
        self.visited = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            changed = self.before(self.visited)
            self.visited += 1
            yield batch if changed is None else changed


def snapshot(model: VAE, posterior: Posterior) -> list[Tensor]:
    return [value.clone() for part in (model, posterior) for value in part.state_dict().values()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", POSTERIORS)
def test_a_loss_that_is_no_number_stops_the_training(kind: str, value: float) -> None:
    """It names epoch, batch and cells, and leaves what the last good epoch left."""

    def fresh() -> tuple[VAE, Posterior, list[Batch], torch.optim.Optimizer]:
        torch.manual_seed(5)
        model = model_of("gaussian", encoder=True)
        batches = minibatches(cells_of(model, 12), torch.arange(12).split(4))
        return model, posterior_of(kind, 12, 2), batches, sgd(model, 1e-4)

    model, posterior, batches, optimizer = fresh()
    states: list[list[Tensor]] = []
    spoiled = batch_of(torch.full((4, 12), value).double(), index=batches[1].index)
    cells = Calls(batches, lambda visited: spoiled if visited == 2 * 3 + 1 else None)
    with pytest.raises(TrainingError) as caught:
        train(
            model,
            posterior,
            cells,
            n_obs=12,
            optimizer=optimizer,
            max_epochs=5,
            on_epoch=lambda row: states.append(snapshot(model, posterior)),
        )
    error = caught.value
    assert (error.epoch, error.batch, error.cells) == (2, 1, [4, 5, 6, 7])
    assert "epoch 2, batch 1" in str(error)
    assert "rows 4, 5, 6, 7" in str(error)
    assert len(states) == 2
    moved = [not torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True)]
    assert any(moved)
    for found, expected in zip(snapshot(model, posterior), states[-1], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("most", [20, 30])
def test_of_a_posterior_all_tables_are_kept_or_none(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve cells' means are 24 numbers, their scales 36: what is not kept does not come back."""
    monkeypatch.setattr(loop, "MOST_KEPT", most)
    torch.manual_seed(5)
    model = model_of("gaussian")
    batches = minibatches(cells_of(model, 12), torch.arange(12).split(4))
    posterior = posterior_of("unamortized", 12, 2, "full")
    as_it_was: list[Tensor] = []

    def before(visited: int) -> Batch | None:
        if visited < 5:
            return None
        as_it_was[:] = [value.clone() for value in posterior.state_dict().values()]
        return batch_of(torch.full((4, 12), math.nan).double(), index=batches[2].index)

    with pytest.raises(TrainingError):
        train(
            model,
            posterior,
            Calls(batches, before),
            n_obs=12,
            optimizer=sgd(model, 1e-4),
            max_epochs=5,
        )
    others = torch.arange(8)
    for found, expected in zip(posterior.state_dict().values(), as_it_was, strict=True):
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("spoiled_at", [None, 2, 12, 14])
def test_losses_may_be_looked_at_more_rarely(spoiled_at: int | None) -> None:
    """Every eight steps at least, of epochs of three: after epochs 2, 5 and 6, the last.

    A loss that is no number is named as it is when every epoch is looked at; the state is that
    after the look before.
    """

    def run(
        look_every: int,
    ) -> tuple[list[dict[str, float]], list[list[Tensor]], list[Tensor], TrainingError | None]:
        torch.manual_seed(5)
        model = model_of("gaussian", encoder=True)
        batches = minibatches(cells_of(model, 12), torch.arange(12).split(4))
        posterior = posterior_of("unamortized", 12, 2)
        spoiled = batch_of(torch.full((4, 12), math.nan).double(), index=batches[2].index)
        cells = Calls(batches, lambda visited: spoiled if visited == spoiled_at else None)
        rows: list[dict[str, float]] = []
        states = [snapshot(model, posterior)]
        error = None

        def on_epoch(row: dict[str, float]) -> None:
            rows.append(row)
            states.append(snapshot(model, posterior))

        options = {"n_obs": 12, "optimizer": sgd(model, 1e-4), "max_epochs": 7}
        try:
            train(model, posterior, cells, look_every=look_every, on_epoch=on_epoch, **options)
        except TrainingError as caught:
            error = caught
        return rows, states, snapshot(model, posterior), error

    each, states, _, first = run(1)
    rarely, _, left, error = run(8)
    looked_at = {None: 7, 2: 0, 12: 3, 14: 3}[spoiled_at]
    assert [row["loss"] for row in rarely] == [row["loss"] for row in each][:looked_at]
    if spoiled_at is None:
        assert len(each) == 7
        assert error is None
        return
    assert first is not None
    assert error is not None
    assert (error.epoch, error.batch, error.cells) == (first.epoch, first.batch, first.cells)
    assert (error.epoch, error.batch) == divmod(spoiled_at, 3)
    for found, expected in zip(left, states[looked_at], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_what_a_diverged_fit_leaves_has_a_finite_loss(kind: str) -> None:
    """The step that ruins the model shows in the next loss: the state before it comes back."""
    model = model_of("negative_binomial", encoder=True)
    batches = minibatches(cells_of(model, 8), [torch.arange(8)])
    posterior = posterior_of(kind, 8, 2)
    optimizer = sgd(model, 1e-6)

    def before(visited: int) -> None:
        if visited == 3:
            optimizer.param_groups[0]["lr"] = 1e300

    with pytest.raises(TrainingError):
        train(
            model,
            posterior,
            Calls(batches, before),
            n_obs=8,
            optimizer=optimizer,
            max_epochs=10,
        )
    for value in snapshot(model, posterior):
        assert value.isfinite().all()
        assert value.abs().max() < 1e6
    with torch.no_grad():
        q = posterior(model, batches[0])
        assert model.log_likelihood(batches[0], q.mean).isfinite().all()


class Falling:
    """A held-out ELBO that rises until an epoch and then falls; it keeps the states it saw."""

    def __init__(self, best: int, posterior: Posterior) -> None:
        self.best = best
        self.posterior = posterior
        self.states: list[list[Tensor]] = []
        self.training: list[bool] = []

    def elbo(self, model: VAE) -> float:
        self.training.append(model.training)
        self.states.append(snapshot(model, self.posterior))
        return -abs(len(self.states) - 1 - self.best)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_early_stopping_brings_the_best_state_back(kind: str) -> None:
    model = model_of("poisson", encoder=True)
    batches = minibatches(cells_of(model, 12), torch.arange(12).split(5))
    posterior = posterior_of(kind, 12, 2)
    judge = Falling(4, posterior)
    history = train(
        model,
        posterior,
        batches,
        n_obs=12,
        optimizer=sgd(model, 1e-4),
        max_epochs=50,
        held_out=judge,
        early_stopping=EarlyStopping(patience=3),
    )
    assert [row["validation_elbo"] for row in history] == [-4, -3, -2, -1, 0, -1, -2, -3]
    assert not any(judge.training)
    assert not model.training
    last, best = judge.states[-1], judge.states[4]
    assert any(not torch.equal(a, b) for a, b in zip(last, best, strict=True))
    for found, expected in zip(snapshot(model, posterior), best, strict=True):
        assert torch.equal(found, expected)


def test_patience_and_least_rise() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.5)
    values = [-10.0, -9.8, -9.6, -9.4, -9.0]
    stops = [stopping.update(i, v, lambda i=i: {"epoch": i}) for i, v in enumerate(values)]
    # -9.4 is the first to be 0.5 above -10, but by then two epochs had passed
    assert stops == [False, False, True, False, False]
    assert stopping.state == {"epoch": 3}


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("name", UNIQUE)
def test_history_has_its_columns_in_nats_a_cell(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, encoder=True)
    x = cells_of(model, 10)
    noise = torch.randn(3, 10, 2, dtype=torch.float64)
    posterior = SameDraws(posterior_of(kind, 10, 2), noise)
    monkeypatch.setattr(objectives, "normal_like", posterior.points)
    (everyone,) = minibatches(x, [torch.arange(10)])
    with torch.no_grad():
        q = posterior(model, everyone, 0.25)
        reconstruction = model.log_likelihood(everyone, q.draw(noise)).mean().item()
        kl = torch.distributions.kl_divergence(
            MultivariateNormal(q.mean, torch.diag_embed(q.variance)),
            MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()),
        )
    rows: list[dict[str, float]] = []
    history = train(
        model,
        posterior,
        minibatches(x, torch.arange(10).split([3, 6, 1])),
        n_obs=10,
        optimizer=sgd(model, 0.0),
        max_epochs=1,
        n_samples=3,
        kl_weight=0.25,
        on_epoch=rows.append,
    )
    (row,) = history
    assert rows == history
    assert list(row) == ["loss", "elbo", "reconstruction", "kl", "validation_elbo"]
    expected_kl = kl.mean().item()
    # nothing moves, and each cell is visited once; roundings
    assert row["reconstruction"] == pytest.approx(reconstruction, rel=1e-9)
    assert row["kl"] == pytest.approx(expected_kl, rel=1e-9)
    assert row["elbo"] == pytest.approx(reconstruction - expected_kl, rel=1e-9)
    assert row["loss"] == pytest.approx(0.25 * expected_kl - reconstruction, rel=1e-9)
    assert math.isnan(row["validation_elbo"])


@pytest.mark.parametrize("every", [1, 3])
def test_held_out_cells_are_judged_when_due_and_at_the_end(every: int) -> None:
    model = model_of("poisson", encoder=True)
    batches = minibatches(cells_of(model, 6), [torch.arange(6)])
    posterior = posterior_of("amortized", 6, 2)
    history = train(
        model,
        posterior,
        batches,
        n_obs=6,
        optimizer=sgd(model, 1e-4),
        max_epochs=7,
        held_out=Falling(100, posterior),
        evaluate_every=every,
    )
    judged = [not math.isnan(row["validation_elbo"]) for row in history]
    assert judged == [(epoch + 1) % every == 0 or epoch == 6 for epoch in range(7)]


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("name", COUNTS)
def test_training_raises_the_elbo(name: str, kind: str) -> None:
    model = model_of(name, encoder=True)
    x = cells_of(model, 30)
    torch.nn.init.normal_(model.decoder.layers[-1].weight, std=0.01)
    history = train(
        model,
        posterior_of(kind, 30, 2),
        minibatches(x, torch.arange(30).split(10)),
        n_obs=30,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        max_epochs=40,
        n_samples=4,
    )
    elbo = torch.tensor([row["elbo"] for row in history])
    # some nats, where epochs differ by tenths
    assert elbo[-5:].mean() > elbo[:5].mean() + 1


def ppca_maximum(x: Tensor, n_latent: int) -> float:
    """Log-likelihood a cell at the maximum (Tipping & Bishop, JRSS B 1999), in nats."""
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x)).flip(0)
    noise = values[n_latent:].mean()
    p = x.shape[1]
    log_det = values[:n_latent].log().sum() + (p - n_latent) * noise.log()
    return (-0.5 * (p * math.log(2 * math.pi) + log_det + p)).item()


def test_ppca_maximum_is_a_maximum() -> None:
    """The closed form against the likelihood at the closed-form parameters."""
    truth = linear_gaussian(n_latent=2, n_vars=12)
    x = cells_of(truth, 50)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    model = linear_gaussian(n_latent=2, n_vars=12)
    noise = values[:-2].mean()
    with torch.no_grad():
        model.decoder.layers[0].weight.copy_(vectors[:, -2:] * (values[-2:] - noise).sqrt())
        model.decoder.layers[0].bias.copy_(x.mean(0))
        model.likelihood.scale_raw.fill_(math.log(math.expm1(noise.sqrt())))
    found = exact_evidence(model, x).mean().item()
    assert found == pytest.approx(ppca_maximum(x, 2), rel=1e-10)  # roundings


@pytest.mark.parametrize(("batch_size", "max_epochs"), [(100, 800), (25, 300)])
def test_unamortized_natural_training_reaches_ppca(batch_size: int, max_epochs: int) -> None:
    """Linear decoder, Gaussian likelihood, cold start: within 0.05 nats a cell of the maximum."""
    truth = linear_gaussian(n_latent=2, n_vars=12)
    x = cells_of(truth, 100)
    model = VAE(Decoder(2, 12, n_layers=0), copy.deepcopy(truth.likelihood)).double()
    torch.nn.init.zeros_(model.likelihood.scale_raw)
    pca = WhitenedPCA(batch_of(x), 2, inputs="values")
    raw = torch.tensor([-1.0, 0.0, -1.0]).double().repeat(100, 1)
    posterior = UnamortizedPosterior(pca(batch_of(x)), raw)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(
        model,
        posterior,
        minibatches(x, torch.randperm(100).split(batch_size)),
        n_obs=100,
        optimizer=optimizer,
        max_epochs=max_epochs,
        learning_rate_at=lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    )
    maximum = ppca_maximum(x, 2)
    evidence = exact_evidence(model, x).mean().item()
    assert evidence <= maximum + 1e-9
    assert evidence > maximum - 0.05  # nats a cell, as promised

    # refined, the ELBO is that evidence
    batch = batch_of(x)
    with torch.no_grad():
        first = posterior(model, batch)
    q = refine(model, batch, [first])
    draws = q.sample((4000,))
    with torch.no_grad():
        log_p = model.log_likelihood(batch, draws)
    log_weight = log_p + model.prior.log_prob(draws) - q.log_prob(draws)
    # at the exact posterior each draw weighs the evidence: no Monte-Carlo error is left
    assert log_weight.mean().item() == pytest.approx(evidence, abs=1e-3)
