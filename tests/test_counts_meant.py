"""likelihood="auto": where a Gaussian is hardly what was meant, the user hears of it."""

import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse as sp

from scuvae import datasets, tl

FIT = {"max_epochs": 1, "n_latent": 2, "n_hidden": 4, "progress": False}


def counts(dense: bool = False) -> ad.AnnData:
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 2.0, size=(60, 25))).astype(np.float64)
    x[np.arange(60), rng.integers(25, size=60)] += 1  # no cell without a count
    adata = ad.AnnData(x if dense else sp.csr_matrix(x))
    adata.obs_names = [f"cell{i}" for i in range(60)]
    adata.var_names = [f"gene{i}" for i in range(25)]
    return adata


def logged(adata: ad.AnnData) -> None:
    x = adata.X.toarray() if sp.issparse(adata.X) else adata.X
    x = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    adata.X = sp.csr_matrix(x) if sp.issparse(adata.X) else x


def said(adata: ad.AnnData, **more: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tl.fit(adata, **FIT, **more)
    return [str(w.message) for w in caught if "likelihood=" in str(w.message)]


@pytest.mark.parametrize("dense", [False, True])
def test_logarithms_beside_counts(dense: bool) -> None:
    adata = counts(dense)
    adata.layers["counts"] = adata.X.copy()
    logged(adata)
    (text,) = said(adata)
    assert "layer='counts'" in text
    assert "adata.layers['counts'] holds whole counts" in text
    assert adata.uns["scuvae"]["params"]["likelihood"] == "gaussian"
    assert said(adata, likelihood="gaussian") == []
    assert said(adata, layer="counts") == []


def test_logarithms_beside_counts_in_raw() -> None:
    adata = counts()
    adata.raw = adata.copy()
    logged(adata)
    (text,) = said(adata)
    assert "adata.raw holds whole counts" in text
    assert "adata.layers['counts'] = adata.raw[:, adata.var_names].X" in text
    exec("adata.layers['counts'] = adata.raw[:, adata.var_names].X", {"adata": adata})
    assert said(adata, layer="counts") == []
    del adata.layers["counts"]
    with pytest.raises(ValueError, match=r"adata\.raw holds whole counts"):
        tl.fit(adata, likelihood="nb", **FIT)


@pytest.mark.parametrize("log", [False, True])
def test_normalised_counts_alone(log: bool) -> None:
    adata = counts()
    logged(adata)
    if not log:
        adata.X = adata.X.expm1()
    (text,) = said(adata)
    assert "normalised counts" in text
    assert "Pass layer= with raw counts" in text


@pytest.mark.parametrize("dense", [False, True])
def test_a_few_fractions(dense: bool) -> None:
    adata = counts(dense)
    adata.X[7, 3] = 2.5
    (text,) = said(adata)
    assert "adata.X holds 2.5 at cell 'cell7', gene 'gene3'" in text


def test_counts_that_were_rounded_on_the_way() -> None:
    adata = counts()
    adata.X = adata.X * (1 + 1e-6)
    (text,) = said(adata)
    assert "nearly all else is whole" in text


def test_real_values_are_taken_as_they_are() -> None:
    assert said(datasets.linear_factor(60, 20, rng=0)) == []
    positive = counts()
    positive.X = np.random.default_rng(1).gamma(2.0, 1.0, size=positive.shape)
    assert said(positive) == []
