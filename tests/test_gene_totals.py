"""Right means: a start by regression, a prior of the last weights, totals that are given back."""

import numpy as np
import pytest
import torch
from helpers import SCHEMES, small_counts, small_data, small_fit
from scipy import optimize
from small_models import batch_of, cells_of, model_of

from scuvae import tl
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.unamortized import UnamortizedPosterior
from scuvae.inference.training.gene_totals import GeneTotals
from scuvae.inference.training.linear_start import fit_loadings, start_decoder
from scuvae.inference.training.optimizers import adam
from scuvae.inference.training.step import Step
from scuvae.model.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("fixed_random_state")

COUNTS = sorted({kind.name for kind in LIKELIHOODS.values() if kind.support == "counts"})


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batches", [0, 2])
def test_loadings_of_counts_are_the_penalised_regression(n_batches: int) -> None:
    """Against scipy's minimum of the same objective, gene by gene."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(80, 2))
    size = rng.uniform(50, 150, 80)
    one_hot = np.eye(2)[rng.integers(2, size=80)]
    design = np.hstack([np.ones((80, 1)), z, one_hot[:, : n_batches or 0]])
    x = rng.poisson(size[:, None] * np.exp(rng.normal([-3, -4, -2.5], 0.2) + 0.7 * z[:, :1]))
    covariates = torch.tensor(one_hot) if n_batches else None
    batch = batch_of(
        torch.tensor(x.astype(float)),
        size_factor=torch.tensor(size),
        covariates=covariates,
        sparse=True,
    )
    b, v = fit_loadings(batch, torch.tensor(z), link="softmax", n_steps=12)
    for gene in range(3):

        def loss(w: np.ndarray, gene: int = gene) -> float:
            eta = design @ w
            fit = size @ np.exp(eta) - x[:, gene] @ eta
            return float(fit + 0.5 * (w[1:] ** 2).sum())

        best = optimize.minimize(loss, np.array([-3.0] + [0.0] * (design.shape[1] - 1)), tol=1e-12)
        found = np.concatenate([[b[gene].item()], v[gene].numpy()])
        # The objective is flat to the minimiser's gradients of 1e-5.
        assert loss(found) < best.fun + 1e-6


def test_loadings_of_values_are_least_squares() -> None:
    z = torch.randn(50, 2, dtype=torch.float64)
    x = 3 + z @ torch.randn(2, 4, dtype=torch.float64) + 0.1 * torch.randn(50, 4).double()
    b, v = fit_loadings(batch_of(x), z, link="identity")
    design = torch.cat([torch.ones(50, 1).double(), z], 1)
    ridge = torch.diag(torch.tensor([0.0, 1.0, 1.0]).double())
    expected = torch.linalg.solve(design.T @ design + ridge, design.T @ x)
    torch.testing.assert_close(torch.cat([b[:, None], v], 1), expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_layers", "linear_path"), [(0, False), (1, True), (2, True)])
@pytest.mark.parametrize("n_covariates", [0, 2])
@pytest.mark.parametrize("slopes", [False, True])
def test_the_decoder_starts_linear(
    n_layers: int, linear_path: bool, n_covariates: int, slopes: bool
) -> None:
    sizes = {"n_layers": n_layers, "linear_path": linear_path, "n_covariates": n_covariates}
    model = model_of("poisson", slopes=slopes, **sizes)
    covariates = None
    if n_covariates:
        covariates = torch.eye(2).double()[torch.arange(30) % 2]
    batch = batch_of(cells_of(model_of("poisson"), 30), covariates=covariates, sparse=True)
    z = torch.randn(30, 2, dtype=torch.float64)
    start_decoder(model, batch, z)
    b, v = fit_loadings(batch, z, link="softmax")
    parts = [z] if covariates is None else [z, covariates]
    torch.testing.assert_close(model.decoder(z, covariates), b + torch.cat(parts, 1) @ v.T)


# --- the prior ------------------------------------------------------------------------------------


def test_the_prior_is_added_to_the_gradient_of_the_last_weights() -> None:
    """One step of gradient descent with and without it differs by the prior's own gradient."""
    moved = []
    for with_prior in (False, True):
        torch.manual_seed(0)
        model = model_of("poisson", linear_path=True, dtype=torch.float32)
        before = model.decoder.output.weight.detach().clone()
        precision = model.decoder.output_precision(1000)
        batch = batch_of(cells_of(model, 9), sparse=True)
        posterior = UnamortizedPosterior(torch.zeros(9, 2), torch.zeros(9, 3))
        posterior.visit(torch.arange(9))
        step = Step(
            *(model, posterior, torch.optim.SGD(model.parameters(), lr=1e-3)),
            n_obs=9,
            n_samples=1,
            kl_weight=1.0,
            output_precision=precision if with_prior else None,
        )
        torch.manual_seed(1)
        step(batch)
        moved.append(model.decoder.output.weight.detach() - before)
    assert precision.shape == (1, 16 + 2)
    told = model_of("poisson", linear_path=True, slopes=True, n_covariates=3).decoder
    of_slopes, rest = told.output_precision(1000).split([16 + 3 * 2, 2 + 3], 1)
    assert of_slopes[0, 16:].min() > rest.max()  # what batches do otherwise is believed least
    assert (of_slopes[0, :16] == precision[0, :16]).all()
    # Hidden units are believed less than the linear path, and less among few cells.
    assert precision[0, 0] > precision[0, -1] > 0
    assert model.decoder.output_precision(100)[0, 0] > precision[0, 0]
    torch.testing.assert_close(
        moved[1] - moved[0], -1e-3 * precision * before, rtol=1e-3, atol=1e-6
    )


def test_adam_takes_it_too() -> None:
    model = model_of("poisson", linear_path=True, dtype=torch.float32)
    optimizer = adam(model.parameters(), lr=1e-2)
    weight = model.decoder.output.weight
    size = weight.detach().norm()
    posterior = UnamortizedPosterior(torch.zeros(9, 2), torch.zeros(9, 3))
    batch = batch_of(cells_of(model, 9), sparse=True)
    precision = torch.full((1, 18), 1e6)
    step = Step(
        *(model, posterior, optimizer),
        n_obs=9,
        n_samples=1,
        kl_weight=1.0,
        output_precision=precision,
    )
    for _ in range(30):
        posterior.visit(torch.arange(9))
        step(batch)
    assert weight.detach().norm() < 0.8 * size


# --- totals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_totals_are_those_of_the_moments_and_are_given_back(name: str) -> None:
    model = model_of(name, gain=0.5)
    x = cells_of(model, 40)
    x[:, 0] = 0.0
    x[:, 1] += 5.0
    q = Gaussian(torch.randn(40, 2).double(), torch.full((40, 2), 0.1).double())
    batch = batch_of(x, sparse=True)
    totals = GeneTotals(model, 64)
    for half in (torch.arange(15), torch.arange(15, 40)):
        part = Gaussian(q.mean[half], q.stddev[half])
        totals.add(batch.take(half), part)
    torch.testing.assert_close(totals.observed, x.sum(0).double())
    z = q.sample((4000,))
    with torch.no_grad():
        mean = model.likelihood.moments(model.decoder(z), batch.size_factor).mean
    # Standard errors of 4,000 draws of 40 cells are below .1 %.
    torch.testing.assert_close(totals.predicted, mean.mean(0).sum(0), rtol=5e-3, atol=1e-2)
    share = totals.ratio[1:] * (totals.observed.sum() / totals.predicted.sum())
    assert totals.off == pytest.approx(float((share - 1).abs().max()))
    for _ in range(8):
        totals = GeneTotals(model, 64)
        totals.add(batch, q)
        totals.give_back()
    totals = GeneTotals(model, 64)
    totals.add(batch, q)
    ratio = totals.ratio[1:]
    if name == "zero_inflated_negative_binomial":
        ratio = ratio / ratio.mean()  # what dropouts take of a total no intercept gives back
    torch.testing.assert_close(ratio, torch.ones(11).double(), rtol=1e-3, atol=0)
    assert totals.predicted[0] < 1e-3


@pytest.mark.parametrize("amortized", SCHEMES)
@pytest.mark.parametrize("name", COUNTS)
def test_a_fit_gives_back_each_genes_total(name: str, amortized: bool | str) -> None:
    adata = small_data(name, n_obs=150)
    small_fit(adata, likelihood=name, amortized=amortized, max_epochs=15)
    tl.denoise(adata)
    observed = np.asarray(adata.X.sum(0)).ravel()
    predicted = adata.layers["scuvae_denoised"].sum(0)
    ratio = predicted / observed
    if name == "zero_inflated_negative_binomial":
        ratio /= ratio.mean()  # what dropouts take of a total no intercept gives back
    np.testing.assert_allclose(ratio, 1, rtol=0.02)


def test_a_gene_of_heavy_tails_too() -> None:
    """Whose dispersion lets a negative binomial bear any mean."""
    adata = small_data("negative_binomial", n_obs=150)
    x = adata.X.toarray() if hasattr(adata.X, "toarray") else np.array(adata.X)
    x[:, 0] = 0
    x[::30, 0] = 400
    adata.X = x
    small_fit(adata, likelihood="negative_binomial", max_epochs=15)
    predicted = tl.denoise(adata, genes=[adata.var_names[0]]).to_numpy().sum()
    assert predicted == pytest.approx(x[:, 0].sum(), rel=0.1)


def test_a_gene_that_stays_far_off_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GeneTotals, "off", 0.3)
    with caplog.at_level("WARNING", logger="scuvae"):
        small_fit(small_counts(), max_epochs=1)
    assert "off by up to 30 %" in caplog.text
    monkeypatch.setattr(GeneTotals, "off", 0.1)
    caplog.clear()
    small_fit(small_counts(), max_epochs=1)
    assert not caplog.records
