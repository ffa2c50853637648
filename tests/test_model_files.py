"""Model files: what comes back, what others read of them, and what is refused."""

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from fuzz_model_files import most_memory, mutate_and_read, written
from helpers import (
    LIKELIHOOD_NAMES,
    SCHEMES,
    assert_same_posterior,
    fingerprint,
    small_counts,
    small_data,
    small_fit,
)

from scuvae import cli, get, io, tl
from scuvae.io.integrity import manifest

load_file = pytest.importorskip("safetensors.numpy").load_file


@cache
def fitted(likelihood: str = "negative_binomial", amortized: bool | str = "semi") -> AnnData:
    adata = small_data(likelihood)
    return small_fit(adata, likelihood=likelihood, amortized=amortized, batch_key="batch")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    io.write_model(tmp_path / "model.scuvae", fitted())
    return tmp_path / "model.scuvae"


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("amortized", SCHEMES)
@pytest.mark.parametrize("likelihood", LIKELIHOOD_NAMES)
def test_projections_onto_a_file_are_those_onto_the_fit(
    likelihood: str, amortized: bool | str, tmp_path: Path
) -> None:
    adata, path = fitted(likelihood, amortized), tmp_path / "model.scuvae"
    io.write_model(path, adata)
    expected, *found = (small_data(likelihood, seed=3)[:9].copy() for _ in range(4))
    tl.project(expected, adata)
    for new, reference in zip(found, (path, str(path), io.read_model(path)), strict=True):
        tl.project(new, reference)
        assert fingerprint(new.obsm) == fingerprint(expected.obsm)
        assert fingerprint(new.uns["scuvae"]) == fingerprint(expected.uns["scuvae"])


def test_a_reference_without_cells(path: Path) -> None:
    reference = io.read_model(path)
    assert reference.shape == (0, fitted().n_vars)
    assert list(reference.var_names) == list(fitted().var_names)
    for name, tensor in get.model(fitted()).state_dict().items():
        assert torch.equal(get.model(reference).state_dict()[name], tensor)
    assert get.history(reference).equals(get.history(fitted()))
    for verb in (tl.novelty, tl.transfer_labels):
        for model in (reference, path):
            with pytest.raises(ValueError, match="reference is a model without cells"):
                verb(small_counts(seed=3), model)


def test_under_a_name(tmp_path: Path) -> None:
    adata, path = small_fit(small_counts(), key_added="k"), tmp_path / "model.scuvae"
    with pytest.raises(ValueError, match="holds no fit"):
        io.write_model(path, adata)
    io.write_model(path, adata, key="k")
    one, two, three = (small_counts(seed=3) for _ in range(3))
    tl.project(one, adata, key="k")
    tl.project(two, path)
    tl.project(three, path, key="k")
    assert_same_posterior(one, two)
    assert_same_posterior(one, three)


def test_the_same_fit_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.scuvae"
    io.write_model(again, small_fit(small_counts(), amortized="semi", batch_key="batch"))
    assert again.read_bytes() == path.read_bytes()
    # Also by way of other files: the model of a projection is the reference's.
    new = small_counts(seed=3)
    tl.project(new, path, genes=new.var_names[3:])
    io.write_model(again, new)
    assert again.read_bytes() == path.read_bytes()
    io.write_model(again, io.read_model(path))
    assert again.read_bytes() == path.read_bytes()


def test_other_readers_of_the_format(path: Path, tmp_path: Path) -> None:
    arrays = load_file(path)
    state = fitted().uns["scuvae"]["state"]
    for part, values in state.items():
        for name, value in values.items():
            np.testing.assert_array_equal(arrays[f"state/{part}/{name}"], value)
            assert arrays[f"state/{part}/{name}"].dtype == value.dtype
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    text = json.loads(header["__metadata__"]["scuvae"])
    assert text["manifest"]["format"] == manifest.FORMAT
    assert text["settings"]["var_names"] == list(fitted().var_names)
    # And what another writer makes of the same.
    from safetensors.numpy import save_file

    save_file(arrays, tmp_path / "theirs.scuvae", metadata=header["__metadata__"])
    theirs = io.read_model(tmp_path / "theirs.scuvae")
    assert fingerprint(theirs.uns) == fingerprint(io.read_model(path).uns)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit, model, out = (str(tmp_path / name) for name in ("fit.h5ad", "m.scuvae", "out.h5ad"))
    adata = small_fit(small_counts(), key_added="k")
    adata.write_h5ad(fit)
    small_counts(seed=3).write_h5ad(tmp_path / "new.h5ad")
    assert cli.main(["model", "write", fit, model, "--key", "k"]) == 0
    assert cli.main(["model", "show", model]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for word in ("negative_binomial", "version", "gene0", f"{adata.n_vars}"):
        assert word in shown.out
    new = str(tmp_path / "new.h5ad")
    for key in ([], ["--key", "k"]):
        assert cli.main(["project", new, "--reference", model, "-o", out, *key]) == 0
    found, expected = tl_read(out), small_counts(seed=3)
    tl.project(expected, adata, key="k")
    assert_same_posterior(found, expected)
    before = Path(model).read_bytes()
    assert cli.main(["model", "write", new, model]) == 1
    assert "holds no fit" in capsys.readouterr().err
    assert Path(model).read_bytes() == before


def tl_read(path: str) -> AnnData:
    import anndata

    return anndata.read_h5ad(path)


# --- what is refused ----------------------------------------------------------------------------


class Canary:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch old", "hdf5", "text", "empty", "short"])
def test_other_files(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.scuvae"
    match how:
        case "pickle":
            path.write_bytes(pickle.dumps(Canary()))
        case "torch":
            torch.save({"a": Canary()}, path)
        case "torch old":
            torch.save({"a": Canary()}, path, _use_new_zipfile_serialization=False)
        case "hdf5":
            small_counts().write_h5ad(path)
        case "text":
            path.write_text("{}" * 100)
        case "empty":
            path.write_bytes(b"")
        case "short":
            path.write_bytes(b"\x10\0\0")
    says = {"pickle": "a pickle", "torch": "a zip", "torch old": "a pickle", "hdf5": "HDF5"}
    with pytest.raises(ValueError, match=says.get(how, "no model file")):
        io.read_model(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX's")
def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.scuvae")
    with pytest.raises(ValueError, match="no regular file"):
        io.read_model(tmp_path / "model.scuvae")
    with pytest.raises(ValueError, match="is a FIFO"):
        io.write_model(tmp_path / "model.scuvae", fitted())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        io.read_model(tmp_path / "none.scuvae")


def rebuilt(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Its header and text changed; the text's own digests made to fit where it still can be."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.loads(header["__metadata__"]["scuvae"])
    change(header, text)
    if "__metadata__" in header:
        header["__metadata__"]["scuvae"] = manifest.to_json(text)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def resealed(text: dict[str, Any]) -> None:
    """Digests of the settings as they now are, as who forges a file would make them."""
    settings = text["settings"]
    digests = {p: manifest.digest(manifest.to_json(v).encode()) for p, v in settings.items()}
    rest = {**text["manifest"], "settings": digests}
    rest.pop("sha256")
    text["manifest"] = {**rest, "sha256": manifest.digest(manifest.to_json(rest).encode())}


NAME = "state/decoder/layers.0.weight"


def renamed(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, text: header.update({name: header.pop(NAME)})


def entry(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, text: header[NAME].update(changes)


def setting(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], text: dict[str, Any]) -> None:
        text["settings"][path] = value
        resealed(text)

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "parent path": (renamed("state/../../x"), "no name of a model"),
    "absolute path": (renamed("/etc/passwd"), "no name of a model"),
    "Windows path": (renamed("C:\\x"), "no name of a model"),
    "NUL": (renamed("state/decoder/a\0b"), "no name of a model"),
    "other name": (renamed("state/decoder/other"), "layers.0.weight"),
    "terabytes": (entry(shape=[2**40], data_offsets=[0, 2**42]), "damaged"),
    "beyond the file": (entry(data_offsets=[10**9, 10**9 + 96]), "damaged"),
    "negative": (entry(data_offsets=[-96, 0]), "damaged"),
    "negative shape": (entry(shape=[-8, -3]), "damaged"),
    "huge product": (entry(shape=[2**62, 2**62]), "damaged"),
    "overlap": (lambda h, t: h[NAME].update(h["state/decoder/layers.0.bias"]), "damaged"),
    "objects": (entry(dtype="O"), "damaged"),
    "no dtype": (entry(dtype=["F32"]), "damaged"),
    "half": (entry(dtype="F16"), "damaged"),
    "wide": (entry(shape=[1] * 40 + [8, 3]), "damaged"),
    "a link": (entry(link="/etc/passwd"), "damaged"),
    "other metadata": (lambda h, t: h["__metadata__"].update(more="x"), "no manifest"),
    "no metadata": (lambda h, t: h.pop("__metadata__"), "no manifest"),
    "other parts": (lambda h, t: t.update(more=1), "other parts"),
    "no settings": (lambda h, t: t.update(settings=[]), "settings"),
    "settings of another kind": (setting("params/n_latent", {"a": 1}), "settings"),
    "a class by name": (setting("params/likelihood", "os.system"), "'os.system'.*not registered"),
    "wide network": (setting("params/n_hidden", 10**12), "n_hidden"),
    "deep network": (setting("params/n_layers", 10**12), "n_layers"),
    "many dimensions": (setting("params/n_latent", 10**12), "n_latent"),
    "fewer dimensions": (setting("params/n_latent", 2), "shape"),
    "no genes": (setting("var_names", []), "var_names"),
    "more genes": (setting("var_names", [f"g{i}" for i in range(41)]), "shape"),
    "newer": (lambda h, t: t["manifest"].update(format=9, version="99.0"), "format 9.*99.0"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files(name: str, path: Path) -> None:
    change, says = FORGED[name]
    rebuilt(path, change)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=says) as error:
            io.read_model(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 20 * size + 2**20  # the JSON's objects, and no more


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":1e999}', "beyond a float64"),
        (b'{"a":' + b"[" * 5000, "nested too deeply"),
        (b'{"a":' + b"[" * 2_000_000, "too many branches"),
        (b"{\xff}", "no UTF-8"),
        (b"[]", "no model file"),
        (b"{}", "no manifest"),
        (b'"x"', "no model file"),
        (b'{"a":' + b"1" * 10_000 + b"}", "damaged"),
    ],
)
def test_headers_that_are_no_json_of_ours(header: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.scuvae"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=says):
        io.read_model(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 101 * 2**20, 0, 1])
def test_lengths_that_no_header_has(length: int, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="no model file"):
        io.read_model(path)


def test_bytes_too_many_or_too_few(path: Path) -> None:
    data = path.read_bytes()
    for changed in (data + b"\0", data[:-1], data[:-1000]):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"its arrays take|cut off"):
            io.read_model(path)


def test_mutated_files(tmp_path: Path) -> None:
    """``tests/fuzz_model_files.py`` does it 100,000 times."""
    counts = mutate_and_read(tmp_path, 500, seed=0)
    assert counts["silently different"] == counts["crashed"] == 0
    assert counts["refused"] > 450


def test_files_are_read_within_twice_their_size(tmp_path: Path) -> None:
    assert most_memory(tmp_path, 3, seed=0, n_vars=2000) < 2
    path = tmp_path / "large.scuvae"
    data = written(path, n_vars=2000, n_hidden=128)
    path.write_bytes(struct.pack("<Q", len(data) - 8) + data[8:])  # all of it a header
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="no UTF-8"):
            io.read_model(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
    finally:
        tracemalloc.stop()
