"""The catalogue: arguments. Whatever is handed in, what is wrong is said in the package's words."""

import logging
import os
import stat
from collections.abc import Callable
from decimal import Decimal
from inspect import signature
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from catalogue import FIT, Row, refused, rows
from helpers import VERBS, WITH_GROUPS, WITH_REFERENCE, small_counts, small_fit, unchanged

from scuvae import datasets, io, pl, pp, tl


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


# --- numbers that are none ----------------------------------------------------------------------

NUMBERS: dict[str, Any] = {
    "beyond all floats": 10**400,
    "a duration": np.timedelta64(3, "s"),
    "missing": pd.NA,
    "complex": 1 + 0j,
    "a decimal": Decimal("0.5"),
    "an array of one": np.array([0.5]),
    "masked": np.ma.masked,
}
TAKES_NUMBERS: dict[str, Callable[[AnnData, Any], object]] = {
    **{
        name: lambda adata, value, name=name: tl.fit(adata, **{**FIT, name: value})
        for name in ("learning_rate", "kl_weight", "dropout", "n_latent", "checkpoint_every")
    },
    "library_size": lambda adata, value: tl.denoise(adata, library_size=value),
    "threshold": lambda adata, value: tl.rank_genes(adata, "cell_type", threshold=value),
    "fraction": lambda adata, value: pp.thin_counts(adata, fraction=value),
    "rng": lambda adata, value: seeded(adata, value),
    "fdr": lambda adata, value: pl.volcano(adata, fdr=value),
    "max_points": lambda adata, value: pl.observed_vs_predicted(adata, max_points=value),
    "n_obs": lambda adata, value: datasets.linear_factor(n_obs=value),
    "depth": lambda adata, value: datasets.two_conditions(depth=value),
}


def seeded(adata: AnnData, value: Any) -> None:
    """A seed may be as large as it likes; not as small."""
    if isinstance(value, int):
        pp.thin_counts(adata, rng=value, copy=True)
        value = -value
    tl.score(adata, rng=value)


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("argument", TAKES_NUMBERS)
def test_what_is_no_number(argument: str, what: str, fitted: AnnData) -> None:
    with unchanged(fitted), pytest.raises((TypeError, ValueError)) as caught:
        TAKES_NUMBERS[argument](fitted, NUMBERS[what])
    assert type(caught.value) in (TypeError, ValueError)
    assert str(caught.value).startswith(f"{argument}=")


# --- switches, paths and axes -------------------------------------------------------------------

NO_SWITCHES: list[Any] = [1, "yes", [], pd.NA, np.array([True]), pd.Series([True])]


@pytest.mark.parametrize("value", NO_SWITCHES, ids=[type(v).__name__ for v in NO_SWITCHES])
@pytest.mark.parametrize("verb", [*VERBS, "neighbors", "thin_counts", "loss"])
def test_a_switch_is_on_or_off(verb: str, value: Any, fitted: AnnData) -> None:
    """Every argument that is annotated as one; None only where that is allowed."""
    function = next(getattr(part, verb) for part in (tl, pp, pl) if hasattr(part, verb))
    first = (fitted, fitted) if verb in WITH_REFERENCE else (fitted,)
    first += ("cell_type",) if verb in WITH_GROUPS else ()
    found = signature(function).parameters
    names = [n for n, p in found.items() if p.annotation in (bool, bool | None)]
    assert names
    for name in names:
        with unchanged(fitted), pytest.raises(TypeError) as caught:
            function(*first, **{name: value})
        assert f"{name}={value!r} is a" in str(caught.value)
        assert "pass True or False" in str(caught.value)


NO_PATHS: dict[str, tuple[Any, type[Exception]]] = {
    "a list": (["m"], TypeError),
    "bytes": (b"m", TypeError),
    "a number": (3, TypeError),
    "missing": (pd.NA, TypeError),
    "nothing": ("", ValueError),
    "a NUL": ("a\0b", ValueError),
}


@pytest.mark.parametrize("what", NO_PATHS)
def test_what_is_no_path(what: str, fitted: AnnData) -> None:
    value, kind = NO_PATHS[what]
    calls: list[tuple[str, Callable[[], object]]] = [
        ("path", lambda: io.write_model(value, fitted)),
        ("path", lambda: io.read_model(value)),
        ("save", lambda: pl.loss(fitted, save=value)),
    ]
    if isinstance(value, str):
        calls.append(("reference", lambda: tl.project(small_counts(), value)))
    for name, call in calls:
        with unchanged(fitted), pytest.raises(kind) as caught:
            call()
        assert str(caught.value).startswith(f"{name}={value!r} is")
        assert "pass" in str(caught.value)


def test_what_is_no_file_of_a_fit(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.h5ad").write_text("no HDF5")
    for name in ("folder", "text.h5ad"):
        for call in (
            lambda name=name: tl.project(small_counts(), tmp_path / name),
            lambda name=name: tl.fit(small_counts(), reference=tmp_path / name),
        ):
            with pytest.raises(ValueError, match=r"reference=.* cannot be read as an AnnData"):
                call()
    with pytest.raises(IsADirectoryError, match=r"folder' is a folder: name a file"):
        io.read_model(tmp_path / "folder")


NO_AXES: list[Any] = [[], "axes", 3, pd.NA, [None], plt.Figure()]


@pytest.mark.parametrize("ax", NO_AXES, ids=[type(ax).__name__ for ax in NO_AXES])
def test_what_are_no_axes(ax: Any, fitted: AnnData) -> None:
    for draw in (pl.loss, pl.latent_dimensions, pl.volcano):
        with pytest.raises(TypeError, match=r"ax=.* not axes of matplotlib: pass"):
            draw(fitted, ax=ax)


def test_a_picture_that_fails_leaves_no_figure(tmp_path: Path, fitted: AnnData) -> None:
    before = plt.get_fignums()
    for options in ({"save": tmp_path / "a.docx"}, {"save": tmp_path / "gone" / "a.png"}):
        with pytest.raises(ValueError, match=r"no kind of picture|no such folder"):
            pl.loss(fitted, **options)
    adata = fitted.copy()
    adata.obsm["X_scuvae"] = adata.obsm["X_scuvae"] * np.inf
    with pytest.raises(ValueError, match="no cell has both a place in the embedding"):
        pl.embedding_scores(adata, basis="X_scuvae", color="scale", show=False)
    assert plt.get_fignums() == before


@pytest.mark.parametrize(("value", "says"), [(5, "is a int"), (b"ab", "is a bytes"), ([], "empty")])
def test_no_numbers_of_latent_dimensions(value: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"n_latents.*{says}"):
        tl.compare_n_latent(small_counts(), n_latents=value)


def test_points_that_are_no_numbers_and_names_without_order(fitted: AnnData) -> None:
    for z in (pd.Series(["a"]), pd.Index(["a"]), [["a", "b", "c"]]):
        with pytest.raises(TypeError, match="of what are no numbers: pass the points"):
            tl.decode(fitted, z, batch="b0")
    with pytest.raises(TypeError, match="has no order: pass a list"):
        pp.thin_counts(small_counts(), layers_added={"a", "b"})


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
