"""tl.project over chosen genes: what the cells without all others would get, then and later."""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import (
    N_VARS,
    assert_alike,
    assert_same_posterior,
    fingerprint,
    small_counts,
    small_data,
    small_fit,
    unchanged,
    unsealed,
)
from scipy import sparse as sp

from scuvae import get, pl, tl

# Of the reference's 40 genes, in no order, with some that neither side knows, and twice one.
KEPT = [f"gene{i}" for i in (*range(38, 4, -3), 7, 6)]
CHOSEN = [*KEPT, "MS4A1", "gene999", "gene7"]
LEFT_OUT = [f"gene{i}" for i in range(N_VARS) if f"gene{i}" not in KEPT]


@cache
def _fitted(options: tuple[tuple[str, Any], ...]) -> AnnData:
    likelihood = dict(options).get("likelihood", "negative_binomial")
    return small_fit(small_data(likelihood), **dict(options))


def fitted(**options: Any) -> AnnData:
    return _fitted(tuple(options.items())).copy()


def new_cells(likelihood: str = "negative_binomial", n_vars: int = N_VARS + 5) -> AnnData:
    """Some of the genes that the reference knows, and, shuffled in, five that it does not."""
    adata = small_data(likelihood, n_vars=n_vars, seed=7)
    return adata[:, np.random.default_rng(0).permutation(n_vars)].copy()


def by_hand(adata: AnnData) -> AnnData:
    """The same cells without all genes but those of ``KEPT``, in the order of ``adata``."""
    return adata[:, adata.var_names.isin(KEPT)].copy()


# --- the projection -----------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood": "gaussian", "covariance": "diagonal"},
        {"size_factor_key": "expected"},
        {"amortized": True, "batch_key": "batch"},
    ],
    ids=str,
)
def test_cells_are_as_without_the_other_genes(options: dict[str, Any], sparse: bool) -> None:
    reference = fitted(**options)
    adata = new_cells(options.get("likelihood", "negative_binomial"))
    arguments: dict[str, Any] = {}
    if "batch_key" in options:
        adata.obs["batch"] = np.array(["b0", "b7"])[np.arange(adata.n_obs) % 2]
        arguments["new_batches"] = "estimate"
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    truth = by_hand(adata)
    with unchanged(reference):
        tl.project(truth, reference, **arguments)
    tl.project(adata, reference, genes=CHOSEN, **arguments)
    # Arrays of other shapes lie at other addresses, where products may round otherwise.
    assert_same_posterior(adata, truth, atol=1e-3)
    found, expected = (dict(a.uns["scuvae"]) for a in (adata, truth))
    report, of_truth = found.pop("genes"), expected.pop("genes")
    assert_alike(found, expected, atol=1e-3)

    # Only that they have the genes that were left out is another thing to report.
    assert report.pop("n_unused") == adata.n_vars - len(KEPT)
    assert of_truth.pop("n_unused") == 0
    assert fingerprint(report) == fingerprint(of_truth)
    assert report["missing"].tolist() == LEFT_OUT
    # Or the test could not tell.
    tl.project(adata, reference, key_added="all", **arguments)
    assert np.abs(adata.obsm["all"] - adata.obsm["X_scuvae"]).max() > 0.1


@pytest.mark.parametrize(
    "kind", [list, tuple, set, np.array, pd.Index, pd.Series, dict.fromkeys, pd.Categorical, iter]
)
def test_names_in_any_container(kind: Callable[[list[str]], Any]) -> None:
    reference, adata = fitted(), new_cells()
    tl.project(adata, reference, genes=kind(list(dict.fromkeys(CHOSEN))))
    assert adata.uns["scuvae"]["genes"]["missing"].tolist() == LEFT_OUT


def test_genes_that_both_have_are_all() -> None:
    reference, adata = fitted(), new_cells()[:, 4:].copy()
    truth = adata.copy()
    tl.project(truth, reference)
    tl.project(adata, reference, genes=reference.var_names)
    assert_same_posterior(adata, truth, atol=1e-3)
    assert_alike(dict(adata.uns), dict(truth.uns), atol=1e-3)


def test_values_of_other_genes_are_not_looked_at() -> None:
    reference, adata = fitted(), new_cells()
    truth = by_hand(adata)
    adata.X[:, adata.var_names.isin(LEFT_OUT)] = np.nan
    tl.project(adata, reference, genes=KEPT)
    tl.project(truth, reference)
    assert_same_posterior(adata, truth, atol=1e-3)


def test_cells_empty_over_the_genes_and_few_genes_warn() -> None:
    reference, adata = fitted(), new_cells()
    adata.X[:3, adata.var_names.isin(KEPT)] = 0
    assert (adata.X.sum(1) > 0).all()
    with pytest.warns(UserWarning, match="3 cells have no counts in the observed") as caught:
        tl.project(adata, reference, genes=KEPT)
    assert len([w for w in caught if w.category is UserWarning]) == 1

    few = ["gene5", "gene8", "gene7", "ENSG1"]
    says = (
        r"genes= leaves 3 of the reference's 40 genes.*genes= has 'gene5', 'gene8', 'gene7', \.\."
    )
    with pytest.warns(UserWarning, match=says) as caught:
        tl.project(new_cells(), reference, genes=few)
    assert [w.filename for w in caught if "leaves" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # anndata has others of its own
        tl.project(new_cells(), reference, genes=["gene5", "gene8", "gene7", "gene6"])  # a tenth


def test_the_log_tells_chosen_from_unknown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="scuvae"):
        tl.project(new_cells(), fitted(), genes=CHOSEN)
    assert "5 genes unknown to the fit are not used" in caplog.messages
    assert f"{len(LEFT_OUT)} genes that the fit knows are not used by choice" in caplog.messages


# --- the reference's own cells ------------------------------------------------------------------


@pytest.mark.parametrize("itself", [True, False])
def test_a_reference_keeps_its_fit_beside_the_panel(itself: bool) -> None:
    old = fitted()
    tl.score(old, n_samples=5)
    before, truth = fingerprint(old), by_hand(old)
    tl.project(old, old if itself else old.copy(), genes=KEPT, key_added="panel")
    tl.project(truth, fitted(), key_added="panel")
    for slot in ("panel", "panel_scale", "panel_covariance"):
        np.testing.assert_allclose(old.obsm[slot], truth.obsm[slot], atol=1e-3)
    tl.score(old, key="panel", n_samples=5)

    del old.uns["panel"]
    for slots in (old.obsm, old.obs):
        for name in [name for name in slots if name.startswith("panel")]:
            del slots[name]
    assert fingerprint(old) == before


def test_under_its_own_name_the_reference_is_projected_again() -> None:
    old, new, truth = fitted(), new_cells(), new_cells()
    model = fingerprint(old.uns["scuvae"]["state"])
    tl.project(truth, old)
    tl.project(old, old, genes=KEPT)
    same = by_hand(fitted())
    tl.project(same, fitted())
    assert_same_posterior(old, same, atol=1e-3)
    # It is the same model still, and as a reference asks for no genes less.
    assert fingerprint(old.uns["scuvae"]["state"]) == model
    tl.project(new, old)
    assert_same_posterior(new, truth, atol=1e-3)
    assert_alike(dict(new.uns), dict(truth.uns), atol=1e-3)


# --- what is made of the posteriors -------------------------------------------------------------

VERBS: dict[str, Callable[[AnnData], object]] = {
    "score": lambda adata: tl.score(adata, n_samples=20, n_anneal=3),
    "refine": lambda adata: tl.refine(adata),
    "refine twice": lambda adata: (tl.refine(adata, key_added="k"), tl.refine(adata, key="k")),
    "denoise": lambda adata: tl.denoise(adata),
    "sample": lambda adata: tl.sample(adata, n_samples=2),
    "calibration": lambda adata: tl.calibration(adata, n_cells=20),
    "predictive_check": lambda adata: tl.predictive_check(adata),
    "novelty": lambda adata: tl.novelty(adata, fitted_to_like(adata)),
    "project from it": lambda adata: tl.project(adata, adata, genes=KEPT[:20], key_added="k"),
}


def fitted_to_like(adata: AnnData) -> AnnData:
    return fitted(likelihood=str(adata.uns["scuvae"]["params"]["likelihood"]))


def results(adata: AnnData) -> dict[str, Any]:
    """All slots but the reports of what was unused; layers at the genes of ``KEPT``."""
    entries = {
        name: {key: value for key, value in entry.items() if key != "genes"}
        for name, entry in adata.uns.items()
    }
    # anndata 0.13 lists X among the layers, by the name None.
    layers = {name: by_hand(adata).layers[name] for name in adata.layers if name is not None}
    obsm = dict(adata.obsm)
    for name in [name for name in obsm if "denoised" in name]:  # where genes are left out
        layers[name] = obsm.pop(name)[by_hand(adata).var_names].to_numpy()
    return {"obs": adata.obs, "obsm": obsm, "layers": layers, "uns": entries}


@pytest.mark.parametrize("likelihood", ["negative_binomial", "gaussian"])
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_do_without_the_same_genes(verb: str, likelihood: str) -> None:
    reference, adata = fitted(likelihood=likelihood), new_cells(likelihood)
    truth = by_hand(adata)
    tl.project(adata, reference, genes=CHOSEN)
    tl.project(truth, reference)
    for one in (adata, truth):
        VERBS[verb](one)
    # Layers are compared by value: of other shapes, they are laid out otherwise.
    found, expected = results(adata), results(truth)
    for name, layer in expected.pop("layers").items():
        other = found["layers"][name]
        values = [x.toarray() if sp.issparse(x) else x for x in (other, layer)]
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-3, err_msg=name)
    del found["layers"]
    # Arrays of other shapes lie at other addresses, where products may round otherwise.
    assert_alike(found, expected, atol=1e-3)

    left_out = adata[:, LEFT_OUT]
    for layer in [left_out.layers[name] for name in left_out.layers if name is not None]:
        values = layer.toarray() if sp.issparse(layer) else layer
        drawn_counts = verb == "sample" and likelihood != "gaussian"
        assert (values == 0 if drawn_counts else np.isnan(values)).all()


@pytest.mark.parametrize("verb", ["score", "novelty"])
def test_over_all_genes_verbs_say_something_else(verb: str) -> None:
    """What the test before goes by: it could not tell otherwise."""
    reference, adata = fitted(likelihood="negative_binomial"), new_cells()
    tl.project(adata, reference, genes=KEPT)
    whole = adata.copy()
    del unsealed(whole)["genes"]
    for one in (adata, whole):
        VERBS[verb](one)
    name = {"score": "scuvae_elbo", "novelty": "scuvae_novelty"}[verb]
    assert (adata.obs[name] != whole.obs[name]).mean() > 0.9


def test_results_put_beside_more_genes_stand_on_their_own() -> None:
    """Cells projected as a subset, whose slots go back to the whole."""
    adata = new_cells()
    part = by_hand(adata)
    tl.project(part, fitted())
    adata.obsm, adata.uns = part.obsm, part.uns
    for one in (adata, part):
        tl.score(one, n_samples=10)
    np.testing.assert_array_equal(adata.obs["scuvae_elbo"], part.obs["scuvae_elbo"])


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_files_remember_the_genes(suffix: str, tmp_path: Path) -> None:
    adata = new_cells()
    tl.project(adata, fitted(), genes=CHOSEN)
    getattr(adata, f"write_{suffix}")(tmp_path / f"new.{suffix}")
    back = getattr(ad, f"read_{suffix}")(tmp_path / f"new.{suffix}")
    assert_same_posterior(back, adata)
    assert back.uns["scuvae"]["genes"]["missing"].tolist() == LEFT_OUT
    for one in (adata, back):
        tl.score(one, n_samples=10)
        tl.denoise(one, n_samples=0)
    np.testing.assert_array_equal(back.obs["scuvae_elbo"], adata.obs["scuvae_elbo"])
    np.testing.assert_array_equal(back.obsm["scuvae_denoised"], adata.obsm["scuvae_denoised"])
    assert get.posterior(back).mean.shape == adata.obsm["X_scuvae"].shape


def test_pictures_count_the_same_genes() -> None:
    adata = new_cells()
    tl.project(adata, fitted(), genes=CHOSEN)
    tl.score(adata, n_samples=5)
    ax = pl.elbo_by_size(adata, show=False)
    assert ax.get_xlabel() == f"Total counts of {len(KEPT)} genes"
    drawn = np.sort(ax.collections[0].get_offsets()[:, 0])
    np.testing.assert_allclose(drawn, np.sort(by_hand(adata).X.sum(1)))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("gene1", TypeError, r"genes='gene1' is a str: pass a list of names"),
        (b"gene1", TypeError, r"genes\[0\]=103 is a int: pass names, such as adata.var_names"),
        (3, TypeError, r"genes=3 is a int: pass a list of names"),
        (["gene1", 2], TypeError, r"genes\[1\]=2 is a int"),
        (np.ones(N_VARS, bool), TypeError, r"genes\[0\]=.*True.* is a bool.*var_names\[mask\]"),
        ([], ValueError, "genes is empty: pass at least one name, or None"),
        (pd.Index([]), ValueError, "genes is empty"),
        (
            ["ENSG1", "ENSG2"],
            ValueError,
            r"genes: none of the 2 to condition on \('ENSG1', 'ENSG2', \.\.\.\) is among the 40 "
            r"that adata and the fit have in common \('gene0', .*both ids\?",
        ),
        # Known to one of the two alone.
        (["gene44"], ValueError, "genes: none of the 1"),
    ],
    ids=repr,
)
def test_errors_name_the_genes(value: Any, kind: type[Exception], says: str) -> None:
    reference, adata = fitted(), new_cells()
    with unchanged(reference, adata), pytest.raises(kind, match=says):
        tl.project(adata, reference, genes=value)


def test_without_some_genes_there_is_no_use_for_an_encoder() -> None:
    reference, adata = fitted(amortized=True), new_cells()
    n = len(LEFT_OUT)
    with unchanged(adata), pytest.raises(ValueError, match=f"amortized=True, but {n} of the enc"):
        tl.project(adata, reference, genes=KEPT, amortized=True)
    tl.project(adata, reference, genes=KEPT)
    with unchanged(adata), pytest.raises(ValueError, match=rf"{n} of the enc.*project\(genes="):
        tl.amortization_gap(adata)
    adata = small_counts(seed=7)
    tl.project(adata, fitted(), genes=KEPT)
    with unchanged(adata), pytest.raises(ValueError, match=rf"{n} of the fit's.*project\(genes="):
        tl.to_encoder(adata)
