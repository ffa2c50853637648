"""Cells on disk: each format against the same matrix in memory, and what a changing file does."""

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from helpers import SMALL, assert_same_posterior, fingerprint, small_counts, small_fit
from scipy import sparse as sp

from scuvae import tl
from scuvae.batches import Cells, spill
from scuvae.batches.sources import on_disk
from scuvae.batches.sources.registry import source_of
from scuvae.batches.stored.base import Stored
from scuvae.batches.stored.matrix import StoredMatrix
from scuvae.batches.stored.registry import STORED, kind_of
from scuvae.inference.training import loop
from scuvae.kernels.malloc import keep_freed_memory

CPU = torch.device("cpu")


def small_sparse() -> AnnData:
    adata = small_counts()
    adata.X = sp.csr_matrix(adata.X)
    return adata


def _h5(path: Path, adata: AnnData) -> AnnData:
    adata.write_h5ad(path / "a.h5ad", compression="gzip")
    return ad.read_h5ad(path / "a.h5ad", backed="r")


def _zarr(path: Path, adata: AnnData) -> AnnData:
    adata.write_zarr(path / "a.zarr")
    store = zarr.open_group(str(path / "a.zarr"), mode="r")
    x = store["X"]
    matrix = sparse_dataset(x) if hasattr(x, "keys") else x
    return AnnData(matrix, obs=read_elem(store["obs"]), var=read_elem(store["var"]))


def _dask(path: Path, adata: AnnData) -> AnnData:
    array = pytest.importorskip("dask.array")
    adata = adata.copy()
    x = array.from_array(adata.X, chunks=((7, 20, 1, 32), (11, 29)), asarray=False)
    adata.X = x
    return adata


def _lazy(path: Path, adata: AnnData) -> AnnData:
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    adata.write_h5ad(path / "a.h5ad")
    return ad.experimental.read_lazy(path / "a.h5ad")


def _files(path: Path, adata: AnnData) -> AnnData:
    """Several files as one data set."""
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    adata[:23].write_h5ad(path / "0.h5ad")
    adata[23:].write_h5ad(path / "1.h5ad")
    parts = [ad.experimental.read_lazy(path / f"{number}.h5ad") for number in (0, 1)]
    return ad.concat(parts, merge="same")


OPENED: dict[str, Callable[[Path, AnnData], AnnData]] = {
    "h5ad": _h5,
    "zarr": _zarr,
    "dask": _dask,
    "lazy": _lazy,
    "files": _files,
}
every_format = pytest.mark.parametrize("opened", OPENED)
both_kinds = pytest.mark.parametrize("container", [sp.csr_matrix, np.asarray])


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits the buffer, which holds some twenty cells."""
    monkeypatch.setattr(on_disk, "BUFFER", 2**12)
    monkeypatch.setattr(on_disk, "SHORTEST", 2)


def stored(x: Any, columns: Any = None) -> StoredMatrix:
    kind = kind_of(x)
    assert kind is not None
    return StoredMatrix(kind(x), columns)


def dense(x: Any) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)


# --- what is read -------------------------------------------------------------------------------


@both_kinds
@every_format
def test_values_are_those_in_memory(opened: str, container: Any, tmp_path: Path) -> None:
    adata = small_counts()
    x = np.array(adata.X)
    adata.X = container(x)
    some = np.array([3, 5, 6, 30])
    found = OPENED[opened](tmp_path, adata)
    for columns in (None, some):
        matrix = stored(found.X, columns)
        expected = x if columns is None else x[:, columns]
        assert matrix.shape == expected.shape
        edges = matrix.stored.edges(16)
        assert edges[0] == 0
        assert edges[-1] == len(x)
        assert (np.diff(edges) > 0).all()
        for first, last in [(0, len(x)), (3, 4), (5, 41), *pairwise(edges)]:
            np.testing.assert_array_equal(dense(matrix.read(first, last)), expected[first:last])
        survey = matrix.survey([(big := lambda v: v > 20)])
        np.testing.assert_array_equal(survey.totals, expected.sum(1))
        assert survey.counts
        count, place = survey.found[big]
        assert count == (expected > 20).sum()
        row, column = np.argwhere(expected > 20)[0]
        assert place == (row, column, expected[row, column])


@both_kinds
@every_format
def test_a_part_is_those_rows(opened: str, container: Any, tmp_path: Path) -> None:
    """What a process of several sees."""
    adata = small_counts()
    x = np.array(adata.X)
    adata.X = container(x)
    whole = stored(OPENED[opened](tmp_path, adata).X, np.array([3, 5, 30]))
    part = whole.part(slice(5, 41))
    expected = x[5:41][:, [3, 5, 30]]
    assert part.shape == expected.shape
    np.testing.assert_array_equal(dense(part.read(2, 30)), expected[2:30])
    np.testing.assert_array_equal(part.survey().totals, expected.sum(1))
    for n_rows in (1, 16, 1000):
        edges = part.stored.edges(n_rows)
        assert (edges[0], edges[-1]) == (0, 36)
        assert (np.diff(edges) > 0).all()
    cells = Cells(source_of(part, CPU))
    rows = torch.tensor([35, 0, 7])
    x_of = cells.batch(rows).x
    np.testing.assert_array_equal(getattr(x_of, "dense", x_of), expected[rows])


def test_places_among_others(tmp_path: Path) -> None:
    adata = small_sparse()
    matrix = stored(_h5(tmp_path, adata).X, np.array([4, 9, 2])).spread(np.array([7, 0, 3]), 10)
    expected = np.zeros((adata.n_obs, 10), np.float32)
    expected[:, [7, 0, 3]] = adata.X.toarray()[:, [4, 9, 2]]
    np.testing.assert_array_equal(dense(matrix.read(0, adata.n_obs)), expected)


def test_duplicates_and_zeros_are_gone(tmp_path: Path) -> None:
    """Entries of one place are added up, zeros dropped: as of a matrix in memory."""
    x = sp.csr_matrix(
        (np.array([1.0, 2.0, 0.0, 4.0], np.float32), np.array([1, 1, 0, 2]), np.array([0, 2, 4])),
        shape=(2, 3),
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        ad.io.write_elem(file, "X", x)
        matrix = stored(sparse_dataset(file["X"]))
        found = matrix.read(0, 2)
        np.testing.assert_array_equal(found.toarray(), [[0, 3, 0], [0, 0, 4]])
        assert found.nnz == 2
        assert matrix.survey().lengths.tolist() == [1, 1]


def test_an_entry_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(Stored):
        sparse, per_row = False, 40.0

        @classmethod
        def takes(cls, x: Any) -> bool:
            return isinstance(x, np.ndarray) and x.dtype == np.int16

        def __init__(self, x: Any) -> None:
            self.x, self.shape, self.dtype = x, x.shape, x.dtype

        def read(self, first: int, last: int) -> Any:
            return self.x[first:last] * 2

        def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
            return self.close_to(n_rows, most, 1)

    monkeypatch.setitem(STORED, "doubled", Doubled)
    adata, twice = small_counts(), small_counts()
    twice.X = 2 * adata.X
    adata.X = adata.X.astype(np.int16)
    assert_same_posterior(small_fit(adata), small_fit(twice))


# --- batches ------------------------------------------------------------------------------------


@both_kinds
@every_format
@pytest.mark.usefixtures("streamed")
def test_every_cell_once_an_epoch(opened: str, container: Any, tmp_path: Path) -> None:
    adata = small_counts()
    x = np.array(adata.X)
    adata.X = container(x)
    source = source_of(stored(OPENED[opened](tmp_path, adata).X), CPU)
    assert source.streamed
    cells = Cells(source)
    rows = torch.arange(0, adata.n_obs).tensor_split(torch.tensor([20, 23]))
    training = torch.cat([rows[0], rows[2]])
    orders = []
    for generator in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        loader = cells.loader(training, 8, generator)
        seen = []
        for batch in loader:
            values = batch.x.dense if container is sp.csr_matrix else batch.x
            rows_of_x = x[batch.index.numpy()]
            np.testing.assert_array_equal(values, rows_of_x)
            np.testing.assert_array_equal(batch.size_factor, rows_of_x.sum(1))
            assert len(batch) == 8 or len(seen) == len(training) // 8
            seen.append(batch.index)
        order = torch.cat(seen)
        assert torch.equal(order.sort().values, training)
        orders.append(order)
    assert torch.equal(orders[0], training)
    assert not torch.equal(orders[1], orders[2])
    any_order = torch.tensor([50, 3, 4, 59])
    values = source.rows(any_order)
    np.testing.assert_array_equal(
        values.dense if container is sp.csr_matrix else values, x[any_order]
    )


def test_windows_are_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are sorted by kind: a batch's share of one varies hardly more than at random.

    With K blocks in a window the variance of a share is p (1 − p) (1/K + 1/B) at most, K and B the
    blocks of a window and the cells of a batch; that of random batches is the second part.
    """
    n, batch_size = 20_000, 50
    x = sp.csr_matrix(np.eye(4, dtype=np.float32)[np.arange(n) % 4])
    adata = AnnData(x)
    monkeypatch.setattr(on_disk, "BUFFER", 2**15)
    monkeypatch.setattr(on_disk, "SHORTEST", 4)
    source = source_of(stored(_h5(tmp_path, adata).X), CPU)
    assert isinstance(source, on_disk.OnDiskSource)
    assert source.window < n / 8
    n_blocks = 64  # chunks are longer than windows
    kind = torch.arange(n) < n // 4
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(4):
        order = source.order(torch.arange(n), batch_size, generator)
        assert torch.equal(order.sort().values, torch.arange(n))
        shares += [kind[part].double().mean() for part in order.split(batch_size)]
    variance = float(torch.stack(shares).var())
    at_random = 0.25 * 0.75 / batch_size
    # 1,600 batches: their variance is known to some 4 %.
    assert 0.85 * at_random < variance < 1.15 * (at_random + 0.25 * 0.75 / n_blocks)


def test_no_more_is_read_at_once_than_the_buffer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = AnnData(sp.random(4000, 50, 0.2, format="csr", dtype=np.float32, random_state=0))
    adata.X.data = np.ceil(adata.X.data * 9)
    monkeypatch.setattr(on_disk, "BUFFER", 2**14)
    matrix = stored(_h5(tmp_path, adata).X)
    source = source_of(matrix, CPU)
    sizes = []
    held = source.read  # type: ignore[attr-defined]

    def watched(rows: np.ndarray, device: torch.device) -> Any:
        sizes.append((found := held(rows, device)).matrix.nbytes)
        return found

    monkeypatch.setattr(source, "read", watched)
    for generator in (None, torch.Generator().manual_seed(0)):
        for _ in Cells(source).loader(torch.arange(4000), 32, generator):
            pass
    assert len(sizes) > 20
    assert max(sizes) < 1.2 * 2**13  # two of them are there at a time; rows are of random lengths


# --- fits ---------------------------------------------------------------------------------------


@both_kinds
@every_format
def test_a_small_set_is_fitted_as_in_memory(opened: str, container: Any, tmp_path: Path) -> None:
    """Bit for bit: what fits the buffer is shuffled as a whole."""
    adata = small_counts()
    adata.X = container(adata.X)
    options = {"batch_key": "batch", "mask_var": "highly_variable"}
    found = OPENED[opened](tmp_path, adata)
    small_fit(found, **options)
    small_fit(adata, **options)
    assert fingerprint(np.asarray(found.obsm["X_scuvae"])) == fingerprint(adata.obsm["X_scuvae"])
    np.testing.assert_array_equal(found.obsm["X_scuvae_scale"], adata.obsm["X_scuvae_scale"])
    np.testing.assert_array_equal(found.obsm["X_scuvae_embed"], adata.obsm["X_scuvae_embed"])
    assert found.uns["scuvae"]["history"].equals(adata.uns["scuvae"]["history"])


@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.usefixtures("streamed")
def test_a_streamed_fit_is_as_good(amortized: Any, tmp_path: Path) -> None:
    """Held-out cells, and all, are explained as well as by the fit in memory of another order."""
    adata = small_counts(n_obs=400)
    adata.X = sp.csr_matrix(adata.X)
    content = adata.X.copy()
    options = {"amortized": amortized, "max_epochs": 30, "early_stopping": False, "n_latent": 2}
    backed = _h5(tmp_path, adata)
    before = (tmp_path / "a.h5ad").read_bytes()
    tl.fit(backed, **SMALL | options)
    assert (tmp_path / "a.h5ad").read_bytes() == before
    tl.fit(adata, **SMALL | options)
    last = [x.uns["scuvae"]["history"].validation_elbo.iloc[-1] for x in (backed, adata)]
    assert abs(last[0] - last[1]) < 1.0, "nats, of some 80 a cell; seeds differ by .5"
    assert np.isfinite(backed.obsm["X_scuvae"]).all()
    fitted = AnnData(content, obs=backed.obs, var=backed.var, obsm=dict(backed.obsm))
    fitted.uns = dict(backed.uns)
    for x in (fitted, adata):
        tl.score(x, n_samples=20)
    assert abs(fitted.obs["scuvae_elbo"].mean() - adata.obs["scuvae_elbo"].mean()) < 1.0


@pytest.mark.usefixtures("streamed")
def test_verbs_read_from_disk(tmp_path: Path) -> None:
    """With the decoder frozen a cell's results do not depend on where it is read from."""
    reference, query = small_sparse(), small_sparse()
    small_fit(reference)
    query = query[:, ::-1][:, 3:].copy()  # other genes, in another order
    backed = _h5(tmp_path, query)
    for adata in (query, backed):
        tl.project(adata, reference)
        tl.score(adata, n_samples=5)
    assert_same_posterior(backed, query, atol=1e-5)  # genes are added up in another order
    np.testing.assert_allclose(backed.obs["scuvae_elbo"], query.obs["scuvae_elbo"], atol=1e-3)


@pytest.mark.parametrize("bad", [-1.0, 0.5, np.nan])
@every_format
def test_wrong_values_are_named_as_in_memory(opened: str, bad: float, tmp_path: Path) -> None:
    adata = small_sparse()
    adata.X.data[100] = bad
    messages = []
    for found in (OPENED[opened](tmp_path, adata), adata):
        with pytest.raises(ValueError, match="cell") as caught:
            small_fit(found, likelihood="nb")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("streamed")
def test_a_collection_of_annbatch_leaves_no_cell_out(tmp_path: Path) -> None:
    """Its own loaders round down; as parts of one data set its cells are all there."""
    annbatch = pytest.importorskip("annbatch")
    whole = small_sparse()
    whole.obs["row"] = np.arange(whole.n_obs)
    whole.write_h5ad(tmp_path / "a.h5ad")
    annbatch.DatasetCollection(tmp_path / "c.zarr").add_adatas([tmp_path / "a.h5ad"])
    collection = annbatch.DatasetCollection(tmp_path / "c.zarr", mode="r")
    adata = ad.concat([ad.experimental.read_lazy(group) for group in collection])
    row = np.asarray(adata.obs["row"])
    cells = Cells(source_of(stored(adata.X), CPU))
    seen = []
    for batch in cells.loader(torch.arange(len(cells)), 8, torch.Generator().manual_seed(0)):
        rows = row[batch.index]
        np.testing.assert_array_equal(batch.x.dense, whole.X[rows].toarray())
        seen += rows.tolist()
    assert sorted(seen) == list(range(whole.n_obs))


def test_csc_on_disk_is_loaded(tmp_path: Path) -> None:
    adata = small_counts()
    adata.X = sp.csc_matrix(adata.X)
    found = _zarr(tmp_path, adata)
    assert_same_posterior(small_fit(found), small_fit(small_sparse()))


def test_dask_arrays_of_unknown_length() -> None:
    array = pytest.importorskip("dask.array")
    x = array.from_array(np.ones((6, 3)), chunks=(2, 3))
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        stored(x[x[:, 0] > 0])


# --- files that change --------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["h5ad", "zarr"])
@pytest.mark.usefixtures("streamed")
def test_a_file_that_changes_is_noticed(opened: str, tmp_path: Path) -> None:
    adata = OPENED[opened](tmp_path, small_sparse())
    cells = Cells(source_of(stored(adata.X), CPU))
    batches: Iterator[Any] = iter(cells.loader(torch.arange(60), 8))
    next(batches)
    path = tmp_path / "a.h5ad"
    if opened == "zarr":
        path = next(p for p in (tmp_path / "a.zarr/X/data").rglob("*") if p.is_file())
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="has changed while it was read"):
        list(batches)


@pytest.mark.usefixtures("streamed")
def test_a_fit_of_a_file_that_changes_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = _h5(tmp_path, small_sparse())
    taken = on_disk.OnDiskSource.order

    def order(self: Any, *arguments: Any) -> Any:
        os.utime(tmp_path / "a.h5ad", ns=(1, 1))  # as the first epoch begins
        return taken(self, *arguments)

    monkeypatch.setattr(on_disk.OnDiskSource, "order", order)
    before = set(adata.obsm), set(adata.uns), set(adata.obs)
    with pytest.raises(OSError, match=r"a\.h5ad has changed while it was read"):
        small_fit(adata)
    assert (set(adata.obsm), set(adata.uns), set(adata.obs)) == before


def test_it_is_said_where_cells_are_read_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "BUFFER", 2**12)
    with caplog.at_level(logging.INFO, "scuvae"):
        small_fit(_h5(tmp_path, small_sparse()))
    assert any("read from disk as they are needed" in text for text in caplog.messages)


# --- tables -------------------------------------------------------------------------------------


def test_spilled_tables_keep_their_values() -> None:
    table = spill.room(1000, 7)
    assert table.shape == (1000, 7)
    assert table.dtype == np.float32
    assert not table.any()
    values = np.random.default_rng(0).normal(size=table.shape).astype(np.float32)
    table[:] = values
    spill.release()
    np.testing.assert_array_equal(table, values)
    tensor = torch.from_numpy(table)
    tensor[5] = 3.0
    spill.release()
    assert (table[5] == 3).all()
    assert spill.room(0, 4).shape == (0, 4)


def resident(kinds: tuple[str, ...]) -> int:
    """Bytes of this process's memory of some kinds, as Linux counts them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc")
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))


def test_a_few_rows_of_a_spilled_table_are_not_all_of_it() -> None:
    table = spill.room(2**18, 64)  # 64 MB
    for rows in np.split(table, 16):
        rows[:] = 1.0
        spill.release()
    before = resident(("RssFile", "RssShmem"))
    assert table[:: 2**10].sum() == 256 * 64
    # With each of these rows 64 kB are mapped, a quarter of all; half is as far as it may go.
    assert resident(("RssFile", "RssShmem")) - before < 2**25


def test_what_was_freed_is_given_back_with_tables() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("no glibc")
    keep_freed_memory()
    blocks = [torch.ones(2**18) for _ in range(64)]  # 64 MB in pieces that a heap holds
    kept = blocks[-1].clone()  # at its end: what lies before is not given back by itself
    table = spill.room(8, 8)
    before = resident(("RssAnon",))
    del blocks
    spill.release()
    assert before - resident(("RssAnon",)) > 2**25
    assert len(table) == 8
    assert kept.sum() == 2**18


def test_large_tables_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of the best epoch comes back, and each cell's q is refined under it."""
    usual, large = small_sparse(), small_sparse()
    small_fit(usual, max_epochs=20)
    monkeypatch.setattr(loop, "MOST_KEPT", 64)
    small_fit(large, max_epochs=20)
    for name in ("loss", "validation_elbo"):
        np.testing.assert_allclose(
            usual.uns["scuvae"]["history"][name], large.uns["scuvae"]["history"][name], rtol=1e-6
        )
    np.testing.assert_allclose(large.obsm["X_scuvae"], usual.obsm["X_scuvae"], atol=0.05)


def test_a_view_of_a_dask_array_is_one() -> None:
    """Cells chosen of an AnnData that is not in memory: fitted, and as a reference."""
    da = pytest.importorskip("dask.array")
    plain, lazy = small_counts(n_obs=120), small_counts(n_obs=120)
    lazy.X = da.from_array(lazy.X, (50, 40))
    chosen = np.arange(120) % 3 > 0
    results = []
    for adata in (plain, lazy):
        part = tl.fit(adata[chosen], copy=True, likelihood="nb", **{**SMALL, "max_epochs": 1})
        assert part is not None
        new = small_counts(seed=1)
        tl.novelty(new, part, n_samples=2, n_reference=30)
        results.append((part.obsm["X_scuvae"], new.obs["scuvae_novelty"].to_numpy()))
    for held, read in zip(*results, strict=True):
        np.testing.assert_allclose(read, held, atol=1e-3)
