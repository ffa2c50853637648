"""A fit in ``uns``, or a file of one, that is not what was written is an error, never a result."""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import fingerprint, small_counts, small_fit, unchanged

import scuvae
from scuvae import get, pp, tl
from scuvae.io.integrity import manifest

Entry = dict[str, Any]


@cache
def fitted() -> AnnData:
    return small_fit(small_counts(), amortized="semi", batch_key="batch")


def array(entry: Entry, path: str) -> np.ndarray:
    found = entry
    for name in path.split("/"):
        found = found[name]
    return found  # type: ignore[return-value]


def set_at(path: str, value: Any) -> Callable[[Entry], None]:
    *branches, name = path.split("/")

    def change(entry: Entry) -> None:
        place = entry
        for branch in branches:
            place = place[branch]
        if value is None:
            del place[name]
        else:
            place[name] = value(place[name]) if callable(value) else value

    return change


def one_off(a: np.ndarray) -> np.ndarray:
    changed = a.copy()
    changed.flat[-1] = (
        np.nextafter(changed.flat[-1], a.dtype.type(np.inf)) if a.dtype.kind == "f" else 5
    )
    return changed


def with_nan(a: np.ndarray) -> np.ndarray:
    changed = a.copy()
    changed.flat[0] = np.nan
    return changed


FIRST, RATE = "state/decoder/layers.0.weight", "state/likelihood/log_theta"
TAMPERED: dict[str, tuple[Callable[[Entry], None], str]] = {
    "one unit in the last place": (set_at(FIRST, one_off), "layers.0.weight"),
    "another bias": (set_at("state/decoder/layers.1.bias", lambda a: a[::-1]), r"layers.1.bias"),
    "another encoder": (set_at("state/encoder/mean.weight", one_off), r"encoder/mean.weight"),
    "NaN": (set_at(FIRST, with_nan), "layers.0.weight"),
    "transposed": (set_at(FIRST, lambda a: a.T), "layers.0.weight"),
    "double precision": (set_at(FIRST, lambda a: a.astype(float)), "dtype is float64"),
    "half precision": (set_at(FIRST, lambda a: a.astype(np.float16)), "dtype is float16"),
    "fewer dispersions": (set_at(RATE, lambda a: a[:-1]), "log_theta"),
    "permuted dispersions": (set_at(RATE, lambda a: a[::-1]), "log_theta"),
    "array lost": (set_at(RATE, None), "log_theta"),
    "likelihood lost": (set_at("state/likelihood", None), "likelihood"),
    "decoder lost": (set_at("state/decoder", None), "decoder"),
    "state lost": (set_at("state", None), "state"),
    "array added": (set_at("state/decoder/extra.weight", np.ones(3)), "extra.weight"),
    "genes permuted": (set_at("var_names", lambda a: a[::-1]), "var_names"),
    "a gene renamed": (set_at("var_names", lambda a: np.array(["x", *a[1:]], object)), "var_names"),
    "a gene twice": (set_at("var_names", lambda a: np.array([a[1], *a[1:]], object)), "var_names"),
    "genes lost": (set_at("var_names", None), "var_names"),
    "genes are numbers": (set_at("var_names", lambda a: np.arange(len(a))), "var_names"),
    "batches permuted": (set_at("params/batches", lambda a: a[::-1]), "batches"),
    "batch key lost": (set_at("params/batch_key", None), "batch_key"),
    "another likelihood": (set_at("params/likelihood", "poisson"), "likelihood.*'poisson'"),
    "unknown likelihood": (set_at("params/likelihood", "beta"), "'beta'.*not registered"),
    "unknown setting": (set_at("params/colour", "mixture"), "'colour', 'mixture', is not known"),
    "setting lost": (set_at("params/dropout", None), "dropout"),
    "another KL weight": (set_at("params/kl_weight", 2.0), "kl_weight"),
    "no KL weight": (set_at("params/kl_weight", np.nan), "kl_weight"),
    "another covariance": (set_at("params/covariance", "diagonal"), "covariance"),
    "unknown covariance": (set_at("params/covariance", "banded"), "banded"),
    "another local step": (set_at("params/local_step", "gradient"), "local_step"),
    "fewer dimensions": (set_at("params/n_latent", 2), "n_latent"),
    "no dimensions": (set_at("params/n_latent", 0), "n_latent"),
    "a width of 10⁹": (set_at("params/n_hidden", 10**9), "n_hidden"),
    "a billion layers": (set_at("params/n_layers", 10**9), "n_layers"),
    "a width in words": (set_at("params/n_hidden", "8"), "n_hidden"),
    "another encoder input": (set_at("params/encoder_input", "log1p"), "encoder_input"),
    "another layer": (set_at("params/layer", "counts"), "layer"),
    "values unchecked": (set_at("params/check_values", False), "check_values"),
    "no linear path": (set_at("params/linear_path", False), "linear_path"),
    "another version": (set_at("params/version", "99.0"), "version.*99.0"),
    "history changed": (
        set_at("history", lambda t: t.assign(loss=t["loss"] + 1)),
        "history/loss",
    ),
    "history cut": (set_at("history", lambda t: t.iloc[:1]), "history"),
    "epochs renumbered": (
        set_at("history", lambda t: t.set_axis(pd.RangeIndex(1, len(t) + 1, name="epoch"))),
        "history.*rows",
    ),
    "history is a list": (set_at("history", lambda t: list(t["loss"])), "history"),
    "another map": (set_at("embed/components", one_off), "components"),
    "another total": (set_at("embed/total", 1.0), "embed/total"),
    "map half lost": (set_at("embed/centre", None), "centre"),
    "a table added": (set_at("more", pd.DataFrame({"a": [1]})), "more"),
    "manifest lost": (set_at("manifest", None), "lost its manifest"),
    "manifest cut": (set_at("manifest", lambda text: text[:-10]), "manifest"),
    "manifest nested": (set_at("manifest", "[" * 100_000), "nested too deeply"),
    "manifest with a key twice": (set_at("manifest", '{"format":1,"format":2}'), "twice"),
    "manifest with NaN": (set_at("manifest", '{"format":NaN}'), "NaN is no JSON"),
    "another digest": (set_at("manifest", lambda t: t.replace("a", "b", 1)), "manifest"),
    "format lost": (set_at("params/format", None), "format"),
}
every_change = pytest.mark.parametrize("name", TAMPERED)


def changed(name: str) -> AnnData:
    adata = fitted().copy()
    adata.uns["scuvae"] = copy.deepcopy(adata.uns["scuvae"])
    TAMPERED[name][0](adata.uns["scuvae"])
    return adata


READERS: dict[str, Callable[[AnnData], object]] = {
    "get.model": get.model,
    "get.history": get.history,
    "get.posterior": get.posterior,
    "tl.project": lambda adata: tl.project(small_counts(seed=3), adata),
    "tl.novelty": lambda adata: tl.novelty(small_counts(seed=3), adata),
    "tl.transfer_labels": lambda adata: tl.transfer_labels(small_counts(seed=3), adata),
    "tl.refine": tl.refine,
    "tl.score": tl.score,
    "tl.denoise": tl.denoise,
    "tl.sample": tl.sample,
    "tl.embed": tl.embed,
    "tl.calibration": tl.calibration,
    "tl.predictive_check": tl.predictive_check,
    "tl.amortization_gap": tl.amortization_gap,
    "tl.to_encoder": tl.to_encoder,
    "pp.neighbors": pp.neighbors,
    "io.write_model": lambda adata: scuvae.io.write_model("unwritten.scuvae", adata),
}


@every_change
def test_what_was_changed_is_named(name: str) -> None:
    adata = changed(name)
    with unchanged(adata), pytest.raises(ValueError, match=TAMPERED[name][1]) as error:
        get.model(adata)
    assert "adata.uns['scuvae']" in str(error.value)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_checks(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adata = changed("permuted dispersions")
    with unchanged(adata), pytest.raises(ValueError, match=r"log_theta.*digest mismatch"):
        READERS[reader](adata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slot", ["X_scuvae", "X_scuvae_scale", "X_scuvae_covariance"])
def test_posteriors_that_are_none(slot: str) -> None:
    for value, says in ((np.nan, "not finite"), (None, "shape")):
        adata = fitted().copy()
        if value is None:
            adata.obsm[slot] = adata.obsm[slot][:, :-1]
        else:
            adata.obsm[slot][3, 1] = value
        with pytest.raises(ValueError, match=rf"{slot}.*{says}"):
            get.posterior(adata)


def test_a_scale_is_positive() -> None:
    adata = fitted().copy()
    adata.obsm["X_scuvae_scale"][3, 1] = -1
    with pytest.raises(ValueError, match=r"X_scuvae_scale.*positive"):
        tl.score(adata)


@every_change
def test_fits_without_a_manifest_are_checked_for_what_they_are(name: str) -> None:
    """Of format 1 nobody can tell what was written, but what is no model is still an error."""
    adata = changed(name)
    entry = adata.uns["scuvae"]
    entry.pop("manifest", None)
    entry.get("params", {}).pop("format", None)
    others = {
        *("one unit in the last place", "another bias", "another encoder", "permuted dispersions"),
        *("genes permuted", "a gene renamed", "batches permuted", "another KL weight"),
        *("another local step", "another layer"),
        *("values unchecked", "another version", "history changed", "history cut", "another map"),
        *("history is a list", "a table added", "another total", "map half lost"),
        *("manifest lost", "manifest cut", "manifest nested", "manifest with a key twice"),
        *("manifest with NaN", "another digest", "format lost"),
    }
    if name in others:
        get.model(adata)
    else:
        with pytest.raises(
            ValueError, match=r"params|state|var_names|holds no fit|uns\['scuvae'\]"
        ):
            get.model(adata)


def test_a_fit_of_before_is_read_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    adata, old = fitted(), fitted().copy()
    old.uns["scuvae"] = copy.deepcopy(old.uns["scuvae"])
    del old.uns["scuvae"]["manifest"], old.uns["scuvae"]["params"]["format"]
    found, expected = small_counts(seed=3), small_counts(seed=3)
    with caplog.at_level(logging.INFO, "scuvae"):
        tl.project(found, old)
    assert "adata.uns['scuvae'] is of format 1 (scuvae " in caplog.text
    tl.project(expected, adata)
    assert fingerprint(found.obsm) == fingerprint(expected.obsm)
    # What is written on is of the present format.
    assert found.uns["scuvae"]["manifest"] == expected.uns["scuvae"]["manifest"]


def test_a_newer_format_is_refused_in_a_sentence() -> None:
    adata = fitted().copy()
    adata.uns["scuvae"] = copy.deepcopy(adata.uns["scuvae"])
    written = json.loads(adata.uns["scuvae"]["manifest"])
    written |= {"format": manifest.FORMAT + 1, "version": "99.0", "more": {}}
    adata.uns["scuvae"]["manifest"] = json.dumps(written)
    says = rf"format {manifest.FORMAT + 1}, written by scuvae 99.0.*update scuvae"
    with pytest.raises(ValueError, match=says):
        tl.score(adata)


def test_a_damaged_file(tmp_path: Path) -> None:
    """HDF5 has no checksums of its own by default."""
    path = tmp_path / "fit.h5ad"
    fitted().write_h5ad(path)
    with h5py.File(path) as file:
        place = file["uns/scuvae/state/decoder/layers.1.weight"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[place + 5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"layers.1.weight.*digest mismatch"):
        tl.project(small_counts(seed=3), path)


# --- what is no tampering -----------------------------------------------------------------------


def files_of(adata: AnnData, folder: Path) -> Iterator[AnnData]:
    for suffix in ("h5ad", "zarr"):
        path = folder / f"fit.{suffix}"
        getattr(adata, f"write_{suffix}")(path)
        yield getattr(anndata, f"read_{suffix}")(path)


def test_what_users_do_with_cells_is_no_damage(tmp_path: Path) -> None:
    adata = fitted()
    new = small_counts(seed=3)
    new.obs_names = [f"new{i}" for i in range(new.n_obs)]
    tl.project(new, adata)
    cases = {
        "copy": adata.copy(),
        "view": adata[3:20],
        "fewer cells": adata[3:20].copy(),
        "fewer genes": adata[:, 4:].copy(),
        "shuffled genes": adata[:, ::-1].copy(),
        "concat": anndata.concat([new, adata], uns_merge="first"),
        "same": anndata.concat([new, new.copy()], uns_merge="same", index_unique="-"),
        "memory": adata.to_memory(),
    }
    expected = fingerprint(get.model(adata).state_dict()["decoder.layers.0.weight"].numpy())
    for name, case in [*cases.items(), *(("file", back) for back in files_of(adata, tmp_path))]:
        found = get.model(case).state_dict()["decoder.layers.0.weight"].numpy()
        assert fingerprint(found) == expected, name
        tl.score(case.copy(), n_samples=2)


def test_zeros_below_zero_survive_a_store_that_leaves_zeros_out(tmp_path: Path) -> None:
    settings, arrays = manifest.flat({"a": np.array([-0.0, -0.0], np.float32), "b": 1})
    assert manifest.made(settings, arrays) == manifest.made(
        *manifest.flat({"a": np.zeros(2, np.float32), "b": np.int64(1)})
    )


def test_the_same_seed_writes_the_same() -> None:
    one, two = (small_fit(small_counts(), rng=4) for _ in range(2))
    assert fingerprint(one.uns) == fingerprint(two.uns)
