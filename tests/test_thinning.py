"""Encoders that have seen cells of few counts, and what they see of a cell."""

from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import small_counts, small_fit, unsealed
from scipy import stats
from small_models import COUNTS, batch_of, cells_of, model_of

from scuvae import get, tl
from scuvae.batches import SparseRows, thinning
from scuvae.batches.sparse_rows import dense, sparse
from scuvae.batches.thinning import FEWEST, shallow, with_shallow
from scuvae.inference.posteriors import semi_amortized
from scuvae.inference.posteriors.amortized import AmortizedPosterior
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.training.step import Step
from scuvae.model import Encoder
from scuvae.model.encoder import encoder_input

pytestmark = pytest.mark.usefixtures("fixed_random_state")


# --- thinning -----------------------------------------------------------------------------------


def test_depths_are_log_uniform() -> None:
    """Of deep cells, whose binomial draws move their depth by a thousandth and less."""
    x = torch.full((2000, 1), 1e7, dtype=torch.float64)
    found = dense(shallow(batch_of(x), 2000).x).numpy().ravel()
    share = np.log(found / FEWEST) / np.log(1e7 / FEWEST)
    assert stats.kstest(share, "uniform").pvalue > 1e-3


def test_counts_are_binomial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "uniform_like", lambda like: torch.full_like(like, 0.5))
    x = torch.full((1, 4000), 6.0)
    chance = (FEWEST / 24_000) ** 0.5
    found = dense(shallow(batch_of(x, sparse=True), 1).x)[0].int()
    expected = 4000 * stats.binom.pmf(range(7), 6, chance)
    counts = np.bincount(found, minlength=7)
    # Cells of the test with five counts at least; the tail together.
    few = expected < 5
    observed = np.append(counts[~few], counts[few].sum())
    assert stats.chisquare(observed, np.append(expected[~few], expected[few].sum())).pvalue > 1e-3


def test_cells_without_counts_to_spare_stay_as_they_are() -> None:
    x = torch.tensor([[0.0, 0, 0], [1, 0, 2], [4, 5, 1]])
    few = shallow(batch_of(x, sparse=True), 3)
    torch.testing.assert_close(dense(few.x), x)
    torch.testing.assert_close(few.size_factor, x.sum(1))


def test_what_is_not_whole_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "uniform_like", torch.ones_like)
    x = torch.full((1, 400), 0.5)
    found = dense(shallow(batch_of(x), 1).x)
    torch.testing.assert_close(found, x * FEWEST / 200)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_batch_is_followed_by_its_first_cells(is_sparse: bool) -> None:
    x = torch.poisson(torch.full((11, 30), 5.0))
    batch = batch_of(
        x,
        index=torch.arange(20, 31),
        size_factor=2 * x.sum(1),
        covariates=torch.eye(11)[:, :3],
        sparse=is_sparse,
    )
    seen = with_shallow(batch)
    assert len(seen) == len(dense(seen.x)) == 14
    torch.testing.assert_close(dense(seen.x)[:11], x, rtol=0, atol=0)
    assert seen.index.tolist() == [*range(20, 31), 20, 21, 22]
    torch.testing.assert_close(seen.covariates[11:], batch.covariates[:3])
    fewer = dense(seen.x)[11:]
    assert (fewer <= x[:3]).all()
    assert (fewer.sum(1) < x[:3].sum(1)).all()
    # A size factor that is twice the total stays so.
    torch.testing.assert_close(seen.size_factor[11:], 2 * fewer.sum(1))
    assert (sparse(seen.x).value > 0).all()
    torch.manual_seed(4)
    first = dense(with_shallow(batch).x)
    torch.manual_seed(4)
    assert torch.equal(dense(with_shallow(batch).x), first)
    assert not torch.equal(dense(with_shallow(batch).x), first)


def test_a_batch_of_two_cells_has_none_to_thin() -> None:
    batch = batch_of(torch.ones(2, 4))
    assert with_shallow(batch) is batch


def test_first_rows_and_rows_that_follow() -> None:
    x, y = torch.poisson(torch.ones(6, 9)), torch.poisson(torch.ones(2, 9))
    rows = SparseRows.from_dense(x)
    torch.testing.assert_close(rows.first(4).dense, x[:4])
    both = rows.followed_by(SparseRows.from_dense(y))
    torch.testing.assert_close(both.dense, torch.cat([x, y]))
    assert both.starts.tolist() == SparseRows.from_dense(torch.cat([x, y])).starts.tolist()


# --- what a step does with them -----------------------------------------------------------------


class Recorded(AmortizedPosterior):
    """Remembers what steps were taken on."""

    def forward(self, model: Any, batch: Any, kl_weight: float = 1.0) -> Any:
        self.batch = batch
        self.q = super().forward(model, batch, kl_weight)
        return self.q


@pytest.mark.parametrize("name", COUNTS)
def test_thinned_cells_count_in_gradients_and_not_in_losses(name: str) -> None:
    model = model_of(name, encoder=True)
    batch = batch_of(cells_of(model, 9), sparse=True)
    posterior = Recorded()
    step = Step(
        model,
        posterior,
        torch.optim.SGD(model.parameters(), lr=0.0),
        n_obs=18,
        n_samples=1,
        kl_weight=0.5,
    )
    torch.manual_seed(1)
    losses = step(batch)
    assert len(posterior.batch) == 12
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    # The same once more, by autograd: thinning and draws from the same random state.
    model.zero_grad()
    torch.manual_seed(1)
    seen = posterior.seen(model, batch)
    torch.testing.assert_close(dense(seen.x), dense(posterior.batch.x))
    terms = elbo(model, seen, model.encode(seen))
    (2.0 * (0.5 * terms.kl - terms.reconstruction).sum()).backward()
    torch.testing.assert_close(losses[0], terms.reconstruction[:9].sum().detach())
    torch.testing.assert_close(losses[1], terms.kl[:9].sum().detach())
    for found, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_values_that_are_no_counts_are_not_thinned() -> None:
    model = model_of("gaussian", encoder=True)
    batch = batch_of(cells_of(model, 9))
    assert AmortizedPosterior().seen(model, batch) is batch


# --- what an encoder sees -----------------------------------------------------------------------


def test_a_profile_and_its_depth() -> None:
    x = torch.poisson(torch.full((4, 7), 3.0, dtype=torch.float64))
    x[3] = 0
    found = encoder_input(x, "profile").numpy()
    total = np.maximum(x.sum(1, keepdim=True).numpy(), 1)
    np.testing.assert_allclose(found[:, :7], np.log1p(x.numpy() / total * 1000), rtol=1e-12)
    np.testing.assert_allclose(found[:, 7:], np.log(total) / 2 - 3, rtol=1e-12)
    deeper = encoder_input(8 * x, "profile").numpy()
    np.testing.assert_allclose(deeper[:, :7], found[:, :7], rtol=1e-12)


def kinds(n_obs: int, depth: float, seed: int) -> AnnData:
    """Three kinds of cells that differ in half of their genes, and half in none."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(0).gamma(0.5, size=(3, 60))
    profiles[:, 30:] = profiles[0, 30:]
    kind = rng.integers(3, size=n_obs)
    size = depth * np.exp(0.3 * rng.normal(size=(n_obs, 1)))
    mean = size * (profiles / profiles.sum(1, keepdims=True))[kind]
    adata = AnnData(rng.poisson(mean).astype(np.float32))
    adata.obs["kind"] = kind
    return adata


def nearest_kinds(fitted: AnnData, new: AnnData) -> float:
    """Share of new cells whose nearest fitted cell, by encoder means, is of their kind."""
    tl.project(new, fitted, amortized=True)
    tl.project(fitted, fitted, amortized=True, key_added="own")
    distance = np.linalg.norm(new.obsm["X_scuvae"][:, None] - fitted.obsm["own"][None], axis=2)
    return float((fitted.obs["kind"].to_numpy()[distance.argmin(1)] == new.obs["kind"]).mean())


@pytest.mark.parametrize("distilled", [False, True])
def test_an_encoder_labels_thinned_cells(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a fiftieth of the depth; without thinning and profiles it is led astray."""
    found = []
    for new in (True, False):
        if not new:
            monkeypatch.setattr("scuvae.io.model_arrays.encoder_input_of", lambda *args: "log1p")
            for module in (
                "posteriors.amortized",
                "posteriors.semi_amortized",
                "training.distillation",
            ):
                monkeypatch.setattr(f"scuvae.inference.{module}.with_shallow", lambda batch: batch)
        fitted = kinds(400, 2000, seed=1)
        options: dict[str, Any] = {"n_latent": 2, "n_hidden": 32, "max_epochs": 40}
        tl.fit(fitted, amortized=not distilled, likelihood="poisson", **options)
        if distilled:
            tl.to_encoder(fitted, max_epochs=40)
        found.append(nearest_kinds(fitted, kinds(300, 40, seed=2)))
    assert found[0] > 0.85
    assert found[1] < found[0] - 0.1


def test_an_encoder_of_before_is_read_back_as_it_was() -> None:
    """Fits recorded nothing of how values enter their encoder: counts did by log(1 + x)."""
    adata = small_fit(small_counts(), amortized=True)
    assert adata.uns["scuvae"]["params"]["encoder_input"] == "profile"
    assert get.model(adata).encoder.inputs == "profile"
    torch.manual_seed(0)
    old = Encoder(adata.n_vars, 3, n_hidden=8, inputs="log1p").eval()
    entry = unsealed(adata)
    del entry["params"]["encoder_input"]
    entry["state"]["encoder"] = {k: np.atleast_1d(v.numpy()) for k, v in old.state_dict().items()}
    x = torch.from_numpy(adata.X)
    with torch.no_grad():
        found = get.model(adata).encoder(x)
        expected = old.mean(old.hidden(torch.log1p(x)))
    torch.testing.assert_close(found.mean, expected)
    tl.refine(adata)  # and used as one
    assert get.model(adata).encoder.inputs == "log1p"


def test_an_encoder_of_values_that_are_no_counts_sees_them() -> None:
    adata = small_counts()
    adata.X = np.log1p(adata.X) - 1
    small_fit(adata, amortized=True, likelihood="gaussian")
    assert "encoder_input" not in adata.uns["scuvae"]["params"]
    assert get.model(adata).encoder.inputs == "values"


# --- an encoder that follows a table ------------------------------------------------------------


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "gaussian"])
def test_a_followers_gradient_is_that_of_its_own_elbo(name: str) -> None:
    """By finite differences in the encoder's parameters; nothing else gets a gradient."""
    model = model_of(name, encoder=True).train()
    batch = batch_of(cells_of(model, 8), sparse=name in COUNTS)
    given = torch.randn(8, 2, dtype=torch.float64)

    def loss() -> float:
        torch.manual_seed(7)
        posterior = semi_amortized.SemiAmortizedPosterior(given.clone(), given - 1)
        with torch.no_grad():
            seen = posterior._cells(model, batch)
            terms = elbo(model.eval(), seen, model.encode(seen))
        model.train()
        return float((0.5 * terms.kl - terms.reconstruction).sum())

    torch.manual_seed(7)
    posterior = semi_amortized.SemiAmortizedPosterior(given.clone(), given - 1)
    posterior.descend(model, batch, weight=1.0, kl_weight=0.5)
    assert model.decoder.training
    assert all(
        p.grad is None for part in (model.decoder, model.likelihood) for p in part.parameters()
    )
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(posterior.table.mean, given, rtol=0, atol=0)
    for parameter in model.encoder.parameters():
        flat, slope = parameter.detach().flatten(), parameter.grad.flatten()
        for i in torch.randperm(len(flat))[:4]:
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                values.append(loss())
                with torch.no_grad():
                    parameter.view(-1)[i] -= step
            # Central differences of float64 are right to some 1e-9 of a loss of some hundred nats.
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(
                slope[i].item(), abs=1e-3, rel=1e-4
            )


def test_table_and_decoder_do_not_ask_the_encoder() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(5)
        model = model_of("negative_binomial", encoder=True)
        x = cells_of(model, 12)
        mean = torch.randn(12, 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter += seed
        posterior = semi_amortized.SemiAmortizedPosterior(mean.clone(), mean - 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        step = Step(model, posterior, optimizer, n_obs=12, n_samples=1, kl_weight=1.0)
        torch.manual_seed(6)
        for _ in range(20):
            posterior.visit(torch.arange(12))
            step(batch_of(x, sparse=True))
        found.append((posterior.table.mean, *model.decoder.state_dict().values()))
        assert not torch.equal(posterior.table.mean, mean)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_drawn_cells_serve_some_steps() -> None:
    model = model_of("poisson", encoder=True)
    batch = batch_of(cells_of(model, 40, total=500.0), sparse=True)
    mean = torch.zeros(40, 2, dtype=torch.float64)
    posterior = semi_amortized.SemiAmortizedPosterior(mean, mean - 1)
    drawn = []
    for _ in range(2 * posterior.draw_every):
        seen = posterior._cells(model, batch)
        assert len(seen) == 53  # 30 drawn, 10 own, 13 thinned
        torch.testing.assert_close(dense(seen.x)[30:40], dense(batch.x)[:10])
        torch.testing.assert_close(seen.size_factor, dense(seen.x).sum(1))
        drawn.append(posterior._drawn)
    assert len({id(cells) for cells in drawn}) == 2
