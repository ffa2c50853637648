"""The catalogue: arguments. Whatever is handed in, what is wrong is said in the package's words."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData
from catalogue import FIT, Row, refused, rows
from helpers import VERBS, WITH_GROUPS, WITH_REFERENCE, small_counts, small_fit, unchanged

from scuvae import pp, tl


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    return small_fit(small_counts(), amortized=True, batch_key="batch", max_epochs=1)


# --- sizes --------------------------------------------------------------------------------------

HUGE = {
    "n_latent": "GiB of memory at least",
    "n_hidden": "GiB of memory at least",
    "n_layers": "GiB of memory at least",
    "n_samples": "GiB of memory at least",
}
SIZES = {
    f"{name}={value}": Row(
        [f"{name}={value}", says if value < 2**62 else "of at most"], options={name: value}
    )
    for name, says in HUGE.items()
    for value in (10**9, 10**18, 2**63, 10**30)
}
SIZES |= {
    f"{name}={value}": Row([f"{name}={value}", "of at most"], options={name: value})
    for name in ("batch_size", "max_epochs")
    for value in (2**63, 10**30)
}
SIZES["n_layers beside n_hidden"] = Row(
    ["n_hidden=200000 with n_layers=2", "GiB", "Pass less"],
    options={"n_hidden": 200_000, "n_layers": 2},
)


@rows(SIZES)
def test_sizes_that_no_memory_holds(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scuvae.tl._fit.memory_of", lambda device: 64e9)
    refused(row, monkeypatch)


# --- numpy's scalars ----------------------------------------------------------------------------

SCALARS: dict[str, Any] = {
    "amortized": np.True_,
    "early_stopping": np.True_,
    "check_values": np.bool_(True),
    "likelihood": np.str_("poisson"),
    "prior": np.str_("standard_normal"),
    "optimizer": np.str_("adam"),
    "local_step": np.str_("natural"),
    "covariance": np.str_("full"),
    "layer": np.str_("counts"),
    "mask_var": np.str_("highly_variable"),
    "batch_key": np.str_("batch"),
    "categorical_covariate_keys": np.array(["cell_type"]),
    "continuous_covariate_keys": np.array(["expected"]),
    "size_factor_key": np.str_("expected"),
    "device": np.str_("cpu"),
    "key_added": np.str_("scuvae2"),
    "n_latent": np.int64(3),
    "n_hidden": np.uint16(8),
    "max_epochs": np.int8(1),
    "kl_weight": np.float32(1),
    "learning_rate": np.float16(0.01),
    "dropout": np.float64(0.1),
    "validation_fraction": np.float32(0.25),
    "rng": np.uint32(3),
}


@pytest.mark.parametrize("name", SCALARS)
def test_numpys_scalars_are_pythons(name: str, tmp_path: Path) -> None:
    """Elements of arrays and columns; and nothing of numpy's is left where files do not take it."""
    adata = small_counts()
    adata.layers["counts"] = adata.X.copy()
    tl.fit(adata, **{**FIT, name: SCALARS[name]})
    key = "scuvae2" if name == "key_added" else "scuvae"
    adata.write_h5ad(tmp_path / "fit.h5ad")
    back = ad.read_h5ad(tmp_path / "fit.h5ad")
    assert back.uns[key]["manifest"] == adata.uns[key]["manifest"]
    tl.score(back, key=key, n_samples=2)
    for value in adata.uns[key]["params"].values():
        assert type(value) in (str, bool, int, float, np.ndarray), value


# --- names of slots -----------------------------------------------------------------------------

NO_NAMES: list[Any] = ["", "a/b", ".", "..", "a\0", "\ud800", "x" * 300, 5, b"k", ["k"], ("k",)]
# Verb, argument, and what else it needs.
NAMING: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (tl.fit, "key_added", FIT),
    (tl.refine, "key_added", {}),
    (tl.to_encoder, "key_added", {}),
    (tl.denoise, "layer_added", {}),
    (tl.rank_genes, "key_added", {"groupby": "cell_type"}),
    (pp.neighbors, "key_added", {}),
    (pp.thin_counts, "layers_added", {}),
    (tl.project, "key_added", {}),
    (tl.novelty, "key_added", {}),
    (tl.transfer_labels, "key_added", {"labels": "batch"}),
]


@pytest.mark.parametrize("name", NO_NAMES, ids=[repr(n)[:12] for n in NO_NAMES])
@pytest.mark.parametrize(
    ("verb", "argument", "options"), NAMING, ids=[verb.__name__ for verb, *_ in NAMING]
)
def test_names_that_no_file_takes(
    verb: Callable[..., Any], argument: str, options: dict[str, Any], name: Any, fitted: AnnData
) -> None:
    adata = fitted.copy()
    first = (adata, fitted) if verb.__name__ in WITH_REFERENCE else (adata,)
    given = [name, "rest"] if argument == "layers_added" else name
    with unchanged(adata), pytest.raises((ValueError, TypeError)) as caught:
        verb(*first, **{**options, argument: given})
    assert type(caught.value) in (ValueError, TypeError)
    assert repr(name) in str(caught.value)
    assert "pass" in str(caught.value)


ODD_NAMES = ["a b", "ä", " ", "x" * 190, "a\nb", "_index", "a.b", "0"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[repr(n)[:12] for n in ODD_NAMES])
def test_names_that_files_take(name: str, tmp_path: Path) -> None:
    adata = small_fit(small_counts(), key_added=name, max_epochs=1)
    adata.write_h5ad(tmp_path / "fit.h5ad")
    # All names, and no arrays of the model: a store is a folder for each.
    names = AnnData(adata.X, obs=adata.obs, obsm=adata.obsm, uns={name: {"params": {"a": 1}}})
    names.write_zarr(tmp_path / "fit.zarr")
    for back in (ad.read_h5ad(tmp_path / "fit.h5ad"), ad.read_zarr(tmp_path / "fit.zarr")):
        np.testing.assert_array_equal(back.obsm[name], adata.obsm[name])


@pytest.mark.parametrize("entry", [{"params": {"a": 1}}, {}, [1], "text", 5])
def test_what_is_no_fit_is_not_overwritten(
    entry: Any, fitted: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(adata: AnnData) -> None:
        adata.uns["neighbors"] = entry

    says = ["adata.uns['neighbors'] holds something else than a fit", "another key_added="]
    refused(Row(says, theirs, {"key_added": "neighbors"}), monkeypatch)
    adata = fitted.copy()
    theirs(adata)
    for call in (
        lambda: tl.project(adata, fitted, key_added="neighbors"),
        lambda: tl.refine(adata, key_added="neighbors"),
        lambda: tl.to_encoder(adata, key_added="neighbors"),
    ):
        with unchanged(adata), pytest.raises(ValueError, match="something else than a fit"):
            call()


def test_a_fit_is_not_overwritten_by_what_is_none(fitted: AnnData) -> None:
    adata = fitted.copy()
    for call in (
        lambda: tl.rank_genes(adata, "cell_type", key_added="scuvae"),
        lambda: pp.neighbors(adata, key_added="scuvae"),
    ):
        with unchanged(adata), pytest.raises(ValueError, match="the name of a fit"):
            call()


# --- checkpoints --------------------------------------------------------------------------------

NO_FOLDERS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": (["folder"], TypeError, "is a list"),
    "a number": (5, TypeError, "is a int"),
    "bytes": (b"folder", TypeError, "is a bytes"),
    "nothing": ("", ValueError, "is no path"),
    "a NUL": ("a\0b", ValueError, "is no path"),
    "a file": (__file__, ValueError, "is a file: pass a folder"),
    "in a file": (__file__ + "/more", ValueError, "is a file: pass a folder"),
}


@pytest.mark.parametrize("what", NO_FOLDERS)
def test_no_place_for_checkpoints(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, kind, says = NO_FOLDERS[what]
    refused(
        Row(["checkpoint=", says, "pass"], options={"checkpoint": value}, kind=kind), monkeypatch
    )


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    row = Row(
        ["checkpoint=", "cannot be written to", "pass another folder"],
        options={"checkpoint": tmp_path / "new"},
        kind=PermissionError,
    )
    refused(row, monkeypatch)


def test_checkpoints_where_nothing_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc and /dev/full stand for a folder that takes no files, also from root."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    says = ["checkpoint='/proc/scuvae/new'", "/proc cannot be written to", "pass another folder"]
    row = Row(says, options={"checkpoint": "/proc/scuvae/new"}, kind=FileNotFoundError)
    refused(row, monkeypatch)


# --- where nothing can be added -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_view_of_a_backed_adata(mode: str, fitted: AnnData, tmp_path: Path) -> None:
    path = tmp_path / "in.h5ad"
    fitted.write_h5ad(path)
    before = path.read_bytes()
    backed = ad.read_h5ad(path, backed=mode)
    view = backed[:30]
    calls: dict[str, Callable[[], Any]] = {
        "neighbors": lambda: pp.neighbors(view),
        "thin_counts": lambda: pp.thin_counts(view),
    }
    for name in VERBS:
        first = (view, fitted) if name in WITH_REFERENCE else (view,)
        first += ("cell_type",) if name in WITH_GROUPS else ()
        calls[name] = lambda name=name, first=first: getattr(tl, name)(*first)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"view of a backed AnnData.*to_memory\(\)") as caught:
            call()
        assert "copy=True" in str(caught.value), name
    result = tl.fit(view, copy=True, **FIT)
    assert result is not None
    assert result.shape == (30, fitted.n_vars)
    assert view.is_view
    backed.file.close()
    assert path.read_bytes() == before


def test_raw_in_adatas_place(fitted: AnnData) -> None:
    adata = fitted.copy()
    adata.raw = adata.copy()
    for verb in (tl.fit, tl.score, tl.embed, pp.neighbors):
        with pytest.raises(TypeError, match=r"adata is an AnnData's raw.*raw\.to_adata\(\)"):
            verb(adata.raw)
    with pytest.raises(TypeError, match=r"reference is an AnnData's raw"):
        tl.project(small_counts(), adata.raw)


def test_the_choice_of_a_gaussian_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    adata = small_counts()
    adata.X = np.random.default_rng(0).normal(size=adata.shape)
    with caplog.at_level(logging.INFO, "scuvae"):
        tl.fit(adata, **FIT)
    assert "likelihood='auto': adata.X holds real values, using gaussian" in caplog.text
