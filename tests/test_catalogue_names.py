"""The catalogue: names and categories. Genes, cells and levels meet by what they are called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from catalogue import FIT, Row, refused, rows, said, warned
from helpers import N_OBS, N_VARS, assert_same_posterior, small_counts, small_fit, unchanged

from scuvae import tl
from scuvae.cli.arguments import lines

FEW = {"max_steps": 1, "polish": False}


@pytest.fixture(scope="module")
def reference() -> AnnData:
    return small_fit(small_counts(), batch_key="batch", max_epochs=1)


def obs(name: str, values: Any) -> Callable[[AnnData], None]:
    def change(adata: AnnData) -> None:
        adata.obs[name] = values(adata) if callable(values) else values

    return change


def twice(column: str, axis: str = "obs") -> Callable[[AnnData], None]:
    def change(adata: AnnData) -> None:
        frame = getattr(adata, axis)
        setattr(adata, axis, pd.concat([frame, frame[[column]]], axis=1))

    return change


# --- columns of obs and var ---------------------------------------------------------------------

NAMED = {
    "batch_key": ["pass the name of one column of adata.obs", "categorical_covariate_keys="],
    "size_factor_key": ["pass the name of one column of adata.obs"],
    "layer": ["pass the name of one of adata.layers, or None for adata.X"],
}
ODD: dict[str, Any] = {
    "a list": ["batch"],
    "a tuple": ("batch",),
    "a set": {"batch"},
    "bytes": b"batch",
    "a number": 5,
    "a float": 2.5,
    "a Series": pd.Series(["batch"]),
    "an array": np.array(["batch"]),
    "an object": object,
    "missing": pd.NA,
}
WRONG: dict[str, Row] = {
    f"{argument}: {what}": Row(
        [f"{argument}=", f"is a {type(value).__name__}", *says],
        options={argument: value},
        kind=TypeError,
    )
    for argument, says in NAMED.items()
    for what, value in ODD.items()
}
WRONG |= {
    f"{argument}: a column twice": Row(
        [f"2 columns named {column!r}", argument, "keep one"], twice(column), {argument: given}
    )
    for argument, column, given in (
        ("batch_key", "batch", "batch"),
        ("size_factor_key", "expected", "expected"),
        ("categorical_covariate_keys", "cell_type", ["cell_type"]),
        ("continuous_covariate_keys", "expected", ["expected"]),
    )
}
WRONG |= {
    "mask_var: a column twice": Row(
        ["2 columns named 'highly_variable'", "keep one"],
        twice("highly_variable", "var"),
        {"mask_var": "highly_variable"},
    ),
    "logical size factors": Row(
        ["adata.obs['s'] has dtype bool", "numbers", ".astype(float)"],
        obs("s", True),
        {"size_factor_key": "s"},
        TypeError,
    ),
    "a measurement as batch": Row(
        ["adata.obs['m'] is float64", "continuous_covariate_keys="],
        obs("m", np.linspace(0, 1, N_OBS)),
        {"batch_key": "m"},
    ),
    "a batch that is missing": Row(
        ["adata.obs['m'] is missing for 2 cells", "'cell0'", "or drop them"],
        obs("m", lambda adata: [None, None, *["a"] * (N_OBS - 2)]),
        {"batch_key": "m"},
    ),
    "a covariate that is missing": Row(
        ["adata.obs['m'] is nan for 1 cells", "'cell0'", "or drop them"],
        obs("m", lambda adata: [np.nan, *np.arange(N_OBS - 1.0)]),
        {"continuous_covariate_keys": ["m"]},
    ),
    "a covariate twice": Row(
        ["both name 'batch'", "Leave out one"],
        options={"batch_key": "batch", "categorical_covariate_keys": ["batch"]},
    ),
    "a covariate that does not vary": Row(
        ["adata.obs['m'] is 3 for all", "Leave it out"],
        obs("m", 3.0),
        {"continuous_covariate_keys": ["m"]},
    ),
}


@rows(WRONG)
def test_columns(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(row, monkeypatch)


BATCH = {"batch_key": "b"}
WARNED = {
    "a batch for every cell": Row(
        ["adata.obs['b']", f"{N_OBS} levels for {N_OBS} cells", "measurement"],
        obs("b", lambda adata: adata.obs_names.to_numpy()),
        BATCH,
    ),
    "a batch for nearly every cell, integers": Row(
        ["adata.obs['b']", "nearly one for every cell", "continuous_covariate_keys="],
        obs("b", np.arange(N_OBS) // 2 * 100 + np.arange(N_OBS) % 2),
        BATCH,
    ),
    "floats as batch": Row(
        ["adata.obs['b'] has dtype float64", "3 values", "continuous_covariate_keys="],
        obs("b", np.arange(N_OBS) % 3 + 0.5),
        BATCH,
    ),
    "whole floats as covariate": Row(
        ["adata.obs['b'] has dtype float32", ".astype('category')"],
        obs("b", (np.arange(N_OBS) % 3).astype(np.float32)),
        {"categorical_covariate_keys": ["b"]},
    ),
    "missing values that became text": Row(
        ["adata.obs['b'] has a level 'nan', of 10 cells", "missing value"],
        obs("b", ["nan"] * 10 + ["a"] * 50),
        BATCH,
    ),
    "None that became text": Row(
        ["a level 'None', of 30 cells", "missing value"], obs("b", ["None", "a"] * 30), BATCH
    ),
    "size factors of mean one": Row(
        ["adata.obs['s']", "a median of 0.", "totals", "nor logarithms"],
        obs("s", lambda adata: adata.obs["expected"] / adata.obs["expected"].mean()),
        {"size_factor_key": "s"},
    ),
    "logarithms of totals": Row(
        ["adata.obs['s']", "a median of 5.", "totals", "nor logarithms"],
        obs("s", lambda adata: np.log(adata.obs["expected"])),
        {"size_factor_key": "s"},
    ),
    "totals over all genes beside a mask": Row(
        ["adata.obs['expected']", "a median of", "totals over all genes", "mask_var="],
        options={"size_factor_key": "expected", "mask_var": "highly_variable"},
    ),
    "size factors under a Gaussian": Row(
        ["size_factor_key='expected' has no part in likelihood='gaussian'"],
        options={"size_factor_key": "expected", "likelihood": "gaussian"},
    ),
}


@rows(WARNED)
def test_columns_that_hardly_mean_what_they_say(row: Row) -> None:
    warned(row)


def test_totals_are_size_factors_without_a_word() -> None:
    adata = small_counts()
    mask = adata.var["highly_variable"].to_numpy()
    adata.obs["masked"] = adata.X[:, mask].sum(1) + 0.5
    for options in (
        {"size_factor_key": "expected"},
        {"size_factor_key": "masked", "mask_var": mask},
    ):
        assert said(lambda options=options: tl.fit(adata, **FIT, **options)) == []


def test_size_factors_of_new_cells(reference: AnnData) -> None:
    old = small_fit(small_counts(), size_factor_key="expected", max_epochs=1)
    new = small_counts(seed=1)
    assert said(lambda: tl.project(new, old, **FEW)) == []
    new.obs["expected"] = np.log1p(new.obs["expected"])
    (text,) = said(lambda: tl.project(new, old, **FEW))
    assert "adata.obs['expected'], the size factors, has a median of" in text


# --- levels are what values say -----------------------------------------------------------------

STORED: dict[str, Callable[[np.ndarray], Any]] = {
    "integers": lambda x: x.astype(int),
    "floats": lambda x: x.astype(float),
    "truth values": lambda x: x.astype(bool),
    "text": lambda x: x.astype(int).astype(str),
    "text of floats": lambda x: x.astype(float).astype(str),
    "nullable": lambda x: pd.array(x.astype(int), dtype="Int64"),
    "a category of floats": lambda x: pd.Categorical(x.astype(float)),
    "a category of truth values": lambda x: pd.Categorical(x.astype(bool)),
    "a mixture": lambda x: np.array(
        [int(v) if i % 2 else str(int(v)) for i, v in enumerate(x)], object
    ),
}


@pytest.mark.parametrize("new", STORED)
@pytest.mark.parametrize("old", ["integers", "floats", "truth values", "text"])
def test_levels_are_compared_by_value(old: str, new: str) -> None:
    first, second = small_counts(), small_counts(seed=1)
    first.obs["b"] = STORED[old]((first.obs["batch"] == "b0").to_numpy())
    second.obs["b"] = STORED[new]((second.obs["batch"] == "b0").to_numpy())
    with np.errstate(all="raise"):
        said(lambda: tl.fit(first, batch_key="b", **{**FIT, "n_latent": 2}))
    tl.project(second, first, new_batches="estimate", **FEW)
    assert len(second.uns["scuvae"]["params"]["batches"]) == 2
    tl.project(second, first, **FEW)  # no batch is unknown


# --- masks --------------------------------------------------------------------------------------

WANTED = pd.Series(np.arange(N_VARS) % 3 != 0, index=[f"gene{i}" for i in range(N_VARS)])
MASKS = {
    "by position": WANTED.to_numpy(),
    "a list": WANTED.tolist(),
    "a Series": WANTED,
    "a shuffled Series": WANTED.sample(frac=1, random_state=0),
    "a Series of more genes": pd.concat([WANTED, pd.Series({"other": True})]),
    "nullable": WANTED.astype("boolean").sample(frac=1, random_state=1),
}
NO_MASKS = {
    "without names": (WANTED.reset_index(drop=True), ValueError, ["lacks 40 of adata's genes"]),
    "of fewer genes": (WANTED[:30], ValueError, ["lacks 10 of adata's genes", "'gene30'"]),
    "a name twice": (pd.concat([WANTED, WANTED[:1]]), ValueError, ["'gene0' twice", "keep one"]),
    "missing": (WANTED.astype("boolean").where(WANTED), ValueError, ["missing for 14 genes"]),
    "a table": (WANTED.to_frame(), TypeError, ["DataFrame", "one of its columns"]),
    "names": (list(WANTED.index[WANTED]), ValueError, ["boolean", "adata.var_names.isin(names)"]),
    "numbers": (WANTED.astype(int), ValueError, ["boolean", "40 genes"]),
    "a number": (5, ValueError, ["boolean"]),
    "too short": (WANTED.to_numpy()[:-1], ValueError, ["shape (39,)", "40 genes"]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_lined_up_by_name(name: str) -> None:
    adata = small_fit(small_counts(), mask_var=MASKS[name], max_epochs=1)
    assert list(adata.uns["scuvae"]["var_names"]) == list(WANTED.index[WANTED])


@pytest.mark.parametrize("name", NO_MASKS)
def test_no_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, kind, says = NO_MASKS[name]
    refused(Row(["mask_var", *says], options={"mask_var": value}, kind=kind), monkeypatch)


# --- names of cells and genes -------------------------------------------------------------------

INDEXES: dict[str, Callable[[pd.Index], pd.Index]] = {
    "integers": lambda names: pd.RangeIndex(len(names)),
    "bytes": lambda names: pd.Index([name.encode() for name in names]),
    "floats": lambda names: pd.Index(np.arange(len(names)) + 0.5),
    "one None": lambda names: pd.Index([None, *names[1:]]),
    "one NaN": lambda names: pd.Index([np.nan, *names[1:]]),
    "all the same": lambda names: pd.Index(["a"] * len(names)),
    "tuples": lambda names: pd.MultiIndex.from_tuples([("a", i) for i in range(len(names))]),
    "dates": lambda names: pd.date_range("2020", periods=len(names)),
    "a category": lambda names: pd.CategoricalIndex(names),
    "half characters": lambda names: pd.Index(["\ud800", *names[1:]]),
}


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_of_cells_are_no_matter(name: str, reference: AnnData) -> None:
    """Parameters go by row."""
    plain, odd = (small_counts(seed=1) for _ in range(2))
    odd.obs.index = INDEXES[name](odd.obs_names)
    for adata in (plain, odd):
        small_fit(adata, key_added="own", max_epochs=1)
        tl.project(adata, reference, **FEW)
    assert_same_posterior(plain, odd)
    assert_same_posterior(plain, odd, atol=0)
    odd.obs["batch"] = "new"
    tl.project(odd, reference, new_batches="estimate", **FEW)
    odd.X[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"adata\.X holds nan at cell .*, gene 'gene7'"):
        small_fit(odd)


@pytest.mark.parametrize("name", ["integers", "bytes", "a category"])
def test_genes_whose_names_are_no_strings(name: str) -> None:
    one, two = (small_counts(seed=seed) for seed in (0, 1))
    one.var.index = two.var.index = INDEXES[name](one.var_names)
    small_fit(one, max_epochs=1)
    tl.project(two, one, **FEW)
    assert two.uns["scuvae"]["genes"]["n_observed"] == N_VARS


GENES = {
    "one None": (["missing for 1 genes", "column 0", "drop them"], ValueError),
    "one NaN": (["missing for 1 genes", "column 0", "drop them"], ValueError),
    "all the same": (["holds 'a' more than once", "var_names_make_unique()"], ValueError),
    "tuples": (["2 levels", "set adata.var_names"], TypeError),
}


@pytest.mark.parametrize("name", GENES)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_without_a_name_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says, kind = GENES[name]

    def change(adata: AnnData) -> None:
        adata.var.index = INDEXES[name](adata.var_names)

    refused(Row(["adata.var_names", *says], change, kind=kind), monkeypatch)


def test_genes_that_are_one_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(adata: AnnData) -> None:
        adata.var.index = pd.Index([1, "1", *adata.var_names[2:]], dtype=object)

    def nul(adata: AnnData) -> None:
        adata.var.index = pd.Index(["a\0", *adata.var_names[1:]])

    refused(Row(["adata.var_names holds '1' more than once"], same), monkeypatch)
    refused(Row(["adata.var_names holds 'a\\x00'", "rename"], nul), monkeypatch)


# --- genes that are spelt otherwise -------------------------------------------------------------


def ensembl(i: int, version: str) -> str:
    return f"ENSG{i:011d}{version}"


SPELT: dict[str, tuple[Callable[[int], str], Callable[[int], str], str]] = {
    "versions, none": (lambda i: ensembl(i, f".{i % 7 + 1}"), lambda i: ensembl(i, ""), "version"),
    "none, versions": (lambda i: ensembl(i, ""), lambda i: ensembl(i, ".2"), "version"),
    "another release": (
        lambda i: ensembl(i, ".1"),
        lambda i: ensembl(i, ".1" if i % 5 == 0 else ".2"),
        "version",
    ),
    "case": (lambda i: f"GENE{i}", lambda i: f"Gene{i}", "upper and lower case"),
    "case of a half": (
        lambda i: f"GENE{i}",
        lambda i: f"gene{i}" if i % 2 else f"GENE{i}",
        "upper and lower case",
    ),
    "spaces": (lambda i: f"gene{i}", lambda i: f" gene{i} ", "spaces"),
    "several": (lambda i: f"GENE{i}.1", lambda i: f"gene{i} ", "case, spaces and version"),
}


@pytest.mark.parametrize("name", SPELT)
def test_genes_that_are_spelt_otherwise(name: str) -> None:
    old, new, says = SPELT[name]
    reference, adata = small_counts(), small_counts(seed=1)
    reference.var_names = [old(i) for i in range(N_VARS)]
    adata.var_names = [new(i) for i in range(N_VARS)]
    small_fit(reference, max_epochs=1)
    if set(reference.var_names) & set(adata.var_names):
        (text,) = said(lambda: tl.project(adata, reference, **FEW))
    else:
        with unchanged(adata, reference), pytest.raises(ValueError, match="no gene") as caught:
            tl.project(adata, reference, **FEW)
        text = str(caught.value)
    assert says in text
    assert "spell them alike" in text


def test_genes_that_are_others_need_no_such_word(reference: AnnData) -> None:
    adata = small_counts(seed=1)[:, :30].copy()
    adata.var_names = [*adata.var_names[:20], *(f"other{i}" for i in range(10))]
    assert said(lambda: tl.project(adata, reference, **FEW)) == []


# --- a text file of genes -----------------------------------------------------------------------

TEXTS = {
    "plain": b"CD3E\nMS4A1\n",
    "no last line": b"CD3E\nMS4A1",
    "Windows": b"CD3E\r\nMS4A1\r\n",
    "old Macs": b"CD3E\rMS4A1\r",
    "byte-order mark": b"\xef\xbb\xbfCD3E\nMS4A1\n",
    "UTF-16": "CD3E\r\nMS4A1\r\n".encode("utf-16"),
    "header": b"gene\nCD3E\nMS4A1\n",
    "header of R": b'"x"\n"CD3E"\n"MS4A1"\n',
    "quotes": b"\"CD3E\"\n'MS4A1'\n",
    "spaces and empty lines": b"\n  CD3E \n\n\tMS4A1\t\n\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_of_genes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_bytes(TEXTS[name])
    assert lines(str(path)) == ["CD3E", "MS4A1"]
