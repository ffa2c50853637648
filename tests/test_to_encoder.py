"""An encoder for a fit without one: what it reaches, and what it leaves alone."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import (
    LIKELIHOOD_NAMES,
    N_LATENT,
    N_OBS,
    fingerprint,
    posterior_of,
    small_counts,
    small_data,
    small_fit,
    unchanged,
    unsealed,
)
from small_models import (
    as_q,
    batch_of,
    cells_of,
    exact_evidence,
    exact_posterior,
    linear_gaussian,
    model_of,
)

from scuvae import get, tl
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.posteriors.simulated import simulated
from scuvae.inference.training.distillation import distil
from scuvae.model import Encoder

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOOD_NAMES)
FEW: dict[str, Any] = {"max_epochs": 3, "batch_size": 32}


@cache
def _fitted(likelihood: str) -> AnnData:
    return small_fit(small_data(likelihood), likelihood=likelihood, batch_key="batch")


def fitted(likelihood: str = "negative_binomial") -> AnnData:
    return _fitted(likelihood).copy()


# --- what is reached ----------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_a_linear_encoder_reaches_the_exact_posterior(
    covariance: str, share: float, fixed_random_state: None
) -> None:
    model = linear_gaussian(n_latent=2, n_vars=8)
    x, new = cells_of(model, 256), cells_of(model, 100)
    mean, precision = exact_posterior(model, x)
    exact = torch.distributions.MultivariateNormal(
        mean, precision_matrix=precision.expand(len(x), 2, 2)
    )
    model.encoder = Encoder(8, 2, n_layers=0, covariance=covariance).double()
    batches = [batch_of(x[rows], index=rows) for rows in torch.arange(len(x)).split(64)]
    distil(
        model,
        as_q(exact),
        batches,
        held_out=None,
        learning_rate=0.1,
        max_epochs=300,
        share_simulated=share,
        weight_decay=0.0,
    )
    truth, precision = exact_posterior(model, new)
    with torch.no_grad():
        found = model.encode(batch_of(new))
        bound = elbo(model, batch_of(new), found, 2000).elbo
    # The family's best loses ½ (Σ ln Λ_kk − ln |Λ|) nats: none, if its covariance is full.
    loss = 0.0
    if covariance == "diagonal":
        loss = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    # A mean off by δ standard deviations costs ½ δ² nats.
    assert (exact_evidence(model, new) - bound).mean().item() == pytest.approx(loss, abs=0.02)
    assert (found.mean - truth).abs().max() < 0.3 * precision.diagonal().rsqrt().min()


def test_the_decoder_is_asked_for_no_gradient_and_not_moved(fixed_random_state: None) -> None:
    model = linear_gaussian(n_latent=2, n_vars=8)
    model.encoder = Encoder(8, 2, n_layers=1, n_hidden=4).double()
    x = cells_of(model, 20)
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    mean = torch.zeros(20, 2, dtype=torch.float64)
    rows = distil(
        model,
        Gaussian.of(mean, mean - 1),
        [batch_of(x)],
        held_out=[batch_of(x)],
        learning_rate=0.03,
        max_epochs=4,
    )
    assert len(rows) == 4
    assert all(np.isfinite(row["validation_elbo"]) for row in rows)
    for name, parameter in model.decoder.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad
    assert not model.encoder.training
    # Settled: the moments are those of the cells under the best weights.
    norm = model.encoder.hidden[2].norm
    hidden = model.encoder.hidden[:2](x)
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), rtol=1e-9, atol=1e-9)


def test_cells_are_drawn_from_the_decoder_at_their_posteriors(fixed_random_state: None) -> None:
    model = linear_gaussian(n_latent=2, n_vars=8)
    (layer,) = model.decoder.layers
    w, b, sigma = layer.weight.detach(), layer.bias.detach(), model.likelihood.scale.detach()
    n = 20_000
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(n, 2)
    q = Gaussian.of(mean, torch.zeros(n, 2, dtype=torch.float64))  # scale ln 2
    x = simulated(model, batch_of(torch.zeros(n, 8, dtype=torch.float64)), q).x
    covariance = np.log(2) ** 2 * w @ w.T + torch.diag(sigma**2)
    spread = covariance.diagonal().max().sqrt().item()
    # Four standard errors of a mean and of a covariance.
    torch.testing.assert_close(x.mean(0), w @ mean[0] + b, rtol=0, atol=4 * spread / n**0.5)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=4 * spread**2 * (2 / n) ** 0.5)


@pytest.mark.parametrize("totals", [True, False])
def test_sizes_of_drawn_cells(totals: bool, fixed_random_state: None) -> None:
    model = model_of("poisson")
    size = torch.tensor([0.01, 100.0], dtype=torch.float64)
    like = torch.zeros(2, 12, dtype=torch.float64)
    q = Gaussian.of(like[:, :2], like[:, :2])
    batch = simulated(model, batch_of(like, size_factor=size), q, totals)
    # A cell without a count has no logarithm of its total.
    assert batch.x[0].sum() == 0
    assert batch.size_factor.tolist() == ([1, batch.x[1].sum()] if totals else size.tolist())


def test_the_encoder_comes_close_to_the_cells_own_posteriors() -> None:
    adata = small_counts(n_obs=300)
    small_fit(adata, max_epochs=40, n_hidden=32)
    tl.to_encoder(adata, max_epochs=60)
    gap = adata.obs["scuvae_amortization_gap"]
    untrained = fitted_once(adata, 1)
    held_out = adata.obs["scuvae_split"] == "validation"
    assert gap[held_out].mean() < 0.25 * untrained[held_out].mean()
    assert gap.mean() > -3 * adata.obs["scuvae_amortization_gap_se"].mean()
    own, encoder = adata.obsm["X_scuvae"], adata.obsm["X_scuvae_encoder"]
    assert np.square(own - encoder).sum() < 0.2 * np.square(own - own.mean(0)).sum()


def fitted_once(adata: AnnData, max_epochs: int) -> np.ndarray:
    """The gaps of an encoder of so many epochs for the same fit."""
    again = adata.copy()
    entry = unsealed(again)
    entry["params"]["amortized"] = False
    del entry["state"]["encoder"]
    tl.to_encoder(again, max_epochs=max_epochs)
    return again.obs["scuvae_amortization_gap"].to_numpy()


# --- slots --------------------------------------------------------------------------------------


@every_likelihood
def test_the_fit_gains_an_encoder_and_nothing_else_changes(likelihood: str) -> None:
    before = fitted(likelihood)
    adata = before.copy()
    tl.to_encoder(adata, **FEW)
    for part in ("decoder", "likelihood"):
        assert fingerprint(adata.uns["scuvae"]["state"][part]) == fingerprint(
            before.uns["scuvae"]["state"][part]
        )
    for slot, values in posterior_of(before).items():
        np.testing.assert_array_equal(adata.obsm[slot], values)
    new = {"scuvae_amortization_gap", "scuvae_amortization_gap_se"}
    assert set(adata.obs) - set(before.obs) == new
    assert set(adata.obsm) - set(before.obsm) == {"X_scuvae_encoder", "X_scuvae_encoder_scale"}
    params = adata.uns["scuvae"]["params"]
    assert (params["amortized"], params["distilled"]["max_epochs"]) == ("distilled", 3)
    for slot in ("X_scuvae_encoder", "X_scuvae_encoder_scale"):
        assert adata.obsm[slot].shape == (N_OBS, N_LATENT)
        assert adata.obsm[slot].dtype == np.float32
        assert np.isfinite(adata.obsm[slot]).all()


def test_under_another_name_the_first_fit_is_left_alone() -> None:
    before = fitted()
    adata, same = before.copy(), before.copy()
    adata.obs["k_elbo"] = 1.0  # of an earlier fit of that name
    tl.to_encoder(adata, key_added="k", **FEW)
    tl.to_encoder(same, **FEW)
    assert fingerprint(adata.uns["scuvae"]) == fingerprint(before.uns["scuvae"])
    assert fingerprint(adata.uns["k"]) == fingerprint(same.uns["scuvae"])
    assert "k_elbo" not in adata.obs
    for slot in same.obsm:
        np.testing.assert_array_equal(adata.obsm[slot.replace("X_scuvae", "k")], same.obsm[slot])
    for name in ("split", "amortization_gap", "amortization_gap_se"):
        assert list(adata.obs[f"k_{name}"]) == list(same.obs[f"scuvae_{name}"])
    # Nothing is shared between the two.
    adata.obsm["k"][:] = 0
    np.testing.assert_array_equal(adata.obsm["X_scuvae"], before.obsm["X_scuvae"])
    # Another encoder for the first fit, in place of the one that is there.
    tl.to_encoder(adata, key_added="k", **FEW)
    np.testing.assert_array_equal(adata.obsm["k"], before.obsm["X_scuvae"])


@every_likelihood
def test_the_other_verbs_use_it(likelihood: str) -> None:
    adata = fitted(likelihood)
    tl.to_encoder(adata, **FEW)
    again = adata.copy()
    tl.amortization_gap(again)
    for name in ("scuvae_amortization_gap", "scuvae_amortization_gap_se"):
        np.testing.assert_array_equal(again.obs[name], adata.obs[name])
    new = small_data(likelihood)
    tl.project(new, adata, amortized=True)
    np.testing.assert_array_equal(new.obsm["X_scuvae"], adata.obsm["X_scuvae_encoder"])
    np.testing.assert_allclose(
        new.obsm["X_scuvae_scale"], adata.obsm["X_scuvae_encoder_scale"], rtol=1e-5
    )
    tl.project(new, adata)
    tl.refine(again)
    assert "X_scuvae_encoder" not in again.obsm
    assert get.model(again).encoder is not None


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_it_survives_a_file(suffix: str, tmp_path: Path) -> None:
    adata = fitted()
    tl.to_encoder(adata, key_added="k", **FEW)
    path = tmp_path / f"a{suffix}"
    getattr(adata, f"write_{suffix[1:]}")(path)
    read = (anndata.read_h5ad if suffix == ".h5ad" else anndata.read_zarr)(path)
    for slot in adata.obsm:
        np.testing.assert_array_equal(read.obsm[slot], adata.obsm[slot])
    assert read.uns["k"]["params"]["distilled"]["learning_rate"] == 0.01
    new, other = small_counts(seed=7), small_counts(seed=7)
    tl.project(new, read, key="k", amortized=True)
    tl.project(other, adata, key="k", amortized=True)
    np.testing.assert_array_equal(new.obsm["X_scuvae"], other.obsm["X_scuvae"])


def test_seeds() -> None:
    runs = []
    for rng in (0, 0, 1):
        adata = fitted()
        states = torch.get_rng_state()
        tl.to_encoder(adata, rng=rng, **FEW)
        assert torch.equal(torch.get_rng_state(), states)
        runs.append(adata.obsm["X_scuvae_encoder"])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 0.01


def test_the_gap_is_logged_for_both_parts(caplog: pytest.LogCaptureFixture) -> None:
    adata = fitted()
    with caplog.at_level(logging.INFO, logger="scuvae"):
        tl.to_encoder(adata, **FEW)
    held_out = (adata.obs["scuvae_split"] == "validation").to_numpy()
    for name, rows in (("training", ~held_out), ("held-out", held_out)):
        mean = adata.obs["scuvae_amortization_gap"][rows].mean()
        assert f"{rows.sum()} {name} cells: {mean:.2f} nats" in caplog.text


# --- cells that are unlike others ---------------------------------------------------------------


def test_without_held_out_cells_it_trains_to_the_end(caplog: pytest.LogCaptureFixture) -> None:
    adata = small_fit(small_counts(), validation_fraction=0.0)
    with caplog.at_level(logging.WARNING, logger="scuvae"):
        tl.to_encoder(adata, **FEW)
    assert "early stopping is off" in caplog.text
    assert adata.uns["scuvae"]["params"]["distilled"]["epochs"] == 3


@pytest.mark.filterwarnings("ignore:.*no counts")
def test_empty_cells_teach_nothing_and_get_the_prior() -> None:
    adata = small_counts()
    adata.X[[4, 50]] = 0
    small_fit(adata)
    tl.to_encoder(adata, **FEW)
    np.testing.assert_array_equal(adata.obsm["X_scuvae_encoder"][[4, 50]], 0)
    np.testing.assert_array_equal(adata.obsm["X_scuvae_encoder_scale"][[4, 50]], 1)
    assert np.isfinite(adata.obsm["X_scuvae_encoder"]).all()


# --- errors -------------------------------------------------------------------------------------


def fails(adata: AnnData, parts: list[str], **options: Any) -> None:
    with unchanged(adata), pytest.raises(ValueError) as caught:  # noqa: PT011
        tl.to_encoder(adata, **options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("amortized", [True, "semi"])
def test_a_fit_that_has_an_encoder(amortized: bool | str) -> None:
    adata = small_fit(small_counts(), amortized=amortized)
    fails(adata, ["adata.uns['scuvae'] has an encoder", f"amortized={amortized!r}", "key="])


def test_an_encoder_twice() -> None:
    adata = fitted()
    tl.to_encoder(adata, **FEW)
    fails(adata, ["amortized='distilled'"])


def test_what_is_missing_is_named() -> None:
    adata = fitted()
    fails(adata[:, 3:].copy(), ["lack 3 of the fit's genes"])
    fails(adata, ["adata.uns['k'] holds no fit"], key="k")
    lost = fitted()
    del lost.obsm["X_scuvae"]
    fails(lost, ["adata.obsm['X_scuvae'] is gone"])
    held_out = fitted()
    held_out.obs["scuvae_split"] = "validation"
    fails(held_out, ["adata.obs['scuvae_split']", "none to train on"])


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_learning_rates(rate: float) -> None:
    fails(fitted(), [f"learning_rate={rate!r}"], learning_rate=rate)
