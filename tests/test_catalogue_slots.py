"""The catalogue: slots of a fit that were changed by hand, read by whoever reads them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import small_counts, small_fit, unchanged

from scuvae import get, pl, pp, tl


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    adata = small_fit(small_counts(), max_epochs=1)
    tl.score(adata, n_samples=2)
    tl.predictive_check(adata, n_samples=1)
    tl.calibration(adata, n_cells=5)
    return adata


def obsm(slot: str, values: Callable[[np.ndarray], Any]) -> Callable[[AnnData], None]:
    def change(adata: AnnData) -> None:
        adata.obsm[slot] = values(adata.obsm[slot])

    return change


def uns(name: str, value: Any, slot: str = "scuvae") -> Callable[[AnnData], None]:
    def change(adata: AnnData) -> None:
        adata.uns[slot] = {**adata.uns[slot], name: value} if name else value

    return change


NO_COVARIANCE = ["no covariances, not positive definite", "tl.project"]
NO_TABLE = ["['history'] holds what are no numbers", "fit again"]
# What is changed, who reads it then, and what is said.
CHANGES: dict[str, tuple[Callable[[AnnData], None], Callable[[AnnData], object], list[str]]] = {
    "covariances of 0": (obsm("X_scuvae_covariance", np.zeros_like), tl.score, NO_COVARIANCE),
    "negative ones": (obsm("X_scuvae_covariance", np.negative), tl.denoise, NO_COVARIANCE),
    "masked means": (
        obsm("X_scuvae", lambda x: np.ma.array(x, mask=x > 0)),
        tl.sample,
        ["adata.obsm['X_scuvae'] is a masked array", "tl.project"],
    ),
    "a map of NaN": (
        obsm("X_scuvae_embed", lambda x: x * np.nan),
        lambda adata: pp.neighbors(adata, n_samples=2),
        ["adata.obsm['X_scuvae_embed']", "tl.embed(adata) again"],
    ),
    "a map of text": (
        obsm("X_scuvae_embed", lambda x: x.astype(str)),
        lambda adata: pp.neighbors(adata, n_samples=2),
        ["adata.obsm['X_scuvae_embed'] is <U", "tl.embed(adata) again"],
    ),
    "a history of Series": (
        uns("history", {"loss": pd.Series([1.0, 2.0])}),
        tl.score,
        ["history/loss", "is a Series"],
    ),
    "a history of text": (
        uns("history", pd.DataFrame({"loss": ["1"]})),
        lambda adata: pl.loss(adata, show=False),
        NO_TABLE,
    ),
    "a list of parameters": (
        uns("params", [1]),
        lambda adata: pl.elbo_by_size(adata, show=False),
        ["adata.uns['scuvae']['params'] is a list", "fit again"],
    ),
    "no names of genes": (
        uns("var_names", None),
        lambda adata: pl.elbo_by_size(adata, show=False),
        ["adata.uns['scuvae']['var_names'] is a NoneType", "fit again"],
    ),
    "another table": (
        uns("", pd.DataFrame({"a": [1]}), "scuvae_predictive_check"),
        lambda adata: pl.predictive_check(adata, show=False),
        ["adata.uns['scuvae_predictive_check']", "tl.predictive_check(adata) again"],
    ),
    "another result": (
        uns("", {"a": 1}, "scuvae_calibration"),
        lambda adata: pl.calibration(adata, show=False),
        ["adata.uns['scuvae_calibration']", "tl.calibration(adata) again"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_slot_is_named(name: str, fitted: AnnData) -> None:
    change, read, says = CHANGES[name]
    adata = fitted.copy()
    change(adata)
    with unchanged(adata), pytest.raises((ValueError, TypeError)) as caught:
        read(adata)
    for part in says:
        assert part in str(caught.value)


def test_scores_that_are_text_are_left_out_of_a_summary(fitted: AnnData) -> None:
    adata = fitted.copy()
    adata.obs["scuvae_elbo"] = "text"
    assert "elbo" not in get.fit(adata).to_dict()["measures"]
    assert "elbo" in get.fit(fitted).to_dict()["measures"]
