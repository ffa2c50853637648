"""The catalogue: values that nothing can be fitted to, and such as hardly mean what they say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from catalogue import FIT, Change, Row, refused, rows, said, warned
from helpers import LIKELIHOOD_NAMES, small_counts, unchanged
from scipy import sparse as sp

from scuvae import tl
from scuvae.model.likelihoods import LIKELIHOODS

COUNTS = [name for name in LIKELIHOOD_NAMES if LIKELIHOODS[name].support == "counts"]
PLACE = ["at cell 'cell3', gene 'gene7'"]


def with_values(value: float, *more: tuple[int, int], dtype: type = np.float64) -> Change:
    def change(adata: AnnData) -> None:
        x = adata.X.astype(dtype)
        for row, column in ((3, 7), *more):
            x[row, column] = value
        adata.X = x

    return change


def of_x(function: Callable[[np.ndarray], Any], layer: str | None = None) -> Change:
    """X becomes something else; what it was is kept in ``layer``, or in raw."""

    def change(adata: AnnData) -> None:
        if layer == "raw":
            adata.raw = adata.copy()
        elif layer is not None:
            adata.layers[layer] = adata.X.copy()
        adata.X = function(adata.X.astype(np.float64))

    return change


def also(*changes: Change) -> Change:
    def change(adata: AnnData) -> None:
        for one in changes:
            one(adata)

    return change


def sparse(adata: AnnData) -> None:
    adata.X = sp.csr_matrix(adata.X)


# --- errors -------------------------------------------------------------------------------------

TOO_LARGE = ["too large to be computed with in float32", "whose limit here is 1e+10", "divide"]
WRONG: dict[str, Row] = {}
for name in ("auto", *LIKELIHOOD_NAMES):
    for value in (np.nan, np.inf, -np.inf, 1e39, -1e39):
        WRONG[f"{value} under {name}"] = Row(
            [f"adata.X holds {value:g}", *PLACE, "no finite number", "Impute it, or drop it"],
            with_values(value),
            {"likelihood": name},
        )
    for value in (2e10, 1e20, 1.5e38, 3e38):
        WRONG[f"{value} under {name}"] = Row(
            [f"holds {value:g}", *PLACE, *TOO_LARGE], with_values(value), {"likelihood": name}
        )
    # Four that overflow only when they are added up.
    WRONG[f"a total that overflows under {name}"] = Row(
        ["holds 1.5e+38", "'cell3', gene 'gene4'", "(4 such values in all)", *TOO_LARGE],
        with_values(1.5e38, (3, 4), (3, 5), (3, 6)),
        {"likelihood": name},
    )
for name in COUNTS:
    for value in (-1, -0.5, 0.5, 1e-30, 7.001, 2**23 + 0.5):
        WRONG[f"{value} under {name}"] = Row(
            [f"adata.X holds {value:g}", *PLACE, repr(name), "whole counts", "Pass layer="],
            with_values(value),
            {"likelihood": name},
        )
WRONG |= {
    "-1 in integers": Row(["holds -1", *PLACE], with_values(-1, dtype=int), {"likelihood": "nb"}),
    "2e10 in integers": Row(["holds 2e+10", *TOO_LARGE], with_values(2e10, dtype=int)),
    "-2e10": Row(["holds -2e+10", *TOO_LARGE], with_values(-2e10), {"likelihood": "gaussian"}),
    "2e10, sparse": Row(["holds 2e+10", *PLACE], also(with_values(2e10), sparse)),
    "logs, counts in a layer": Row(
        ["Pass layer='spliced', which holds whole counts"],
        of_x(np.log1p, "spliced"),
        {"likelihood": "nb"},
    ),
    "logs, counts in raw": Row(
        ["adata.raw holds whole counts", "adata.layers['counts'] = adata.raw"],
        of_x(np.log1p, "raw"),
        {"likelihood": "poisson"},
    ),
    "zeros": Row(["adata.X is zero everywhere", "Pass layer="], of_x(np.zeros_like)),
}


@rows(WRONG)
def test_what_no_fit_can_have(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(row, monkeypatch)


# --- warnings -----------------------------------------------------------------------------------

AUTO = "likelihood='auto' takes a Gaussian"
RAW = "Pass layer= with raw counts"


def estimated(x: np.ndarray) -> np.ndarray:
    """As expectation-maximisation and decontamination leave counts: no longer whole."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, x.shape)
    return np.where(x > 0, x + noise, 0.0)


def per_10k(x: np.ndarray) -> np.ndarray:
    return 1e4 * x / x.sum(1, keepdims=True)


def scaled(x: np.ndarray) -> np.ndarray:
    logs = np.log1p(x)
    return (logs - logs.mean(0)) / logs.std(0)


MEANT = {
    "one fraction": Row(["holds 2.5", *PLACE, AUTO, RAW], with_values(2.5)),
    "one negative": Row(["holds -1", *PLACE, AUTO, RAW], with_values(-1)),
    "rounded on the way": Row(
        ["nearly all else is whole", AUTO, RAW], of_x(lambda x: x * (1 + 1e-7))
    ),
    "estimated counts": Row(["holds", "are zero", AUTO, RAW], of_x(estimated)),
    "normalised": Row(["normalised counts", AUTO, RAW], of_x(per_10k)),
    "logs of normalised": Row(
        ["normalised counts", AUTO, RAW], of_x(lambda x: np.log1p(per_10k(x)))
    ),
    "log2": Row(["are zero", AUTO, RAW], of_x(lambda x: np.log2(1 + per_10k(x)))),
    "square roots": Row(["are zero", AUTO, RAW], of_x(lambda x: np.sqrt(per_10k(x)) * 1.1)),
    **{
        f"{how.__name__}, counts in {where}": Row(
            [AUTO, says], of_x(how, "raw" if where == "raw" else where)
        )
        for how in (np.log1p, per_10k, scaled, estimated)
        for where, says in (
            ("counts", "Pass layer='counts': adata.layers['counts'] holds whole counts"),
            ("raw", "adata.raw holds whole counts"),
        )
    },
}
CENTRED = {
    "negatives, no counts anywhere": of_x(scaled),
    "positive, no zeros": of_x(
        lambda x: np.random.default_rng(1).gamma(2.0, 1.0, x.shape)  # no counts, whatever they are
    ),
}


@rows(MEANT)
def test_auto_warns_where_counts_were_meant(row: Row) -> None:
    adata = warned(row)
    assert adata.uns["scuvae"]["params"]["likelihood"] == "gaussian"
    again = row.data()
    texts = said(lambda: tl.fit(again, **{**FIT, "likelihood": "gaussian"}))
    assert not texts, "a Gaussian that was asked for needs no warning"


@pytest.mark.parametrize("name", ["one fraction", "estimated counts", "log1p, counts in counts"])
def test_it_warns_of_sparse_ones_too(name: str) -> None:
    warned(Row(MEANT[name].says, also(MEANT[name].change, sparse)))


@pytest.mark.parametrize("change", list(CENTRED.values()), ids=list(CENTRED))
def test_real_values_are_fitted_without_a_word(change: Change) -> None:
    adata = small_counts()
    change(adata)
    assert said(lambda: tl.fit(adata, **FIT)) == []


ROUNDED = {
    name: Row(
        [f"holds {value:g}", *PLACE, "above 16,777,216", "Are they counts?"],
        with_values(value, dtype=dtype),
        {"likelihood": likelihood},
    )
    for name, (value, dtype, likelihood) in {
        "2²⁴ + 1": (2**24 + 1, np.float64, "auto"),
        "2e9": (2e9, np.float64, "nb"),
        "9e9": (9e9, np.float64, "auto"),
        "2e9, Poisson": (2e9, np.float64, "poisson"),
        "2e9, zero-inflated": (2e9, np.float64, "zinb"),
        "integers": (2**31 - 1, np.int64, "auto"),
        "unsigned": (2**32 - 1, np.uint32, "auto"),
    }.items()
}


@rows(ROUNDED)
def test_counts_that_float32_does_not_have(row: Row) -> None:
    adata = warned(row)
    assert np.isfinite(adata.obsm["X_scuvae"]).all()


@pytest.mark.parametrize("amortized", [False, True, "semi"])
def test_the_largest_values_that_pass_are_fitted(amortized: bool | str) -> None:
    """The limit is one: below it no fit of counts overflows."""
    for likelihood in LIKELIHOOD_NAMES:
        if LIKELIHOODS[likelihood].support != "counts":
            continue  # a Gaussian as wide as this may stop with a TrainingError
        adata = small_counts()
        adata.X = np.minimum(adata.X.astype(float) * 1e7, 9e9)
        said(
            lambda adata=adata, name=likelihood: tl.fit(
                adata, amortized=amortized, likelihood=name, **FIT
            )
        )
        for slot in ("X_scuvae", "X_scuvae_scale"):
            assert np.isfinite(adata.obsm[slot]).all(), likelihood


def test_an_empty_cell_has_the_prior_and_an_empty_gene_is_fitted() -> None:
    adata = small_counts()
    adata.X[3], adata.X[:, 5] = 0, 0
    texts = said(lambda: tl.fit(adata, **FIT))
    assert texts == ["1 cells have no counts at all: their posterior is the prior"]
    np.testing.assert_allclose(adata.obsm["X_scuvae"][3], 0, atol=1e-5)
    np.testing.assert_allclose(adata.obsm["X_scuvae_scale"][3], 1, atol=1e-5)


@pytest.mark.parametrize("verb", [tl.score, tl.refine, tl.denoise, tl.predictive_check, tl.sample])
@pytest.mark.parametrize("value", [np.nan, -1, 1e20])
def test_values_that_went_bad_after_the_fit(verb: Callable[..., object], value: float) -> None:
    adata = small_counts()
    tl.fit(adata, **FIT)
    adata.X[3, 7] = value
    with unchanged(adata), pytest.raises(ValueError, match=r"adata\.X holds .* cell 'cell3'"):
        verb(adata)


@pytest.mark.parametrize("of", ["csr", "csc", "dask"])
def test_half_precision_is_no_matter(of: str) -> None:
    """Nor is anything said of it: what is compared with it is not beyond it."""
    alone, adata = small_counts(), small_counts()
    tl.fit(alone, likelihood="nb", **FIT)
    if of == "dask":
        adata.X = pytest.importorskip("dask.array").from_array(adata.X.astype(np.float16), (20, 40))
    else:
        matrix = sp.csr_matrix(adata.X) if of == "csr" else sp.csc_matrix(adata.X)
        matrix.data = matrix.data.astype(np.float16)  # as files hold it; scipy makes none
        adata.X = matrix
    assert said(lambda: tl.fit(adata, likelihood="nb", **FIT)) == []
    np.testing.assert_allclose(adata.obsm["X_scuvae"], alone.obsm["X_scuvae"], atol=1e-5)
