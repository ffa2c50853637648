"""The catalogue: what a column of names may hold, and what is made of it, whoever reads it."""

import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from catalogue import FIT, Row, refused, said
from helpers import N_OBS, assert_same_posterior, small_counts, small_fit, unchanged

from scuvae import pl, tl

FIRST = np.arange(N_OBS) % 2 == 0


def two(a: Any, b: Any) -> list[Any]:
    """Either value for a half of the cells."""
    return [a if first else b for first in FIRST]


# --- no names -----------------------------------------------------------------------------------

NO_NAMES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "lists": ([["a"]] * N_OBS, TypeError, ["holds ['a'], a list", ".astype(str)"]),
    "dicts": ([{}] * N_OBS, TypeError, ["holds {}, a dict", ".astype(str)"]),
    "objects": ([object()] * N_OBS, TypeError, ["holds <object object", ".astype(str)"]),
    "a category of tuples": (
        pd.Categorical(pd.Index(two(("a", 1), ("b", 2)), tupleize_cols=False)),
        TypeError,
        ["holds ('a', 1), a tuple", ".astype(str)"],
    ),
    "half a character": (two("\ud800", "b"), ValueError, ["no file takes", "rename it"]),
    "a NUL": (two("a\0b", "b"), ValueError, ["holds 'a\\x00b'", "no file takes", "rename it"]),
}


@pytest.fixture(scope="module")
def reference() -> AnnData:
    return small_fit(small_counts(), max_epochs=1)


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str, reference: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    values, kind, says = NO_NAMES[name]

    def change(adata: AnnData) -> None:
        adata.obs["c"] = values

    for options in ({"batch_key": "c"}, {"categorical_covariate_keys": ["c"]}):
        refused(Row(["adata.obs['c']", *says], change, options, kind), monkeypatch)
    fitted, new = reference.copy(), small_counts(seed=1)
    change(fitted)
    calls: dict[str, Callable[[], object]] = {
        "groupby": lambda: tl.rank_genes(fitted, "c"),
        "donor_key": lambda: tl.rank_genes(fitted, "cell_type", donor_key="c"),
        "labels": lambda: tl.transfer_labels(new, fitted, labels="c"),
    }
    for argument, call in calls.items():
        with unchanged(new), pytest.raises(kind) as caught:
            call()
        for part in (".obs['c']", *says):
            assert part in str(caught.value), argument


# --- names --------------------------------------------------------------------------------------

DATES = pd.to_datetime(two("2020-01-31", "2021-01-31"))
# Values, and what those of the first and of the second half are called, in files too.
NAMES: dict[str, tuple[Any, str, str]] = {
    "dates": (DATES, "2020-01-31", "2021-01-31"),
    "a category of dates": (pd.Categorical(DATES), "2020-01-31", "2021-01-31"),
    "times": (
        DATES.tz_localize("UTC"),
        "2020-01-31 00:00:00+00:00",
        "2021-01-31 00:00:00+00:00",
    ),
    "days of Python": (
        two(datetime.date(2020, 1, 31), datetime.date(2021, 1, 31)),
        "2020-01-31",
        "2021-01-31",
    ),
    "durations": (pd.to_timedelta(two(1, 2), "D"), "1 days", "2 days"),
    "months": (pd.PeriodIndex(DATES, freq="M"), "2020-01", "2021-01"),
    "intervals": (pd.cut(np.array(two(1, 2)), [0, 1, 2]), "(0, 1]", "(1, 2]"),
    "decimals": (two(Decimal("1.5"), Decimal("2.5")), "1.5", "2.5"),
    "large numbers": (two(10**30, 10**31), str(10**30), str(10**31)),
    "bytes": (two(b"a", b"b"), "a", "b"),
    "another byte order": (np.array(two(1, 2), ">i4"), "1", "2"),
    "half precision": (np.array(two(1, 2), np.float16), "1.0", "2.0"),
    "sparse": (pd.arrays.SparseArray(two(0, 1)), "0", "1"),
    "nullable": (pd.array(two(1, 2), "Int64"), "1", "2"),
    "nullable truth values": (pd.array(two(False, True), "boolean"), "False", "True"),
    "pandas' strings": (pd.array(two("a", "b"), "string"), "a", "b"),
    "numbers and text": (two(1, "a"), "1", "a"),
    "an ordered category": (
        pd.Categorical(two("lo", "hi"), ["lo", "hi"], ordered=True),
        "lo",
        "hi",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_however_they_are_stored(name: str, reference: AnnData, tmp_path: Path) -> None:
    """As batches they give the same fit as their text; as labels and groups they go into files."""
    values, *called = NAMES[name]
    one, text = small_counts(), small_counts()
    one.obs["c"], text.obs["c"] = values, two(*called)
    for adata in (one, text):
        said(lambda adata=adata: tl.fit(adata, batch_key="c", **FIT))
        assert list(adata.uns["scuvae"]["params"]["batches"]) == sorted(called)
    assert_same_posterior(one, text)

    fitted, new = reference.copy(), small_counts(seed=1)
    fitted.obs["c"] = values
    if name != "half precision":  # a measurement, where groups and labels are meant
        tl.rank_genes(fitted, "c")
        assert sorted(fitted.uns["rank_genes_groups"]["names"].dtype.names) == sorted(called)
        tl.transfer_labels(new, fitted, labels="c")
        new.write_h5ad(tmp_path / "new.h5ad")
        back = ad.read_h5ad(tmp_path / "new.h5ad")
        assert set(back.obs["scuvae_label"].astype(str)) <= set(called)
    pl.elbo_by_size(tl.score(fitted, n_samples=2, copy=True), groupby="c", show=False)


@pytest.mark.parametrize(
    "stored",
    [lambda x: x.astype(float), lambda x: x.astype(str), lambda x: pd.array(x, "Int64")],
    ids=["floats", "text", "nullable"],
)
def test_labels_are_judged_by_value(stored: Callable[[np.ndarray], Any]) -> None:
    """1, 1.0 and "1" are one label, as they are one batch."""
    adata = small_counts(n_obs=30)
    truth = np.arange(30) % 2
    adata.obs["scuvae_label_probability"] = 0.8
    table = pd.DataFrame({"0": 1.0 - truth, "1": 1.0 * truth}, adata.obs_names)
    adata.obsm["scuvae_label_probabilities"] = table
    adata.uns["scuvae_label_calibration"] = {"accuracy": [1.0]}
    adata.obs["truth"] = stored(truth)
    ax = pl.label_reliability(adata, labels="truth", show=False)
    assert ax.containers[0].lines[0].get_ydata().tolist() == [1]  # all are right
