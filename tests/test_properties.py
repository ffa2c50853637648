"""Properties over shapes, dtypes, sparsity and names, by hypothesis.

Few examples here; ``SCUVAE_EXAMPLES=100 pytest tests/test_properties.py`` takes a hundred times as
many.
"""

import contextlib
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import assert_same_posterior, fingerprint, small_counts, small_fit
from scipy import sparse as sp

from scuvae import tl
from scuvae._adata import find_level
from scuvae._keys import Keys
from scuvae.cli.arguments import lines
from scuvae.io import inputs

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

_TIMES = int(os.environ.get("SCUVAE_EXAMPLES", "1"))


def examples(n: int) -> Any:
    """So many in the ordinary suite, always the same; those of a long run are drawn anew."""
    return settings(max_examples=n * _TIMES, deadline=None, derandomize=_TIMES == 1, database=None)


CONTAINERS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
}
DTYPES = ["bool", "u1", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8"]


@st.composite
def counts(draw: Any, most_cells: int = 12, most_genes: int = 8) -> np.ndarray:
    """Whole numbers that every dtype holds, mostly zeros or mostly not; somewhere not zero."""
    shape = draw(st.integers(1, most_cells)), draw(st.integers(1, most_genes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.poisson(draw(st.sampled_from([0.1, 1.0, 20.0])), shape).clip(0, 100)
    x[rng.integers(shape[0]), rng.integers(shape[1])] += 1
    return np.asarray(x)


TINY = {"n_latent": 2, "n_hidden": 4, "max_epochs": 1, "progress": False}


@examples(12)
@given(counts(), st.sampled_from(DTYPES), st.sampled_from(list(CONTAINERS)), st.booleans())
def test_every_container_and_dtype(
    x: np.ndarray, dtype: str, container: str, amortized: bool
) -> None:
    """The posterior is that of dense float32; what was handed in is as it was."""
    x = (x > 0) if dtype == "bool" else x
    hypothesis.assume(dtype != "f2" or "cs" not in container)  # scipy has no such matrices
    # Of two cells both genes say as much: rounding has the sign of the axis that means start from.
    hypothesis.assume(len(x) > 2)
    given_x = CONTAINERS[container](x.astype(dtype))
    one, two = AnnData(x.astype(np.float32)), AnnData(given_x)
    before = fingerprint(two.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adata in (one, two):
            tl.fit(adata, amortized=amortized, **TINY)
    assert fingerprint(two.X) == before
    for slot in ("X_scuvae", "X_scuvae_scale"):
        values = two.obsm[slot]
        assert values.shape == (len(x), 2)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    # Sparse and dense values are added up in other orders.
    assert_same_posterior(one, two, atol=1e-3)


def names(least: int, alphabet: Any = None) -> Any:
    text = st.text(
        alphabet or st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
    )
    return st.lists(text, min_size=least, max_size=least, unique=True)


@examples(6)
@given(names(20), names(8))
def test_fits_survive_files_whatever_names_are(cells: list[str], genes: list[str]) -> None:
    adata = small_counts(n_obs=20, n_vars=8)
    adata.obs_names, adata.var_names = cells, genes
    small_fit(adata, max_epochs=1, batch_key="batch")
    with tempfile.TemporaryDirectory() as folder:
        adata.write_h5ad(Path(folder) / "fit.h5ad")
        back = ad.read_h5ad(Path(folder) / "fit.h5ad")
    assert back.uns["scuvae"]["manifest"] == adata.uns["scuvae"]["manifest"]
    assert list(back.var_names) == genes
    assert_same_posterior(adata, back)
    new = small_counts(n_obs=5, n_vars=8, seed=1)
    new.var_names = genes
    tl.project(new, back, max_steps=1, polish=False)


@examples(60)
@given(st.text(max_size=6) | st.sampled_from([".", "..", "a/b", "\0", "x" * 191, "ä" * 96]))
def test_a_key_is_refused_or_a_name_in_files(key: str) -> None:
    keys = None
    with contextlib.suppress(ValueError):
        keys = Keys.of(key)
    if keys is None:
        with pytest.raises(ValueError, match=re.escape(repr(key))):
            Keys.of(key)
        return
    adata = AnnData(np.ones((2, 1), np.float32))
    adata.obsm[keys.mean], adata.uns[keys.uns] = np.ones((2, 1)), {"a": 1}
    adata.obs[keys.obs["split"]] = 1.0
    with tempfile.TemporaryDirectory() as folder:
        adata.write_h5ad(Path(folder) / "a.h5ad")
        back = ad.read_h5ad(Path(folder) / "a.h5ad")
    assert key in back.obsm or key == "scuvae"
    assert keys.obs["split"] in back.obs


@pytest.fixture(scope="module")
def reference() -> AnnData:
    return small_fit(small_counts(), max_epochs=2)


@examples(6)
@given(st.randoms(use_true_random=False), st.integers(1, 12), st.integers(5, 40))
def test_a_cell_is_projected_alike_in_any_company(
    reference: AnnData, random: Any, n_cells: int, n_genes: int
) -> None:
    """Whatever other cells there are, in whatever order, and in whatever order genes are."""
    new = small_counts(n_obs=12, seed=2)
    genes = random.sample(range(new.n_vars), n_genes)
    cells = random.sample(range(new.n_obs), n_cells)
    all_cells = new[:, sorted(genes)].copy()
    some = new[cells][:, genes].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few genes are few, and a cell may have no counts there
        for adata in (all_cells, some):
            tl.project(adata, reference, polish=False)
    assert_same_posterior(all_cells[cells].copy(), some, atol=2e-3)


@examples(150)
@given(
    counts(),
    st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.5, 1e39, 1e20]),
    st.sampled_from(list(CONTAINERS)),
    st.integers(0, 2**32 - 1),
)
def test_a_wrong_value_is_found_where_it_is(
    x: np.ndarray, value: float, container: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    row, column = rng.integers(x.shape[0]), rng.integers(x.shape[1])
    x = x.astype(np.float64)
    x[row, column] = value
    adata = AnnData(CONTAINERS[container](x))
    matrix = inputs.read_matrix(adata, None)
    with pytest.raises(ValueError, match=rf"cell '{row}', gene '{column}'") as caught:
        inputs.check_values(matrix, adata, None, None, likelihood="poisson", support="counts")
    assert f"holds {value:g}" in str(caught.value)


@examples(100)
@given(st.lists(st.booleans(), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_a_series_is_lined_up_by_name(wanted: list[bool], random: Any) -> None:
    hypothesis.assume(any(wanted))
    adata = AnnData(np.ones((2, len(wanted)), np.float32))
    series = pd.Series(wanted, index=adata.var_names)
    order = list(adata.var_names)
    random.shuffle(order)
    np.testing.assert_array_equal(inputs.gene_mask(adata, series[order]), wanted)


@examples(150)
@given(
    st.lists(
        st.text(st.characters(categories=["L", "N"], max_codepoint=0x2FF), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.booleans(),
)
def test_a_text_file_is_its_names(genes: list[str], end: str, encoding: str, quoted: bool) -> None:
    genes = [f"g{gene}" for gene in genes]  # no header
    text = end.join(f'"{gene}"' if quoted else gene for gene in genes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "genes.txt"
        path.write_bytes(text.encode(encoding))
        assert lines(str(path)) == genes


@examples(150)
@given(st.integers(-5, 30) | st.booleans(), st.sampled_from([int, float, str, np.float32]))
def test_a_level_is_what_it_says(value: Any, kind: Any) -> None:
    levels = [str(n) for n in range(-5, 31)]
    number = int(value)
    stored = kind(number) if not isinstance(value, bool) else value
    found = find_level(stored, levels)
    assert found is not None
    assert int(levels[found]) == number
