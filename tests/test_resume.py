"""Training in parts: what a state holds, and gradients that several processes could sum."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse as sp
from small_models import batch_of, cells_of, model_of, posterior_of
from torch import Tensor
from torch.distributions import Distribution

from scuvae._random import normal_like, using
from scuvae.batches import Batch, Cells
from scuvae.batches.sources.registry import source_of
from scuvae.inference.posteriors import POSTERIORS, Posterior, objectives
from scuvae.inference.refinement.adam import Gradient
from scuvae.inference.training import fit
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.loop import train
from scuvae.inference.training.optimizers import (
    OPTIMIZERS,
    CompiledAdam,
    adam,
    load_state,
    state_of,
)
from scuvae.inference.training.settings import Settings
from scuvae.inference.training.step import Step
from scuvae.model import VAE

pytestmark = pytest.mark.usefixtures("fixed_random_state")

CPU = torch.device("cpu")
N_CELLS, N_EPOCHS, N_BATCHES = 60, 4, 4


# --- resumption ---------------------------------------------------------------------------------


class Killed(Exception):
    """Training ends here."""


def values(name: str) -> Any:
    x = np.random.default_rng(3).poisson(2.0, (N_CELLS, 12)).astype(np.float32)
    return sp.csr_matrix(x) if name == "negative_binomial" else np.log1p(x)


def begun(name: str, scheme: str, optimizer: str, local_step: str, seed: int) -> fit.Start:
    """A fit before its first step, as ``tl.fit`` makes it: 15 cells a batch, 6 held out."""
    settings = Settings.resolve(
        N_CELLS,
        amortized=scheme,
        likelihood=name,
        n_latent=2,
        n_hidden=8,
        n_layers=1,
        covariance=None,
        validation_fraction=0.1,
        max_epochs=N_EPOCHS,
        batch_size=15,
        learning_rate=None,
        optimizer=optimizer,
        local_step=local_step,
        n_samples=1,
        kl_weight=0.7,
        dropout=0.3,
    )
    torch.manual_seed(seed)
    model = model_of(
        name,
        n_hidden=8,
        encoder=POSTERIORS[scheme].has_encoder,
        normalization="batch",
        covariance=settings.covariance,
        dtype=torch.float32,
    )
    model.decoder.dropout = settings.dropout
    held_out = np.arange(N_CELLS) % 10 == 4
    cells = Cells(source_of(values(name), CPU))
    return fit.start(model, cells, held_out, settings, early_stopping=True, seed=seed)


def outcome(start: fit.Start, history: list[dict[str, float]]) -> dict[str, Tensor]:
    """All that a fit leaves."""
    rows = torch.tensor([list(row.values()) for row in history], dtype=torch.float64)
    # Gradient steps take long to end.
    moments = fit.finish(start) if start.settings.local_step == "natural" else {}
    found = {name: torch.from_numpy(array) for name, array in moments.items()}
    return {**start.model.state_dict(), **start.posterior.state_dict(), **found, "history": rows}


def whole(*kind: str) -> tuple[dict[str, Tensor], int]:
    """A fit that nobody stops, and how many steps it took."""
    taken = 0

    def count(state: Callable[[], Any], last: bool) -> None:
        nonlocal taken
        taken += 1

    with using(torch.Generator().manual_seed(1)):
        start = begun(*kind, seed=1)
        history = train(**start.arguments, on_step=count)
        return outcome(start, history), taken - 1  # the last call is that at the end


def through_a_file(state: Any) -> Any:
    """What JSON and plain arrays keep of a state; anything else fails."""
    if isinstance(state, Tensor):
        return torch.from_numpy(state.detach().numpy().copy())
    if isinstance(state, dict):
        assert all(isinstance(key, str) for key in state)
        return {key: through_a_file(value) for key, value in state.items()}
    return json.loads(json.dumps(state, allow_nan=False))


def in_parts(after: list[int], *kind: str) -> dict[str, Tensor]:
    """A fit that is killed after so many steps and goes on in a world of other random numbers."""
    state, taken = None, 0

    def stop(current: Callable[[], dict[str, Any]], last: bool) -> None:
        nonlocal state, taken
        taken += 1
        if taken in after:
            state = through_a_file(current())
            raise Killed

    for seed in range(1, 2 + len(after)):
        with using(torch.Generator().manual_seed(seed)), suppress(Killed):
            start = begun(*kind, seed=seed)
            history = train(**start.arguments, state=state, on_step=stop)
            return outcome(start, history)
    raise AssertionError


@pytest.mark.parametrize("local_step", ["natural", "gradient"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("scheme", POSTERIORS)
@pytest.mark.parametrize("name", ["negative_binomial", "gaussian"])
def test_a_fit_in_parts_is_the_fit(
    name: str, scheme: str, optimizer: str, local_step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: within an epoch, at its end, twice, and after the last step."""
    monkeypatch.setattr(Gradient, "held_out", (3, 1))  # many steps would only take long
    kind = (name, scheme, optimizer, local_step)
    expected, n_steps = whole(*kind)
    assert n_steps == N_EPOCHS * N_BATCHES
    for after in ([7, 9], [n_steps + 1]):
        found = in_parts(after, *kind)
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def test_what_is_not_looked_at_yet_is_in_the_state() -> None:
    """Losses of epochs that a GPU was not asked for."""
    kind = ("negative_binomial", "unamortized", "adam", "natural")
    states: list[Any] = []

    def run(seed: int, state: Any) -> list[dict[str, float]]:
        with using(torch.Generator().manual_seed(seed)):
            start = begun(*kind, seed=seed)
            options = {"look_every": 1000, "evaluate_every": 100, "state": state}
            return train(
                **start.arguments | options,
                on_step=lambda current, last: states.append(copy.deepcopy(current())),
            )

    expected = run(1, None)
    for state in (states[9], states[11]):
        assert state["history"] == {}
        np.testing.assert_equal(run(2, state), expected)


def test_early_stopping_goes_on_where_it_was() -> None:
    """The best state comes from before the stop, and patience is not counted anew."""
    kind = ("gaussian", "unamortized", "adam", "natural")

    class Falls:
        """Best at its second judgement."""

        n_asked = 0

        def elbo(self, model: VAE) -> float:
            self.n_asked += 1
            return -abs(self.n_asked - 2.0)

        def state_dict(self) -> dict[str, Any]:
            return {"n_asked": self.n_asked}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.n_asked = state["n_asked"]

    def run(state: Any, stop_after: int) -> tuple[Any, Any, Any]:
        taken, found = 0, None

        def on_step(current: Callable[[], Any], last: bool) -> None:
            nonlocal taken, found
            taken += 1
            if taken == stop_after:
                found = through_a_file(current())
                raise Killed

        with using(torch.Generator().manual_seed(1)):
            start = begun(*kind, seed=1)
            stopping = EarlyStopping(patience=2)
            options = {"held_out": Falls(), "early_stopping": stopping, "state": state}
            history = None
            with suppress(Killed):
                history = train(**start.arguments | options, on_step=on_step)
            return found, history, start.model.state_dict()

    _, expected, best = run(None, -1)
    assert len(expected) == 4
    state, _, _ = run(None, 3 * N_BATCHES + 1)
    _, history, found = run(state, -1)
    np.testing.assert_equal(history, expected)
    for name, value in best.items():
        assert torch.equal(found[name], value)


def test_the_compiled_adam_and_torchs_go_on_from_each_other() -> None:
    gradients = [torch.randn(5, 3) * 10.0**-i for i in range(6)]
    start = torch.randn(5, 3)

    def moved(first: Any, second: Any) -> Tensor:
        parameter = start.clone().requires_grad_()
        optimizer = first([parameter], lr=0.03)
        for i, gradient in enumerate(gradients):
            if i == 3:
                state = state_of(optimizer)
                optimizer = second([parameter], lr=0.03)
                load_state(optimizer, state)
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    expected = moved(torch.optim.Adam, torch.optim.Adam)
    assert isinstance(adam([start]), CompiledAdam)
    pairs = ((CompiledAdam, torch.optim.Adam), (torch.optim.Adam, CompiledAdam))
    for first, second in (*pairs, (CompiledAdam, CompiledAdam)):
        # roundings of float32
        torch.testing.assert_close(moved(first, second), expected, rtol=1e-6, atol=1e-6)


# --- gradients of several processes -------------------------------------------------------------


class SameDraws(Posterior):
    """Any posterior, with draws of each cell that do not depend on its batch."""

    def __init__(self, inner: Posterior, noise: Tensor) -> None:
        super().__init__()
        self.inner, self.noise = inner, noise
        self.visit, self.step, self.descend = inner.visit, inner.step, inner.descend
        self._index: Tensor | None = None

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        self._index = batch.index
        q: Distribution = self.inner(model, batch, kl_weight)
        return q

    def points(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        index, self._index = self._index, None
        return normal_like(like, shape) if index is None else self.noise[index]


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("name", ["gaussian", "negative_binomial"])
def test_gradients_of_two_parts_add_up_to_those_of_the_whole(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, of which one has more cells; a prior of the weights counts once."""
    n = 14
    model = model_of(name, encoder=POSTERIORS[kind].has_encoder)
    given, x = posterior_of(kind, n, 2), cells_of(model, n)
    noise = torch.randn(n, 2, dtype=torch.float64)
    precision = torch.rand(1, 16, dtype=torch.float64)

    def step_on(
        rows: Tensor, reduce_gradients: Callable[[list[Tensor], int], None] | None
    ) -> list[Tensor]:
        moved, posterior = copy.deepcopy(model), SameDraws(copy.deepcopy(given), noise)
        monkeypatch.setattr(objectives, "normal_like", posterior.points)
        step = Step(
            moved,
            posterior,
            torch.optim.SGD(moved.parameters(), lr=1e-3),
            n_obs=2 * n,
            n_samples=1,
            kl_weight=0.7,
            output_precision=precision,
            reduce_gradients=reduce_gradients,
        )
        assert not step.replayable
        batch = batch_of(x[rows], index=rows, sparse=True)
        posterior.visit(batch.host_index)
        step(batch)
        return [parameter.detach() for parameter in moved.parameters()]

    first: list[Tensor] = []

    def keep(gradients: list[Tensor], n_cells: int) -> None:
        first.extend(gradient * n_cells for gradient in gradients)

    def add(gradients: list[Tensor], n_cells: int) -> None:
        for gradient, other in zip(gradients, first, strict=True):
            gradient.mul_(n_cells).add_(other).div_(n)

    order = torch.randperm(n)
    expected = step_on(order, None)
    step_on(order[: n // 3], keep)
    found = step_on(order[n // 3 :], add)
    named = [(key, parameter.detach()) for key, parameter in model.named_parameters()]
    for (key, before), value, wanted in zip(named, found, expected, strict=True):
        if kind == "semi" and key.startswith("encoder"):
            continue  # what it learns from is drawn anew in each step
        by = wanted - before
        assert by.abs().max() > 0
        assert (value - wanted).abs().max() <= 1e-9 * by.abs().max()  # roundings


@pytest.mark.parametrize("kind", POSTERIORS)
def test_a_hook_that_changes_nothing_changes_nothing(kind: str) -> None:
    """It is called once a step, with every parameter's gradient in the order of parameters."""
    seen: list[list[torch.Size]] = []

    def watch(gradients: list[Tensor], n_cells: int) -> None:
        assert n_cells == 15 or n_cells == 9
        seen.append([gradient.shape for gradient in gradients])

    results = []
    for hook in (None, watch):
        with using(torch.Generator().manual_seed(1)):
            start = begun("negative_binomial", kind, "adam", "natural", seed=1)
            history = train(**start.arguments | {"reduce_gradients": hook})
            results.append(outcome(start, history))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=0, equal_nan=True)
    assert seen == [[p.shape for p in start.model.parameters()]] * (N_EPOCHS * N_BATCHES)


def test_a_parameter_without_a_gradient_has_one_of_zeros_in_the_hook() -> None:
    """Processes sum as many numbers, whatever their batches have to say."""
    model = model_of("gaussian", encoder=True)
    found: list[list[Tensor]] = []
    step = Step(
        model,
        posterior_of("unamortized", 3, 2),
        OPTIMIZERS["sgd"](model.parameters(), lr=0.1),
        n_obs=3,
        n_samples=1,
        kl_weight=1.0,
        reduce_gradients=lambda gradients, n_cells: found.append(gradients),
    )
    batch = batch_of(cells_of(model, 3))
    step.posterior.visit(batch.host_index)
    step(batch)
    (gradients,) = found
    n_encoder = len(list(model.encoder.parameters()))
    assert all(not gradient.any() for gradient in gradients[-n_encoder:])
    assert all(gradient.any() for gradient in gradients[:2])
