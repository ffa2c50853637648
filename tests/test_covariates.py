"""Covariates: the design, columns of obs by value, fits with several, and what is taken out."""

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import LIKELIHOOD_NAMES, SCHEMES, small_counts, small_data, small_fit, unchanged
from scipy import sparse as sp
from small_models import batch_of, model_of

from scuvae import cli, get, pp, tl
from scuvae.inference.mapping.covariate_columns import known_slopes, with_design
from scuvae.inference.posteriors.whitened_pca import WhitenedPCA
from scuvae.inference.refinement.profile_likelihood import (
    profile_given,
    profile_log_likelihood,
)
from scuvae.io.covariates import match_covariates, read_covariates
from scuvae.model.covariates import Categorical, Continuous, Covariates, Design
from scuvae.model.priors import PRIORS

KEYS: dict[str, Any] = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["sex", "site"],
    "continuous_covariate_keys": ["age"],
}


def with_covariates(adata: AnnData, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    adata.obs["sex"] = rng.choice(["f", "m"], adata.n_obs)
    adata.obs["site"] = pd.Categorical(
        rng.choice([1, 2, 10], adata.n_obs), categories=[10, 2, 1, 7]
    )
    adata.obs["age"] = rng.integers(20, 80, adata.n_obs)
    return adata


def by_hand(adata: AnnData, fitted: AnnData) -> np.ndarray:
    """The columns of cells under a fit, by pandas: batch, sex, site as text, and age."""
    parts = [pd.get_dummies(adata.obs[key].astype(str)) for key in ("batch", "sex", "site")]
    age = fitted.obs["age"].to_numpy(float)
    standardised = (adata.obs["age"].to_numpy(float) - age.mean()) / age.std()
    return np.column_stack([*(part.to_numpy(float) for part in parts), standardised])


# --- the design ---------------------------------------------------------------------------------

DESIGN = Design(
    (Categorical("batch", ("a", "b")), Categorical("site", ("1", "2", "3"))),
    (Continuous("age", 40.0, 10.0),),
    has_batch=True,
)


def test_averages_over_settings_are_over_every_level_alike() -> None:
    rows, weights = DESIGN.settings()
    mean = (weights @ rows / weights.sum()).numpy()
    np.testing.assert_allclose(mean, [1 / 2] * 2 + [1 / 3] * 3 + [0], rtol=1e-6)
    # A covariate that is alone: each of its levels as it is.
    alone = Design(DESIGN.categorical[1:])
    rows, weights = alone.settings()
    np.testing.assert_array_equal(rows, np.eye(3))
    assert weights.tolist() == [1.0] * 3
    # Levels that came later take no part.
    rows, weights = alone.with_levels(0, ["4"]).settings((3,))
    np.testing.assert_array_equal(rows, np.eye(3, 4))
    # With no levels, the mean of what is continuous.
    rows, weights = Design((), DESIGN.continuous).settings()
    assert rows.tolist() == [[0.0]]
    assert weights.tolist() == [1.0]


def test_the_design_comes_back_from_its_parameters() -> None:
    for design in (DESIGN, Design(), Design(DESIGN.categorical), Design((), DESIGN.continuous)):
        assert Design.from_params(design.to_params()) == design
    wider = DESIGN.with_levels(1, ["4"])
    assert wider.extends(DESIGN)
    assert not DESIGN.extends(wider)
    assert not wider.extends(Design(DESIGN.categorical, DESIGN.continuous))


def test_rows_that_are_given_replace_their_own_columns_alone() -> None:
    which, rows = DESIGN.given({"batch": [1], "site": [0, 2]})
    assert which.tolist() == [True] * 5 + [False]
    assert rows.tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]]
    which, rows = DESIGN.given({"age": 55.0})
    assert which.tolist() == [False] * 5 + [True]
    assert rows.tolist() == [[0, 0, 0, 0, 0, 1.5]]


# --- columns of obs -----------------------------------------------------------------------------

TWO = np.arange(60) % 2
STORED: dict[str, Any] = {
    "int": TWO,
    "float": TWO.astype(np.float32),
    "bool": TWO.astype(bool),
    "text": np.where(TWO, "1", "0"),
    "text of floats": np.where(TWO, "1.0", "0.0"),
    "nullable": pd.array(TWO, dtype="Int64"),
    "categorical of floats": pd.Categorical(TWO.astype(float)),
    "objects": np.array([bool(v) if i < 30 else int(v) for i, v in enumerate(TWO)], object),
    "mixed": np.array([str(v) if i < 30 else float(v) for i, v in enumerate(TWO)], object),
}


@pytest.mark.parametrize("new", STORED)
@pytest.mark.parametrize("old", STORED)
def test_levels_are_what_values_say(old: str, new: str) -> None:
    adata = small_counts()
    adata.obs["plate"] = STORED[old]
    fitted = read_covariates(adata, None, ["plate"], None)
    assert fitted.design.n_levels == (2,)
    adata.obs["plate"] = STORED[new]
    matched = match_covariates(adata, fitted.design, extend=True)
    assert matched.design == fitted.design
    assert matched.codes[:, 0].tolist() == fitted.codes[:, 0].tolist() == TWO.tolist()


def test_strings_that_differ_stay_apart() -> None:
    adata = small_counts()
    adata.obs["plate"] = np.array(["1", "01", "1.0"])[np.arange(60) % 3]
    small_fit(adata, batch_key="plate", max_epochs=1)
    assert adata.uns["scuvae"]["params"]["batches"].tolist() == ["01", "1", "1.0"]
    new = adata[:6].copy()
    tl.project(new, adata)
    # Which one an integer means nobody knows.
    new.obs["plate"] = 1
    tl.project(new, adata)  # "1" by name
    new.obs["plate"] = 1.00
    tl.project(new, adata)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no column": ({"categorical_covariate_keys": ["sx"]}, ValueError, "Did you mean 'sex'"),
    "a string": ({"categorical_covariate_keys": "sex"}, TypeError, "pass a list of columns"),
    "a list": ({"batch_key": ["sex", "site"]}, TypeError, r"batch_key=.*categorical_covariate_k"),
    "a number": ({"continuous_covariate_keys": [3]}, TypeError, "continuous_covariate_keys=3"),
    "named twice": ({"categorical_covariate_keys": ["sex", "sex"]}, ValueError, "'sex' twice"),
    "in two places": (
        {"batch_key": "sex", "categorical_covariate_keys": ["sex"]},
        ValueError,
        "categorical_covariate_keys and batch_key both name 'sex'",
    ),
    "missing level": ({"categorical_covariate_keys": ["lost"]}, ValueError, "1 cells.*'cell3'"),
    "missing value": ({"continuous_covariate_keys": ["gone"]}, ValueError, "nan for 1.*'cell3'"),
    "infinite": ({"continuous_covariate_keys": ["inf"]}, ValueError, "inf for 1.*'cell5'"),
    "constant": ({"continuous_covariate_keys": ["same"]}, ValueError, "7 for all 60 cells"),
    "text": ({"continuous_covariate_keys": ["sex"]}, TypeError, r"numbers.*\.astype\(float\)"),
    "measured": ({"categorical_covariate_keys": ["real"]}, ValueError, "continuous_covariate_keys"),
    "occurs twice": ({"batch_key": "double"}, ValueError, "2 columns named 'double'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_covariate(case: str) -> None:
    options, kind, message = BAD[case]
    adata = with_covariates(small_counts())
    adata.obs["lost"] = np.where(np.arange(60) == 3, None, "x")
    adata.obs["real"] = np.linspace(0, 1, 60)
    adata.obs["gone"] = adata.obs["real"].where(np.arange(60) != 3)
    adata.obs["inf"] = np.where(np.arange(60) == 5, np.inf, 1.0)
    adata.obs["same"] = 7.0
    if case == "occurs twice":
        twice = pd.DataFrame(np.array([["a", "b"]] * 60), adata.obs_names, ["double", "double"])
        adata.obs = pd.concat([adata.obs, twice], axis=1)
    before = adata.obs.columns.tolist(), list(adata.uns)
    with pytest.raises(kind, match=message):
        small_fit(adata, **options)
    assert (adata.obs.columns.tolist(), list(adata.uns)) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(60), "60 levels for 60 cells, nearly one for every cell"),
        (np.arange(60) // 1.5, "40 levels for 60 cells"),
        (np.where(np.arange(60) == 7, "solo", "many"), "a single cell: 'solo'"),
    ],
)
def test_levels_of_too_few_cells_are_warned_of(values: np.ndarray, message: str) -> None:
    adata = small_counts()
    adata.obs["x"] = values.astype(str)
    with pytest.warns(UserWarning, match=message) as caught:
        small_fit(adata, categorical_covariate_keys=["x"], max_epochs=1)
    assert caught[0].filename.endswith("helpers.py")  # the line that called tl.fit


def test_another_unit_is_warned_of() -> None:
    adata, new = with_covariates(small_counts()), with_covariates(small_counts(seed=1))
    small_fit(adata, continuous_covariate_keys=["age"], max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tl.project(new, adata)
    new.obs["age"] = new.obs["age"] * 365.0
    with pytest.warns(UserWarning, match="age.*standard deviations.*same unit"):
        tl.project(new, adata)


# --- fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    ("likelihood", "amortized"),
    [
        *((likelihood, "semi") for likelihood in LIKELIHOOD_NAMES),
        *(("negative_binomial", scheme) for scheme in SCHEMES if scheme != "semi"),
    ],
)
def test_fits_with_covariates(
    likelihood: str, amortized: bool | str, prior: str, tmp_path: Path
) -> None:
    adata = with_covariates(small_data(likelihood, n_vars=30))
    options = {"likelihood": likelihood, "amortized": amortized, "prior": prior}
    small_fit(adata, max_epochs=2, **options, **KEYS)
    adata.write_h5ad(tmp_path / "fit.h5ad")
    back = ad.read_h5ad(tmp_path / "fit.h5ad")
    model = get.model(back)
    assert model.design == get.model(adata).design
    assert [one.levels for one in model.design.categorical[1:]] == [("f", "m"), ("1", "10", "2")]

    # What decoder and encoder are told is what pandas would tell them.
    told = torch.as_tensor(by_hand(adata, adata), dtype=torch.float32)
    z = torch.as_tensor(np.asarray(adata.obsm["X_scuvae"]))
    with torch.no_grad():
        eta = model.decoder(z, told)
        size = torch.as_tensor(np.asarray(adata.X).sum(1))
        truth = model.likelihood.mean(eta, size)
    found = tl.denoise(back, genes=back.var_names, n_samples=0)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
    if amortized:
        assert model.encoder.n_covariates == told.shape[1]

    new = with_covariates(small_data(likelihood, n_vars=30, seed=1), seed=1)
    with unchanged(back):
        tl.project(new, back, polish=False)
    tl.score(new, n_samples=2)
    assert np.isfinite(new.obs["scuvae_elbo"]).all()


@pytest.mark.parametrize(
    ("likelihood", "prior"),
    [*((name, "standard_normal") for name in LIKELIHOOD_NAMES), ("poisson", "mixture")],
)
def test_new_levels_of_several_covariates(likelihood: str, prior: str) -> None:
    adata = with_covariates(small_data(likelihood, n_vars=30))
    small_fit(adata, likelihood=likelihood, prior=prior, max_epochs=2, **KEYS)
    old = with_covariates(small_data(likelihood, n_vars=30, seed=1), seed=1)
    new = new_levels(old.copy())
    with pytest.raises(ValueError, match="'b9'"):
        tl.project(new, adata)
    with unchanged(adata):
        tl.project(new, adata, new_batches="estimate", polish=False)
        tl.project(old, adata, polish=False)
    params = new.uns["scuvae"]["params"]
    assert params["new_batches"].tolist() == ["b9"]
    assert params["new_levels"].tolist() == ["site: 9"]
    own = (new.obs["batch"] != "b9").to_numpy() & (new.obs["site"] != 9).to_numpy()
    # But for roundings: the cells of a chunk, and zeros in sums, are others.
    off = np.abs(new.obsm["X_scuvae"][own] - old.obsm["X_scuvae"][own])
    assert (off > 5e-3).mean() < 0.05
    for verb in (tl.score, tl.sample, tl.denoise, tl.embed, tl.predictive_check):
        verb(new)
    tl.refine(new, key_added="k", max_steps=2)
    pp.neighbors(new, n_neighbors=5, n_samples=2)
    tl.transfer_labels(new, adata)
    assert np.isfinite(new.obs["scuvae_elbo"]).all()
    assert new.obs["scuvae_label"].notna().all()


def new_levels(adata: AnnData) -> AnnData:
    adata.obs["batch"] = adata.obs["batch"].astype(str).where(np.arange(adata.n_obs) % 3 > 0, "b9")
    adata.obs["site"] = adata.obs["site"].astype(int).where(np.arange(adata.n_obs) % 4 > 0, 9)
    return adata


def test_a_new_level_has_the_mean_slopes_of_those_known() -> None:
    """So that the estimate begins at the typical batch; others decode as they did."""
    options = {"linear_path": True, "slopes": True, "n_covariates": 3, "n_vars": 9}
    model = model_of("poisson", **options)
    model.design = Design((Categorical("b", ("x", "y")),), (Continuous("age", 0.0, 1.0),))
    wider = Design((Categorical("b", ("x", "y", "new")),), model.design.continuous)
    found = with_design(model, wider)
    z = torch.randn(4, 2, dtype=torch.float64)
    age = torch.randn(4, 1, dtype=torch.float64)
    rows = [torch.eye(2, dtype=torch.float64)[[i] * 4] for i in (0, 1)]
    known = [model.decoder(z, torch.cat([row, age], 1)) for row in rows]
    none = torch.zeros(4, 1, dtype=torch.float64)
    for row, expected in zip(rows, known, strict=True):
        again = found.decoder(z, torch.cat([row, none, age], 1))
        torch.testing.assert_close(again, expected)
    slopes = known_slopes(found)
    assert slopes is not None
    torch.testing.assert_close(slopes[:, 2], slopes[:, :2].mean(1))
    assert slopes.shape == (9, 4, 2)


def test_levels_have_slopes_where_they_are_few(caplog: pytest.LogCaptureFixture) -> None:
    adata = small_counts()
    adata.obs["many"] = [f"d{i % 17}" for i in range(adata.n_obs)]
    few = small_fit(adata.copy(), batch_key="batch")
    assert get.model(few).decoder.slopes
    assert few.uns["scuvae"]["params"]["covariate_slopes"] is True
    with caplog.at_level("INFO", logger="scuvae"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the few cells of each
        many = small_fit(adata.copy(), batch_key="many")
    assert not get.model(many).decoder.slopes
    assert "covariates have 17 levels" in caplog.text


def test_a_cells_own_covariates_do_not_move_it_on_the_map() -> None:
    adata = small_fit(with_covariates(small_counts()), **KEYS)
    before = adata.obsm["X_scuvae_embed"].copy()
    for key in ("batch", "sex", "site", "age"):
        adata.obs[key] = adata.obs[key].to_numpy()[::-1]
    tl.embed(adata)
    np.testing.assert_allclose(adata.obsm["X_scuvae_embed"], before, atol=1e-4)


def test_decoding_as_if_from_other_levels() -> None:
    adata = small_fit(with_covariates(small_counts()), **KEYS)
    genes, options = adata.var_names[:7], {"n_samples": 2}
    as_if = adata.copy()
    as_if.obs["sex"], as_if.obs["age"] = "m", 30
    wanted = {"sex": "m", "age": 30}
    np.testing.assert_allclose(
        tl.denoise(adata, genes=genes, covariates=wanted, **options),
        tl.denoise(as_if, genes=genes, **options),
        rtol=1e-5,
    )
    parts = []
    for site in (1, "2", 10.0):
        as_if.obs["site"] = site
        parts.append(tl.denoise(as_if, genes=genes, **options).to_numpy())
    for everywhere in ("average", [1, 2, 10]):
        found = tl.denoise(adata, genes=genes, covariates=wanted | {"site": everywhere}, **options)
        np.testing.assert_allclose(found, np.mean(parts, 0), rtol=1e-5)
    as_if.obs["age"] = adata.obs["age"].mean()
    found = tl.denoise(adata, genes=genes, covariates=wanted | {"site": 10, "age": "average"})
    np.testing.assert_allclose(found, tl.denoise(as_if, genes=genes), rtol=1e-5)
    for covariates, message in (
        ({"sx": "m"}, "'sx' is no covariate of the fit. Did you mean 'sex'"),
        ({"sex": "x"}, "'x' is no level of 'sex' of the fit"),
        ({"age": "old"}, "covariates\\['age'\\]"),
        ({"batch": "b0"}, "both speak of 'batch'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tl.denoise(adata, batch="b1", covariates=covariates)


def test_the_command_line(tmp_path: Path) -> None:
    adata = with_covariates(small_counts())
    adata.write_h5ad(tmp_path / "in.h5ad")
    line = "--batch-key batch --categorical-covariate-keys sex site --continuous-covariate-keys age"
    out = tmp_path / "out.h5ad"
    files = [str(tmp_path / "in.h5ad"), "-o", str(out)]
    small = ["--n-latent", "3", "--n-hidden", "8", "--max-epochs", "2", "--batch-size", "32", "-q"]
    assert cli.main(["fit", *files, *line.split(), *small]) == 0
    fitted = small_fit(adata, max_epochs=2, **KEYS)
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_scuvae"], fitted.obsm["X_scuvae"])


def test_fits_of_before_there_were_covariates_are_read() -> None:
    adata = small_fit(small_counts(), batch_key="batch", amortized=True)
    entry = adata.uns["scuvae"]
    n_genes = adata.n_vars + 1  # and depth
    del entry["manifest"], entry["params"]["format"]  # such fits have no digests
    del entry["params"]["encoder_covariates"], entry["embed"]["n_levels"]
    entry["embed"]["n_batches"] = 2
    weight = entry["state"]["encoder"]["hidden.0.weight"]
    entry["state"]["encoder"]["hidden.0.weight"] = weight[:, :n_genes].copy()
    before = adata.obsm["X_scuvae_embed"].copy()
    tl.embed(adata)
    np.testing.assert_allclose(adata.obsm["X_scuvae_embed"], before, atol=1e-5)
    new = small_counts(seed=1)
    tl.project(new, adata, amortized=True)
    assert get.model(new).encoder.n_covariates == 0
    new.obs["batch"] = "b7"
    tl.project(new, adata, new_batches="estimate")
    tl.score(new)


# --- parts --------------------------------------------------------------------------------------


def test_the_start_is_a_pca_of_what_covariates_leave() -> None:
    rng = np.random.default_rng(0)
    told = np.column_stack([np.eye(2)[rng.integers(2, size=50)], rng.normal(size=50)])
    x = rng.normal(size=(50, 12)) + told @ (5 * rng.normal(size=(3, 12)))
    left = x - told @ np.linalg.lstsq(told, x, rcond=None)[0]
    u, _s, _ = np.linalg.svd(left, full_matrices=False)
    batch = batch_of(torch.tensor(x), covariates=torch.tensor(told))
    z = WhitenedPCA(batch, 3, inputs="values")(batch).numpy()
    truth = u[:, :3] * 50**0.5
    np.testing.assert_allclose(np.abs(z.T @ truth / 50), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(told.T @ z, 0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "sparse"),
    [("poisson", False), ("poisson", True), ("gaussian", False), ("bernoulli", True)],
)
def test_the_affinity_of_a_linear_decoder_is_exact_whatever_the_covariates(
    name: str, sparse: bool
) -> None:
    """There what covariates add is the same at every z."""
    torch.manual_seed(0)
    model = model_of(name, n_layers=0, n_covariates=DESIGN.n_columns)
    model.design = DESIGN
    codes = torch.stack([torch.arange(9) % 2, torch.arange(9) % 3], 1)
    told = Covariates(DESIGN, codes, torch.randn(9, 1).double()).rows(torch.arange(9))
    z = torch.randn(7, 2).double()
    with torch.no_grad():
        eta = model.decoder(torch.randn(9, 2).double(), told)
        x = model.likelihood.sample(eta, torch.full((9,), 60.0).double())
    batch = batch_of(x, covariates=told, sparse=sparse)
    truth = torch.stack(
        [profile_given(model, batch.take(torch.tensor([i])), z, told[i])[0] for i in range(9)]
    )
    found = profile_log_likelihood(model, batch, z)
    # Up to a term of the cell.
    torch.testing.assert_close(found - found.mean(1, True), truth - truth.mean(1, True))


# --- what covariates do -------------------------------------------------------------------------


def aged(n_obs: int = 1500, n_vars: int = 300, n_changed: int = 200) -> tuple[AnnData, np.ndarray]:
    """Four types and three programmes; 200 genes that change with age, and by how much."""
    rng = np.random.default_rng(0)
    kind, z = rng.integers(4, size=n_obs), rng.normal(size=(n_obs, 3))
    age = rng.gamma(4.0, 10.0, n_obs)
    slope = np.zeros(n_vars)
    slope[:n_changed] = 0.4 * rng.normal(size=n_changed)
    eta = rng.normal(size=n_vars) + 0.8 * rng.normal(size=(4, n_vars))[kind]
    eta += 0.5 * z @ rng.normal(size=(3, n_vars)) + np.outer((age - age.mean()) / age.std(), slope)
    share = np.exp(eta)
    share /= share.sum(1, keepdims=True)
    mean = rng.gamma(5.0, 0.2, eta.shape) * share * rng.lognormal(7.6, 0.4, (n_obs, 1))
    adata = AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    adata.obs["age"] = age
    return adata, slope[:n_changed]


def test_a_continuous_covariate_is_taken_out_and_its_effect_recovered() -> None:
    adata, slope = aged()
    age = adata.obs["age"].to_numpy()
    tl.fit(adata, continuous_covariate_keys=["age"], n_hidden=32, max_epochs=40)
    coordinates = adata.obsm["X_scuvae_embed"][:, :10]
    assert np.abs(np.corrcoef(coordinates.T, age)[-1, :-1]).max() < 0.05
    older, younger = (
        tl.denoise(
            adata,
            genes=adata.var_names[: len(slope)],
            covariates={"age": age.mean() + by * age.std()},
            library_size=1e4,
            n_samples=0,
        )
        for by in (1, -1)
    )
    found = np.log(older.to_numpy().mean(0) / younger.to_numpy().mean(0)) / 2
    assert np.corrcoef(found, slope)[0, 1] > 0.9
    assert np.polyfit(slope, found, 1)[0] == pytest.approx(1, abs=0.15)  # a prior shrinks it


def donors(n_obs: int = 900, n_vars: int = 120) -> AnnData:
    """Five types from six donors, each of whom has his own level of every gene."""
    rng = np.random.default_rng(1)
    kind, donor = rng.integers(5, size=n_obs), rng.integers(6, size=n_obs)
    eta = rng.normal(size=n_vars) + 0.5 * rng.normal(size=(5, n_vars))[kind]
    eta += 0.5 * rng.normal(size=(6, n_vars))[donor] + 0.2 * rng.normal(size=eta.shape)
    share = np.exp(eta)
    share /= share.sum(1, keepdims=True)
    adata = AnnData(sp.csr_matrix(rng.poisson(600 * share).astype(np.float32)))
    adata.obs["donor"], adata.obs["cell_type"] = donor, kind.astype(str)
    return adata


def test_a_new_donor_in_one_sitting(tmp_path: Path) -> None:
    everyone = donors()
    one = (everyone.obs["donor"] == 5).to_numpy()
    old, new = everyone[~one].copy(), everyone[one].copy()
    options = {"batch_key": "donor", "n_hidden": 32, "max_epochs": 30}
    tl.fit(old, **options)
    for verb in (tl.transfer_labels, tl.novelty):
        with pytest.raises(ValueError, match=r"'5'.*new_batches='estimate'"):
            verb(new, old)
    tl.project(new, old, new_batches="estimate")
    new.write_h5ad(tmp_path / "new.h5ad")
    new = ad.read_h5ad(tmp_path / "new.h5ad")
    with unchanged(old):
        tl.transfer_labels(new, old)
        tl.novelty(new, old)
    tl.score(new, n_samples=10)
    tl.denoise(new)
    # No more surprising than the reference's own held-out cells: .1 of which lie above 1.
    assert (new.obs["scuvae_novelty"] > 1).mean() < 0.25

    # Where the donor was part of the fit: its cells' labels from the other donors'.
    tl.fit(everyone, **options)
    known = everyone[one].copy()
    others = everyone.copy()
    others.obs["cell_type"] = others.obs["cell_type"].where(~one)
    tl.transfer_labels(known, others)
    part = (known.obs["scuvae_label"] == known.obs["cell_type"]).mean()
    found = (new.obs["scuvae_label"] == new.obs["cell_type"]).mean()
    assert part > 0.8
    assert found > part - 0.02

    # A projection on another fit knows nothing of this one's donors.
    other = donors()[~one].copy()
    tl.fit(other, rng=1, **(options | {"max_epochs": 1}))
    with pytest.raises(ValueError, match="'5'"):
        tl.transfer_labels(new, other)
