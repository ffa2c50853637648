"""What the verbs of tl do to a fitted model, against truths outside the package."""

import logging
from collections.abc import Callable
from functools import cache
from itertools import pairwise
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
    N_VARS,
    SCHEMES,
    VERBS,
    WITH_REFERENCE,
    assert_same_posterior,
    fingerprint,
    posterior_of,
    small_counts,
    small_data,
    small_fit,
    unchanged,
    unsealed,
    verb_of,
)
from scipy import sparse as sp
from scipy.special import softmax
from scipy.stats import multivariate_normal
from torch.distributions import Independent, MultivariateNormal

from scuvae import datasets, get, runtime, tl
from scuvae.model.likelihoods import LIKELIHOODS

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOOD_NAMES)
every_scheme = pytest.mark.parametrize("amortized", SCHEMES)
with_encoder = pytest.mark.parametrize("amortized", [s for s in SCHEMES if s is not False])

# Sums of a few dozen float32 terms in another order, through ten or twenty local steps.
REORDERED = 2e-3


@cache
def _fitted(
    likelihood: str, amortized: bool | str, options: tuple[tuple[str, Any], ...]
) -> AnnData:
    adata = small_data(likelihood)
    return small_fit(
        adata, likelihood=likelihood, amortized=amortized, max_epochs=20, **dict(options)
    )


def fitted(
    likelihood: str = "negative_binomial", amortized: bool | str = "semi", **options: Any
) -> AnnData:
    return _fitted(likelihood, amortized, tuple(options.items())).copy()


def new_cells(likelihood: str = "negative_binomial", **shape: int) -> AnnData:
    return small_data(likelihood, seed=7, **shape)


def scores(adata: AnnData, n_samples: int = 200, key: str = "scuvae") -> dict[str, np.ndarray]:
    tl.score(adata, key=key, n_samples=n_samples)
    names = ("elbo", "reconstruction", "kl", "log_evidence")
    return {name: adata.obs[f"{key}_{name}"].to_numpy() for name in names}


def assert_same_up_to_ties(a: AnnData, b: AnnData) -> None:
    """Equal posteriors, but for what float32's noise decides where two answers are as good.

    Which start ends higher, and whether another step is worth its .01 nats, is a matter of noise
    in a few cells; .01 nats are √.02 = .14 posterior standard deviations.
    """
    scale = b.obsm["X_scuvae_scale"]
    moved = np.abs(a.obsm["X_scuvae"] - b.obsm["X_scuvae"]) / scale
    stretched = np.abs(np.log(a.obsm["X_scuvae_scale"] / scale))
    assert max(moved.max(), stretched.max()) < 0.2
    differ = (np.maximum(moved, stretched) > REORDERED).any(axis=1)
    assert differ.sum() <= 0.05 * len(differ)


# --- project ------------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_project_writes_the_slots_of_a_fit(likelihood: str, amortized: bool | str) -> None:
    reference, adata = fitted(likelihood, amortized), new_cells(likelihood)
    before = small_data(likelihood, seed=7)
    with unchanged(reference):
        assert tl.project(adata, reference, key_added="k") is None
        tl.project(adata, reference)
    for key in ("k", "X_scuvae"):
        slots = posterior_of(adata, key)
        assert {name.replace(key, "X_scuvae") for name in slots} == set(posterior_of(reference))
        for values in slots.values():
            assert type(values) is np.ndarray
            assert values.dtype == np.float32
            assert np.isfinite(values).all()
    entry, own = dict(adata.uns["k"]), dict(reference.uns["scuvae"])
    assert entry.pop("genes")["n_observed"] == N_VARS
    assert entry.pop("manifest") != own.pop("manifest")  # of what there is in each
    assert fingerprint(entry) == fingerprint(own)
    # By itself a complete model, of which nothing is shared with the reference.
    for name, array in adata.uns["scuvae"]["state"]["decoder"].items():
        assert not np.shares_memory(array, reference.uns["scuvae"]["state"]["decoder"][name])
    for slot in ("X_scuvae", "X_scuvae_scale"):
        np.testing.assert_array_equal(adata.obsm[slot], adata.obsm[slot.replace("X_scuvae", "k")])
    assert set(adata.obs) == set(before.obs) | {"k_scale", "scuvae_scale"}
    assert fingerprint(adata.X) == fingerprint(before.X)


@every_scheme
def test_project_finds_what_the_fit_found(amortized: bool | str) -> None:
    reference = fitted(amortized=amortized)
    again = small_counts()
    tl.project(again, reference, amortized=amortized is True)
    if amortized is True:
        assert_same_posterior(again, reference)  # the same encoder on the same cells
    else:
        difference = scores(again)["elbo"] - scores(reference.copy())["elbo"]
        # Two optima of 8 fixed draws each, and a few cells with two modes: tenths of a nat of
        # nearly a hundred.
        assert abs(difference.mean()) < 0.2
        assert abs(np.median(difference)) < 0.1


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
@every_scheme
def test_genes_are_matched_by_name(amortized: bool | str, container: Callable[[Any], Any]) -> None:
    reference, straight = fitted(amortized=amortized), new_cells()
    straight.X = container(straight.X)
    order = np.random.default_rng(0).permutation(N_VARS)
    permuted = straight[:, order].copy()
    tl.project(straight, reference)
    tl.project(permuted, reference)
    assert_same_posterior(permuted, straight)
    wrong = permuted.copy()
    wrong.var_names = straight.var_names  # what matching by position would see
    tl.project(wrong, reference)
    assert np.abs(wrong.obsm["X_scuvae"] - straight.obsm["X_scuvae"]).max() > 0.1


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix, sp.csc_array])
@every_likelihood
def test_genes_beyond_the_fits_are_dropped_and_logged(
    likelihood: str, container: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    wide = new_cells(likelihood, n_vars=N_VARS + 5)
    wide.X = container(wide.X)
    narrow = wide[:, :N_VARS].copy()
    reference = fitted(likelihood)
    with caplog.at_level(logging.INFO, logger="scuvae"):
        tl.project(wide, reference)
    assert any("5 genes unknown to the fit" in message for message in caplog.messages)
    tl.project(narrow, reference)
    assert_same_posterior(wide, narrow)


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
@every_scheme
@every_likelihood
def test_missing_genes_are_left_out_of_the_likelihood(
    likelihood: str,
    amortized: bool | str,
    container: Callable[[Any], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    reference, everything = fitted(likelihood, amortized), new_cells(likelihood)
    everything.X = container(everything.X)
    observed = np.arange(N_VARS) % 4 != 0
    some = everything[:, observed].copy()
    with caplog.at_level(logging.INFO, logger="scuvae"):
        tl.project(some, reference)
    assert any(f"{observed.sum()} of the fit's {N_VARS} genes" in m for m in caplog.messages)

    # Exact conditioning is a decoder without these genes' outputs.
    smaller = reference[:, observed].copy()
    entry = unsealed(smaller)
    entry["var_names"] = entry["var_names"][observed]
    entry["params"]["amortized"] = False  # the encoder cannot do without them
    last = f"layers.{entry['params']['n_layers']}"
    for name in ("weight", "bias"):
        entry["state"]["decoder"][f"{last}.{name}"] = entry["state"]["decoder"][f"{last}.{name}"][
            observed
        ]
    for name, value in entry["state"]["likelihood"].items():
        if value.shape == (N_VARS,):
            entry["state"]["likelihood"][name] = value[observed]
    entry["state"].pop("encoder", None)
    del entry["embed"]  # as fits of before the map are: what is of all genes has no place here
    directly = some.copy()
    tl.project(directly, smaller)
    assert_same_up_to_ties(some, directly)
    tl.score(some, n_samples=2)
    assert np.isfinite(some.obs["scuvae_elbo"]).all()


@every_scheme
@every_likelihood
def test_a_cell_depends_on_no_other_cell(
    likelihood: str, amortized: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, cells = fitted(likelihood, amortized), new_cells(likelihood)
    tl.project(cells, reference)
    order = np.random.default_rng(0).permutation(N_OBS)
    shuffled = new_cells(likelihood)[order].copy()
    tl.project(shuffled, reference)
    assert_same_up_to_ties(shuffled, cells[order])
    alone = [new_cells(likelihood)[i].copy() for i in range(0, N_OBS, 6)]
    for cell in alone:
        tl.project(cell, reference)
    # Of ten cells one may fall the other way.
    moved = [
        np.abs(cell.obsm["X_scuvae"] - cells[cell.obs_names].obsm["X_scuvae"]).max()
        for cell in alone
    ]
    assert sorted(moved)[-2] < REORDERED
    assert max(moved) < 0.2
    monkeypatch.setattr("scuvae.runtime.CHUNK", 7)
    chunked = new_cells(likelihood)
    tl.project(chunked, reference)
    assert_same_up_to_ties(chunked, cells)


def test_project_onto_the_reference_itself() -> None:
    reference = fitted()
    apart = small_counts()
    tl.project(apart, reference)
    itself = reference.copy()
    tl.project(itself, itself)
    assert fingerprint(itself.obsm) == fingerprint(apart.obsm)
    assert fingerprint(itself.uns) == fingerprint(apart.uns)


def test_project_needs_no_cells_in_the_reference() -> None:
    reference, adata, other = fitted(), new_cells(), new_cells()
    tl.project(adata, reference)
    tl.project(other, reference[:0].copy())
    assert fingerprint(other) == fingerprint(adata)


@pytest.mark.parametrize(
    ("amortized", "suffix"), [*((scheme, "h5ad") for scheme in SCHEMES), ("semi", "zarr")]
)
def test_project_from_a_file(amortized: bool | str, suffix: str, tmp_path: Path) -> None:
    reference, adata, other = fitted(amortized=amortized), new_cells(), new_cells()
    path = tmp_path / f"fit.{suffix}"
    getattr(reference, f"write_{suffix}")(path)
    tl.project(adata, reference)
    tl.project(other, path)
    assert fingerprint(other.obsm) == fingerprint(adata.obsm)
    third = new_cells()
    tl.project(third, str(path))
    assert fingerprint(third.obsm) == fingerprint(adata.obsm)


def test_project_reads_the_layer_it_is_told() -> None:
    reference, adata, other = fitted(), new_cells(), new_cells()
    tl.project(adata, reference)
    other.layers["raw"], other.X = other.X, np.log1p(other.X)
    tl.project(other, reference, layer="raw")
    assert_same_posterior(other, adata)
    # and remembers it
    np.testing.assert_array_equal(scores(other)["elbo"], scores(adata)["elbo"])


def test_project_tells_batches_apart() -> None:
    reference = fitted(batch_key="batch")
    first, second = new_cells(), new_cells()
    first.obs["batch"], second.obs["batch"] = "b0", "b1"
    tl.project(first, reference)
    tl.project(second, reference)
    assert np.abs(first.obsm["X_scuvae"] - second.obsm["X_scuvae"]).max() > 0.01


@every_scheme
@pytest.mark.parametrize(
    "likelihood", [n for n in LIKELIHOOD_NAMES if LIKELIHOODS[n].support == "counts"]
)
def test_projecting_empty_cells_warns_and_gives_the_prior(
    likelihood: str, amortized: bool | str
) -> None:
    reference, adata = fitted(likelihood, amortized), new_cells(n_obs=2)
    adata.X[:] = 0
    with pytest.warns(UserWarning, match="2 cells have no counts") as caught:
        tl.project(adata, reference)
    assert [w.filename for w in caught] == [__file__]
    # Its likelihood is flat: the best q is N(0, I), to the float32 of a few local steps.
    np.testing.assert_allclose(adata.obsm["X_scuvae"], 0, atol=1e-3)
    np.testing.assert_allclose(adata.obsm["X_scuvae_scale"], 1, atol=1e-3)


@pytest.mark.parametrize("verb", [tl.project, tl.refine])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@every_scheme
def test_the_family_can_be_chosen_and_the_model_still_be_read(
    amortized: bool | str, covariance: str, verb: Callable[..., object]
) -> None:
    reference = fitted(amortized=amortized)
    if verb is tl.project:
        adata = new_cells()
        tl.project(adata, reference, covariance=covariance)
    else:
        adata = reference.copy()
        tl.refine(adata, covariance=covariance)
    assert ("X_scuvae_covariance" in adata.obsm) == (covariance == "full")
    model = get.model(adata)
    with torch.no_grad():
        z = torch.zeros(1, N_LATENT)
        assert torch.equal(model.decoder(z), get.model(reference).decoder(z))
    kind = MultivariateNormal if covariance == "full" else Independent
    assert isinstance(get.posterior(adata), kind)
    # and refined again, in the family that is stored
    tl.refine(adata, key_added="again")
    assert ("again_covariance" in adata.obsm) == (covariance == "full")


# --- refine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_step", ["natural", "gradient"])
@every_scheme
@every_likelihood
def test_refine_lowers_no_cells_elbo(
    likelihood: str, amortized: bool | str, local_step: str
) -> None:
    adata = fitted(likelihood, amortized)
    steps = {"max_steps": 40} if local_step == "gradient" else {}
    tl.refine(adata, key_added="k", local_step=local_step, **steps)
    # Over the same draws of both: what is left is the noise of their difference.
    gain = scores(adata, 500, "k")["elbo"] - scores(adata, 500)["elbo"]
    assert gain.min() > -0.1
    assert gain.mean() > -0.005
    if amortized is True:
        assert gain.mean() > 0.05  # an encoder of 20 epochs leaves something to gain


@every_scheme
def test_refine_leaves_the_decoder_and_the_first_fit_alone(amortized: bool | str) -> None:
    adata = fitted(amortized=amortized)
    before = fingerprint(adata)
    tl.refine(adata, key_added="k")
    after = fingerprint(adata)
    assert after["uns"]["k"] == before["uns"]["scuvae"]
    assert after["uns"]["scuvae"] == before["uns"]["scuvae"]
    assert {name: after["obsm"][name] for name in before["obsm"]} == before["obsm"]
    assert adata.obs["k_split"].equals(adata.obs["scuvae_split"])
    entries = adata.uns["k"]["state"]["decoder"], adata.uns["scuvae"]["state"]["decoder"]
    assert not any(np.shares_memory(entries[0][name], entries[1][name]) for name in entries[0])


def test_refine_in_place_drops_what_no_longer_holds() -> None:
    adata = fitted(amortized=True)
    tl.score(adata, n_samples=2)
    tl.amortization_gap(adata, max_steps=1)
    tl.denoise(adata, n_samples=0)
    model = fingerprint(adata.uns)
    tl.sample(adata, n_samples=2)
    tl.calibration(adata, n_cells=3)
    tl.predictive_check(adata)
    tl.refine(adata)
    assert fingerprint(adata.uns) == model
    assert set(adata.obs) == {"batch", "expected", "cell_type", "scuvae_scale", "scuvae_split"}
    assert not [name for name in adata.layers if name is not None]
    other = fitted(amortized=True)
    tl.refine(other, key_added="k")
    for slot in ("X_scuvae", "X_scuvae_scale"):
        np.testing.assert_array_equal(adata.obsm[slot], other.obsm[slot.replace("X_scuvae", "k")])


@pytest.mark.parametrize("name", [n for n in VERBS if n != "fit"])
def test_copies(name: str) -> None:
    reference = fitted(amortized=name != "to_encoder")
    adata = new_cells() if name in WITH_REFERENCE else reference.copy()
    first: tuple[AnnData, ...] = (adata, reference) if name in WITH_REFERENCE else (adata,)
    with unchanged(adata, reference):
        result = verb_of(name)(*first, copy=True)
    assert name == "embed" or fingerprint(result) != fingerprint(adata)  # a fit has it already
    assert verb_of(name)(*first) is None
    assert fingerprint(result) == fingerprint(adata)


@pytest.mark.parametrize("name", [n for n in VERBS if n != "fit"])
def test_views_leave_their_parent_alone(name: str) -> None:
    reference = fitted(amortized=name != "to_encoder")
    parent = new_cells() if name in WITH_REFERENCE else reference
    whole = parent[:20].copy()
    view = parent[:20]
    with unchanged(parent), pytest.warns(UserWarning, match="view"):
        verb_of(name)(*((view, reference) if name in WITH_REFERENCE else (view,)))
    verb_of(name)(*((whole, reference) if name in WITH_REFERENCE else (whole,)))
    assert fingerprint(view) == fingerprint(whole)


# --- score --------------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_score_columns(likelihood: str, amortized: bool | str) -> None:
    adata = fitted(likelihood, amortized)
    others = set(adata.obs)
    values = scores(adata)
    further = ("elbo_se", "log_evidence_se", "effective_sample_size", "pareto_k")
    names = {f"scuvae_{name}" for name in (*values, *further)}
    assert set(adata.obs) == others | names
    for name in further:
        column = adata.obs[f"scuvae_{name}"]
        assert column.dtype == np.float32
        assert np.isfinite(column).all()
    for column in values.values():
        assert column.dtype == np.float32
        assert np.isfinite(column).all()
    np.testing.assert_allclose(  # a difference of two float32
        values["elbo"], values["reconstruction"] - values["kl"], rtol=1e-6
    )
    q = get.posterior(adata)
    prior = get.model(adata).prior.gaussian().as_family("diagonal").as_torch()
    if isinstance(q, MultivariateNormal):
        prior = MultivariateNormal(prior.mean, torch.eye(N_LATENT))
    kl = torch.distributions.kl_divergence(q, prior)  # torch's own formula
    np.testing.assert_allclose(values["kl"], kl, rtol=1e-4, atol=1e-4)  # float32 log dets
    # Jensen, for the means over 200 draws; a cell's own may err by their noise.
    noise = adata.obs["scuvae_elbo_se"] + adata.obs["scuvae_log_evidence_se"]
    assert (values["log_evidence"] > values["elbo"] - 0.5 - 5 * noise).all()
    assert values["log_evidence"].mean() > values["elbo"].mean()


def test_score_is_seeded() -> None:
    runs = []
    for rng in (0, 0, 1):
        adata = fitted()
        with unchanged():
            tl.score(adata, rng=rng, n_samples=5)
        runs.append(fingerprint(adata.obs))
    alias = fitted()
    tl.score(alias, random_state=1, n_samples=5)
    assert runs[0] == runs[1] != runs[2] == fingerprint(alias.obs)


def test_the_bound_rises_with_its_draws() -> None:
    adata = fitted("negative_binomial", True)
    bounds = {}
    for n_samples in (1, 10, 100):
        runs = [tl.score(adata, n_samples=n_samples, rng=r, copy=True) for r in range(16)]
        bounds[n_samples] = np.array([run.obs["scuvae_log_evidence"].mean() for run in runs])
    for few, many in pairwise(bounds.values()):
        gain = many - few
        assert gain.mean() > 5 * gain.std(ddof=1) / np.sqrt(16)  # five standard errors, 16 seeds


@pytest.fixture(scope="module")
def linear() -> AnnData:
    """A linear Gaussian model, whose evidence has a closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 12)) + rng.normal(size=(50, 12)) + 1
    adata = AnnData(x.astype(np.float32))
    return small_fit(
        adata, likelihood="gaussian", n_layers=0, covariance="full", max_epochs=40, n_latent=2
    )


def test_linear_gaussian_evidence(linear: AnnData) -> None:
    model = get.model(linear)
    layer = model.decoder.layers[0]
    w, b = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    s2 = float(model.likelihood.scale[0].detach()) ** 2
    x = linear.X.astype(np.float64)
    truth = multivariate_normal(b, w @ w.T + s2 * np.eye(12)).logpdf(x)

    values = scores(linear, 1000)
    # With the exact posterior every importance weight is the evidence itself: float32 remains.
    np.testing.assert_allclose(values["log_evidence"], truth, atol=3e-3)

    q = get.posterior(linear)
    m, v = q.mean.double().numpy(), q.covariance_matrix.double().numpy()
    precision = np.eye(2) + w.T @ w / s2
    # float32, and a cell's last step may be a shortened one.
    np.testing.assert_allclose(v, np.linalg.inv(precision)[None].repeat(50, 0), atol=1e-4)
    residual = ((x - b - m @ w.T) ** 2).sum(1) + np.einsum("gk,nkl,gl->n", w, v, w)
    reconstruction = -0.5 * (12 * np.log(2 * np.pi * s2) + residual / s2)
    np.testing.assert_allclose(reconstruction - values["kl"], truth, atol=1e-3)  # float32
    # 1,000 draws of a term with variance about L/2 = 1: five standard errors.
    np.testing.assert_allclose(values["elbo"], truth, atol=5 * np.sqrt(1 / 1000) * 1.5)
    assert abs(values["elbo"].mean() - truth.mean()) < 5 * 1.5 / np.sqrt(1000 * 50)


def test_linear_gaussian_diagonal_family(linear: AnnData) -> None:
    """Same means, s_k² = 1/Λ_kk, and an ELBO lower by ½ (Σ ln Λ_kk − ln |Λ|)."""
    adata = linear.copy()
    tl.project(adata, linear, key_added="d", covariance="diagonal")
    model = get.model(linear)
    w = model.decoder.layers[0].weight.detach().double().numpy()
    precision = np.eye(2) + w.T @ w / float(model.likelihood.scale[0].detach()) ** 2
    expected = np.diag(precision) ** -0.5
    # Fixed draws and float32: a thousandth of a posterior's scale and mean.
    np.testing.assert_allclose(adata.obsm["d_scale"], expected[None].repeat(50, 0), rtol=1e-3)
    np.testing.assert_allclose(adata.obsm["d"], adata.obsm["X_scuvae"], atol=2e-3)
    lower = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    loss = scores(adata, 1000)["elbo"].mean() - scores(adata, 1000, "d")["elbo"].mean()
    # 50,000 paired draws with a spread of about a nat: five standard errors.
    assert abs(loss - lower) < 5 / np.sqrt(50_000)


# --- the amortization gap, and the chain of bounds ------------------------------------------------


@with_encoder
@every_likelihood
def test_amortization_gap(likelihood: str, amortized: bool | str) -> None:
    adata = fitted(likelihood, amortized)
    others = set(adata.obs)
    tl.amortization_gap(adata)
    names = {"scuvae_amortization_gap", "scuvae_amortization_gap_se"}
    assert set(adata.obs) == others | names
    gap = adata.obs["scuvae_amortization_gap"].to_numpy()
    assert gap.dtype == np.float32
    error = adata.obs["scuvae_amortization_gap_se"].to_numpy()
    assert (gap > -0.1 - 5 * error).all()  # other draws than those that choose the best
    assert gap.mean() > 0

    encoded, refined = adata.copy(), adata.copy()
    tl.project(encoded, adata, amortized=True)
    tl.project(refined, adata)
    cost = scores(refined, 1000)["elbo"] - scores(encoded, 1000)["elbo"]
    # 60 cells' means over other draws.
    assert abs(cost.mean() - gap.mean()) < 0.1 + 0.1 * gap.mean()


def test_the_chain_of_bounds_on_real_counts() -> None:
    adata = datasets.pbmc68k_counts()[:150].copy()
    tl.fit(adata, amortized=True, max_epochs=8, n_latent=5, n_hidden=32)
    tl.project(adata, adata, amortized=True, key_added="encoder")
    tl.refine(adata, key="encoder", max_steps=1, key_added="semi")
    tl.refine(adata, key="semi", key_added="refined")
    values = {}
    for key in ("encoder", "semi", "refined"):
        a, b = adata.copy(), adata.copy()
        tl.score(a, key=key, n_samples=200, rng=0)
        tl.score(b, key=key, n_samples=200, rng=1)
        values[key] = a.obs[f"{key}_elbo"].to_numpy()
        values[f"{key} bound"] = a.obs[f"{key}_log_evidence"].to_numpy()
        # The two differ by the noise of two means over 200 draws.
        noise = np.abs(a.obs[f"{key}_elbo"] - b.obs[f"{key}_elbo"]).max()
    chain = [values[name] for name in ("encoder", "semi", "refined", "refined bound")]
    for lower, higher in pairwise(chain):
        assert lower.mean() < higher.mean()
        # The draws are paired, so the noise of a difference is below that of each.
        assert (higher - lower).min() > -noise
    assert (chain[1] - chain[0]).mean() > 1  # a step from a rough encoder is worth nats


# --- denoise ------------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_denoise_is_the_mean_of_the_decoder(likelihood: str, amortized: bool | str) -> None:
    adata = fitted(likelihood, amortized)
    before = fingerprint(adata.X)
    tl.denoise(adata, n_samples=0)
    layer = adata.layers["scuvae_denoised"]
    assert (type(layer), layer.dtype, layer.shape) == (np.ndarray, np.float32, (N_OBS, N_VARS))
    assert fingerprint(adata.X) == before
    model = get.model(adata)
    totals = torch.as_tensor(adata.X.sum(1))
    with torch.no_grad():
        eta = model.decoder(torch.as_tensor(adata.obsm["X_scuvae"]))
        np.testing.assert_allclose(  # chunks of cells and float32
            layer, model.likelihood.mean(eta, totals).numpy(), rtol=1e-4, atol=1e-5
        )
    if likelihood in ("poisson", "negative_binomial"):  # mean = size factor × softmax(η)
        np.testing.assert_allclose(
            layer, totals[:, None].numpy() * softmax(eta.numpy(), 1), rtol=1e-4
        )
        np.testing.assert_allclose(layer.sum(1), totals, rtol=1e-4)  # float32

    tl.denoise(adata, n_samples=64, layer_added="mean")
    q = get.posterior(adata)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack(
            [model.likelihood.mean(model.decoder(q.sample()), totals) for _ in range(2000)]
        )
    # Five standard errors of the 2,000 draws, and as much for 64 quasi-random ones.
    error = 10 * draws.std(0).numpy() / np.sqrt(2000) + 0.25 * draws.std(0).numpy()
    assert (np.abs(adata.layers["mean"] - draws.mean(0).numpy()) < error + 1e-4).all()


def test_denoise_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    """Differential expression reads layers: none has a gene that was not modelled."""
    adata = small_counts()
    mask = adata.var["highly_variable"].to_numpy()
    small_fit(adata, mask_var="highly_variable", key_added="k")
    tl.denoise(adata, key="k", scale=True)
    assert not {name for name in adata.layers if name}
    table = adata.obsm["k_denoised"]
    assert list(table.columns) == list(adata.var_names[mask])
    assert list(table.index) == list(adata.obs_names)
    np.testing.assert_allclose(table.sum(axis=1), adata.X[:, mask].sum(1), rtol=1e-4)  # float32
    for suffix in ("h5ad", "zarr"):
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        back = getattr(anndata, f"read_{suffix}")(tmp_path / f"a.{suffix}")
        for name in ("k_denoised", "k_denoised_scale"):
            np.testing.assert_array_equal(back.obsm[name], adata.obsm[name])
            assert list(back.obsm[name].columns) == list(adata.var_names[mask])

    order = np.random.default_rng(0).permutation(N_VARS)
    permuted = adata[:, order].copy()
    tl.denoise(permuted, key="k")
    assert "k_denoised_scale" not in permuted.obsm  # it belonged to the first call
    np.testing.assert_array_equal(permuted.obsm["k_denoised"][table.columns], table)

    modelled = adata[:, mask].copy()
    tl.denoise(modelled, key="k")
    np.testing.assert_array_equal(modelled.layers["k_denoised"], table)
    assert "k_denoised" not in modelled.obsm
    small_fit(adata, key_added="k")
    assert not [name for name in adata.obsm if "denoised" in name]

    # New cells without some of the fit's genes, and with others.
    reference = small_fit(small_counts(), mask_var="highly_variable", key_added="k")
    new = new_cells(n_vars=N_VARS + 3)[:, 4:].copy()
    tl.project(new, reference, key="k")
    tl.denoise(new)
    known = new.var_names.isin(reference.var_names[mask])
    table = new.obsm["scuvae_denoised"]
    assert list(table.columns) == list(new.var_names[known])
    np.testing.assert_allclose(table.sum(axis=1), new.X[:, known].sum(1), rtol=1e-4)  # float32
    # A total over all of the model's genes: the softmax over all of them, at those observed.
    tl.denoise(new, library_size=100, n_samples=0)
    with torch.no_grad():
        eta = get.model(new).decoder(torch.as_tensor(new.obsm["X_scuvae"]))
    at = reference.var_names[mask].get_indexer(table.columns)
    truth = 100 * softmax(eta.numpy().astype(float), 1)[:, at]
    np.testing.assert_allclose(new.obsm["scuvae_denoised"], truth, rtol=1e-4)  # float32


def test_denoise_as_if_from_some_batch_at_some_total() -> None:
    adata = small_fit(small_counts(), likelihood="poisson", batch_key="batch")
    z, model = torch.as_tensor(adata.obsm["X_scuvae"]), get.model(adata)
    share = {}
    for code, name in enumerate(("b0", "b1")):  # sorted, whatever the categories' order
        with torch.no_grad():
            eta = model.decoder(z, torch.eye(2)[[code]].expand(N_OBS, -1))
        share[name] = softmax(eta.numpy().astype(float), 1)
    both = (share["b0"] + share["b1"]) / 2
    genes = ["gene7", "gene2"]
    for batch, truth in {"b0": share["b0"], ("b1",): share["b1"], "average": both}.items():
        batch = list(batch) if isinstance(batch, tuple) else batch
        with unchanged(adata):
            table = tl.denoise(adata, genes=genes, library_size=1e4, batch=batch, n_samples=0)
        assert list(table.columns) == genes
        np.testing.assert_allclose(table, 1e4 * truth[:, [7, 2]], rtol=1e-4)  # float32
    own = np.where((adata.obs["batch"] == "b0").to_numpy()[:, None], share["b0"], share["b1"])
    table = tl.denoise(adata, genes=genes, library_size=1, n_samples=0)
    np.testing.assert_allclose(table, own[:, [7, 2]], rtol=1e-4)


def test_denoise_compares_batches_as_strings() -> None:
    adata = small_counts()
    adata.obs["batch"] = np.arange(N_OBS) % 2 + 1
    small_fit(adata, batch_key="batch")
    one, other = (tl.denoise(adata, genes=["gene0"], batch=name) for name in (1, "1"))
    np.testing.assert_array_equal(one, other)


def test_denoise_says_how_sure_it_is() -> None:
    adata = fitted("poisson")
    mean, scale = tl.denoise(adata, genes=list(adata.var_names), n_samples=256, scale=True)
    q, model, totals = get.posterior(adata), get.model(adata), torch.as_tensor(adata.X.sum(1))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        draws = totals[:, None] * model.decoder(q.sample((4000,))).softmax(-1)
    # A scale from 4,000 draws is good to 1 or 2 % each, one of 256 quasi-random ones to 15 %.
    ratio = scale.to_numpy() / draws.std(0).numpy()
    assert abs(np.median(ratio) - 1) < 0.03
    assert (np.abs(ratio - 1) < 0.3).all()
    tl.denoise(adata, scale=True, n_samples=256)
    np.testing.assert_array_equal(adata.layers["scuvae_denoised"], mean)
    np.testing.assert_array_equal(adata.layers["scuvae_denoised_scale"], scale)


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"genes": "gene1"}, TypeError, ["genes='gene1'", "list of names"]),
        ({"genes": ["gene1", "gen2"]}, ValueError, ["'gen2'", "Did you mean", "'gene2'"]),
        ({"genes": ["gene1"], "copy": True}, ValueError, ["writes nothing", "copy="]),
        ({"batch": "b"}, ValueError, ["batch='b'", "no batch_key"]),
        ({"key": "k", "batch": "b2"}, ValueError, ["'b2'", "Known: 'b0', 'b1'", "'average'"]),
        ({"key": "k", "batch": []}, ValueError, ["batch is empty"]),
        ({"library_size": 0}, ValueError, ["library_size=0", "> 0"]),
        ({"library_size": "latent"}, TypeError, ["library_size='latent'", "number"]),
        ({"key": "g", "library_size": 1e4}, ValueError, ["library_size=10000.0", "'gaussian'"]),
        ({"scale": True, "n_samples": 1}, ValueError, ["scale=True", "n_samples >= 2"]),
        ({"scale": 1}, TypeError, ["scale=1"]),
        ({"layer_added": "X_scuvae"}, ValueError, ["layer_added='X_scuvae'", "another name"]),
    ],
)
def test_denoise_errors(options: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    adata = fitted()
    small_fit(adata, batch_key="batch", key_added="k", max_epochs=1)
    small_fit(adata, likelihood="gaussian", key_added="g", max_epochs=1)
    with unchanged(adata), pytest.raises(kind) as error:
        tl.denoise(adata, **options)
    assert all(part in str(error.value) for part in parts), error.value


def test_denoise_writes_no_table_that_a_file_cannot_hold() -> None:
    adata = small_counts()
    adata.var_names = ["HLA/A", *adata.var_names[1:]]
    small_fit(adata, mask_var=np.arange(N_VARS) < 10)
    with unchanged(adata), pytest.raises(ValueError, match=r"'HLA/A'.*genes="):
        tl.denoise(adata)
    assert tl.denoise(adata, genes=["HLA/A"]).shape == (N_OBS, 1)


def test_denoise_at_the_size_factors_given() -> None:
    adata = small_fit(small_counts(), likelihood="poisson", size_factor_key="expected")
    tl.denoise(adata)
    np.testing.assert_allclose(  # float32
        adata.layers["scuvae_denoised"].sum(1), adata.obs["expected"], rtol=1e-4
    )


# --- get ----------------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_get(likelihood: str, amortized: bool | str) -> None:
    adata = fitted(likelihood, amortized)
    with unchanged(adata):
        model, q, history = get.model(adata), get.posterior(adata), get.history(adata)
        history["loss"] = 0.0  # the caller's own copy
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        q.mean.zero_()
    assert not model.training
    assert (model.encoder is None) == (amortized is False)
    assert (q.batch_shape, q.event_shape) == ((N_OBS,), (N_LATENT,))
    model = get.model(adata)
    z = model.prior.sample((4, N_OBS))
    x = torch.as_tensor(adata.X)
    log_prob = model.likelihood.log_prob(x, model.decoder(z), x.sum(1))
    assert log_prob.shape == (4, N_OBS)
    assert torch.isfinite(log_prob).all()


def test_get_by_key() -> None:
    adata = small_fit(fitted(), n_latent=2, key_added="k")
    assert get.model(adata).n_latent == N_LATENT
    assert get.model(adata, key="scuvae").n_latent == N_LATENT
    assert get.model(adata, key="k").n_latent == 2
    assert get.posterior(adata, key="k").event_shape == (2,)
    assert len(get.history(adata, key="k")) == 3


def test_a_gpu_takes_as_many_cells_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty draws of 16 float32 arrays in four fifths of what is free, 16,384 at most."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(20e9), int(24e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(3e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(1e9))
    for n_vars in (200, 2_000, 20_000):
        expected = 0.8 * (20e9 + 3e9 - 1e9) / (20 * 16 * 4 * n_vars)
        assert runtime.chunk_on(gpu, n_vars) == min(int(expected), 16_384)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(1e9))
    assert runtime.chunk_on(gpu, 2_000) == 1
    assert runtime.chunk_on(torch.device("cpu"), 20_000) == runtime.CHUNK
