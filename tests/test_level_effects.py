"""The prior of what covariates do to genes: does it learn how wide they are?"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from small_models import batch_of, cells_of, model_of

from scuvae import get, tl
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.training.level_effects import LevelEffects
from scuvae.inference.training.step import Step
from scuvae.model.covariates import Categorical, Continuous, Design

DESIGN = Design((Categorical("batch", ("a", "b", "c")),), (Continuous("age", 0.0, 1.0),), True)


class Told:
    """As much of a model as the prior asks for: offsets of many genes."""

    def __init__(self, design: Design, offsets: torch.Tensor) -> None:
        self.design, self.n_vars = design, len(offsets)
        self.decoder = torch.nn.Module()
        self.decoder.n_covariates = design.n_columns
        self.decoder.output = torch.nn.Linear(offsets.shape[1], len(offsets))
        self.decoder.output.weight.data = offsets


@pytest.mark.parametrize("scale", [0.03, 0.3])
def test_it_learns_the_scale_of_what_it_was_drawn_from(scale: float) -> None:
    """Offsets drawn from the prior and seen with noise: EM ends at the scale they were drawn with,
    and genes far out are shrunk less than those near zero."""
    rng = np.random.default_rng(0)
    n, widths = 6000, [1.0, 1.0, 1.0, 0.2]
    tau = rng.gamma(2.0, 0.5, (n, 2))  # four degrees of freedom
    of_column = np.repeat(tau, [3, 1], 1)
    truth = scale * np.array(widths) * rng.normal(size=(n, 4)) / np.sqrt(of_column)
    information = np.full((n, 4), (2 / scale / np.array(widths)) ** 2)
    seen = torch.from_numpy(truth + rng.normal(size=(n, 4)) / np.sqrt(information)).float()
    information = torch.from_numpy(information).float()
    model = Told(DESIGN, seen)
    effects = LevelEffects(model, torch.full((1, 4), 3.0))
    for _ in range(60):
        model.decoder.output.weight.data = seen * information / (information + effects.precision)
        effects.update(model, information)
    batch, age = effects.precision[:, 0], effects.precision[:, 3]
    assert (effects.precision[:, :3] == batch[:, None]).all()  # levels of one covariate alike
    # Laplace's variances and a mean of τ are approximations: a quarter off, either way.
    assert 0.75 < float(batch.mean().rsqrt()) / scale < 1.3
    assert 0.15 < float(age.mean().rsqrt()) / scale < 0.3
    far = torch.from_numpy(np.abs(truth[:, :3]).max(1) > 5 * scale)
    assert far.sum() > 100
    assert batch[far].max() < batch[~far].median() / 3
    shrunk = model.decoder.output.weight.detach().numpy()
    error = ((shrunk - truth) ** 2).mean()
    for fixed in (0.1, 3.0, 100.0, 3000.0):
        by_one = seen.numpy() * information.numpy() / (information.numpy() + fixed)
        assert error < ((by_one - truth) ** 2).mean()


def test_information_is_that_of_the_likelihood() -> None:
    """Poisson: that of ln μ is μ, and an offset's that of its cells, by the square of a number."""
    model = model_of("poisson", linear_path=True, n_covariates=4)
    model.design = DESIGN
    rows = torch.eye(3).double()[torch.arange(12) % 3]
    rows = torch.cat([rows, torch.linspace(-1, 2, 12).double()[:, None]], 1)
    batch = batch_of(cells_of(model_of("poisson"), 12), covariates=rows, sparse=True)
    q = Gaussian(torch.randn(12, 2).double(), torch.zeros(12, 3).double())
    effects = LevelEffects(model, torch.ones(1, 22).double())
    parts = [(batch, q)]
    found = effects.information(model, parts)
    eta = model.decoder(q.mean, rows).detach()
    mu = batch.size_factor[:, None] * torch.softmax(eta, 1)
    for k in range(4):
        expected = sum(rows[i, k] ** 2 * mu[i] for i in range(12))
        torch.testing.assert_close(found[:, k], expected)


@pytest.mark.parametrize("shift", [0.0, 1.4])
def test_batches_that_say_nothing_are_not_believed(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cells in two batches, but for six genes that one has more of."""
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 60)) * 0.5)
    x = rng.poisson(np.concatenate([rate, rate * np.exp(shift * (np.arange(60) < 6))]))
    options = {"n_latent": 2, "n_hidden": 8, "max_epochs": 40, "early_stopping": False}
    found = {}
    for name in ("learnt", "fixed"):
        adata = AnnData(x.astype(np.float32))
        adata.obs["batch"] = np.repeat(["a", "b"], 200)
        if name == "fixed":
            monkeypatch.setattr(LevelEffects, "update", lambda *args: None)
        tl.fit(adata, batch_key="batch", likelihood="poisson", **options)
        weight = get.model(adata).decoder.output.weight.detach()
        found[name] = (weight[:, -1] - weight[:, -2]).numpy()
    noise = {name: np.std(values[6:]) for name, values in found.items()}
    assert noise["learnt"] < (0.95 if shift else 0.75) * noise["fixed"]
    if shift:
        difference = found["learnt"] - np.median(found["learnt"])
        np.testing.assert_allclose(difference[:6], shift, atol=0.3)


def test_what_was_learnt_is_part_of_the_state() -> None:
    model = model_of("poisson", linear_path=True, n_covariates=4, dtype=torch.float32)
    model.design = replace(DESIGN)
    effects = LevelEffects(model, torch.ones(1, 22))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"n_obs": 9, "n_samples": 1, "kl_weight": 1.0}
    from scuvae.inference.posteriors.unamortized import UnamortizedPosterior

    posterior = UnamortizedPosterior(torch.zeros(9, 2), torch.zeros(9, 3))
    step = Step(model, posterior, optimizer, output_precision=effects.precision, **options)
    effects.update(model, torch.ones(model.n_vars, 4))
    kept = {name: value.clone() for name, value in step.state_dict()["output precision"].items()}
    moved = effects.precision.clone()
    effects.precision.fill_(1.0)
    step.load_state_dict(step.state_dict() | {"output precision": kept})
    assert (effects.precision == moved).all()
    assert not (moved == 1).all()
