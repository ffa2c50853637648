"""Fits that are ended at any moment and go on: the same to the byte, and no checkpoint is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anndata import AnnData
from fuzz_checkpoints import outcomes
from helpers import fingerprint, small_counts, small_data, small_fit, unchanged
from torch import Tensor

from scuvae import tl
from scuvae.inference.training import checkpoint as checkpoints
from scuvae.inference.training import loop
from scuvae.inference.training.checkpoint import Checkpoint

OPTIONS: dict[str, Any] = {"max_epochs": 4, "checkpoint_every": 0}
N_STEPS = 4 * 2  # 54 training cells in batches of 32


class Killed(BaseException):
    """The process is gone, as far as a fit can tell."""


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    """Instead of the so-manieth call of a function the process ends."""
    original, calls = getattr(where, name), 0

    def inside(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(where, name, inside)


@pytest.mark.parametrize("amortized", [False, True, "semi"])
def test_a_fit_that_was_killed_goes_on(
    amortized: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step, within a judgement, at the very end: all slots to the byte."""
    data = small_data("negative_binomial")
    expected = small_fit(data.copy(), amortized=amortized, **OPTIONS)
    adata = data.copy()
    named = {"amortized": amortized, "checkpoint": tmp_path / "kept", **OPTIONS}
    for where, name, call in (
        (loop.Losses, "add", 3),
        (loop.EarlyStopping, "update", 2),
        (loop.Step, "__call__", 1),
        (tl._trained.training, "finish", 1),
    ):
        with monkeypatch.context() as patch:
            killed_at(call, patch, where, name)
            with unchanged(adata), pytest.raises(Killed):
                small_fit(adata, **named)
    small_fit(adata, **named)
    assert fingerprint(adata) == fingerprint(expected)
    # And once more, from the end of training.
    again = small_fit(data.copy(), **named)
    assert fingerprint(again) == fingerprint(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the interval; the handlers are those of before afterwards."""
    adata = small_counts()
    expected = small_fit(adata.copy(), **OPTIONS)
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    folder = tmp_path / "kept"
    named = {**OPTIONS, "checkpoint": folder, "checkpoint_every": 1000}
    original, calls = loop.Losses.add, 0

    def raises(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 3:
            signal.raise_signal(number)

    error = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with monkeypatch.context() as patch:
        patch.setattr(loop.Losses, "add", raises)
        with unchanged(adata), pytest.raises(error) as caught:
            small_fit(adata, **named)
    if error is SystemExit:
        assert caught.value.code == 128 + number
    assert calls == 3
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers
    state = Checkpoint(folder, every=0, fit=_kept(folder)["fit"]).read()
    assert (state["epoch"], state["batch"]) == (1, 1)
    small_fit(adata, **named)
    assert fingerprint(adata) == fingerprint(expected)


def _kept(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())["content"]
    return content


# --- whose it is --------------------------------------------------------------------------------


def _other_values(adata: AnnData) -> None:
    adata.X[7, 3] += 1


def _other_genes(adata: AnnData) -> None:
    adata.var_names = [f"other{name}" for name in adata.var_names]


def _other_cells(adata: AnnData) -> None:
    adata.obs_names = adata.obs_names[::-1].to_list()


def _other_batches(adata: AnnData) -> None:
    adata.obs["batch"] = adata.obs["batch"].to_numpy()[::-1]


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (
            None,
            {"kl_weight": 0.5, "n_hidden": 9},
            ["kl_weight: 1.0 there, 0.5 here", "n_hidden: 8"],
        ),
        (
            None,
            {"amortized": True},
            [
                "amortized: False there, True here",
                "learning_rate",
                "encoder_input: None there",
                "covariance",
            ],
        ),
        (
            None,
            {"batch_key": None},
            ["batch_key: 'batch' there, None here", "batches", "covariates: "],
        ),
        (_other_values, {}, ["values: "]),
        (_other_genes, {}, ["genes: "]),
        (_other_cells, {}, ["cells: "]),
        (_other_batches, {}, ["covariates: "]),
    ],
)
def test_another_fit_is_told_from_it(
    change: Callable[[AnnData], None] | None,
    options: dict[str, Any],
    named: list[str],
    tmp_path: Path,
) -> None:
    adata = small_counts()
    kept = {"batch_key": "batch", "checkpoint": tmp_path, "max_epochs": 1}
    small_fit(adata.copy(), **kept)
    if change is not None:
        change(adata)
    with unchanged(adata), pytest.raises(ValueError, match="holds another fit") as caught:
        small_fit(adata, **kept | options)
    for part in [*named, str(tmp_path), "another folder"]:
        assert part in str(caught.value)
    if change is not None:  # and nothing else
        assert str(caught.value).count(" there, ") == len(named)


def test_a_folder_has_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: pass a folder"):
        small_fit(small_counts(), checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="checkpoint_every=-1"):
        small_fit(small_counts(), checkpoint=tmp_path, checkpoint_every=-1)


# --- the files ----------------------------------------------------------------------------------


def state_of(number: float) -> dict[str, Any]:
    shared = torch.full((3,), number)
    return {
        "model": {"a": shared, "b": shared[:2], "whole": torch.tensor([1, 2])},
        "posterior": {},
        "sizes": [1, 2, 3],
        "nested": {"": {"x": torch.zeros(0), "flag": True}, "none left": {}},
    }


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kept"
    fit = {"n": 3, "batches": torch.tensor([1, 2]).numpy(), "none": None}
    assert Checkpoint(folder, every=0, fit=fit).read() is None
    for number in (1.0, 2.0):
        Checkpoint(folder, every=0, fit=fit).write(state_of(number))
    found = Checkpoint(folder, every=0, fit=fit).read()

    def same(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                same(a[key], b[key])
        elif isinstance(a, Tensor):
            assert a.dtype is b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b

    same(found, state_of(2.0))
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        _kept(folder)["parts"][0]["tensors"],
    ]


def test_what_a_killed_write_leaves_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors writes under a name of its own first, beside the one that it was given."""
    kept = Checkpoint(tmp_path, every=0, fit={})
    kept.write(state_of(1.0))

    def killed(tensors: Any, path: Path) -> None:
        path.with_name(".tmpAbCdEf").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("scuvae.inference.training.checkpoint.save_file", killed)
        with pytest.raises(Killed):
            kept.write(state_of(2.0))
    kept.write(state_of(3.0))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.json", _kept(tmp_path)["parts"][0]["tensors"]}


@pytest.mark.parametrize("name", ["checkpoint.json", "tensors"])
@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_damage_is_noticed(name: str, how: str, tmp_path: Path) -> None:
    Checkpoint(tmp_path, every=0, fit={}).write(state_of(1.0))
    path = tmp_path / (name if name != "tensors" else _kept(tmp_path)["parts"][0]["tensors"])
    data = bytearray(path.read_bytes())
    if how == "changed":
        data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "changed" else data[: len(data) // 2])
    if how == "gone":
        path.unlink()
    keeper = Checkpoint(tmp_path, every=0, fit={})
    if (name, how) == ("checkpoint.json", "gone"):
        assert keeper.read() is None
        return
    with pytest.raises(ValueError, match=r"is damaged.*delete the folder"):
        keeper.read()


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    keeper = Checkpoint(tmp_path, every=0, fit={})
    keeper.write(state_of(1.0))
    keeper.write(state_of(float("nan")))
    assert torch.equal(keeper.read()["model"]["a"], torch.ones(3))


@pytest.mark.parametrize("where", [(os, "fsync"), (os, "replace"), (checkpoints, "save_file")])
def test_a_write_that_is_ended_loses_nothing(
    where: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call that reaches the disk: what is there is the old state, or the new one."""
    Checkpoint(tmp_path, every=0, fit={}).write(state_of(0.0))
    last = 0.0
    for number in range(1, 6):
        keeper = Checkpoint(tmp_path, every=0, fit={})
        assert keeper.read() is not None
        with monkeypatch.context() as patch:
            killed_at(number, patch, *where)
            try:
                keeper.write(state_of(float(number)))
            except Killed:
                pass
            else:
                last = float(number)
        found = float(Checkpoint(tmp_path, every=0, fit={}).read()["model"]["a"][0])
        assert found in (last, float(number))
        last = found
    assert last > 0


# --- real deaths --------------------------------------------------------------------------------

# Forks before anything has been computed, so that a library is imported once.
SCRIPT = """
import os, random, signal, sys
import numpy as np
import torch
from anndata import AnnData
from scuvae import tl
from scuvae.inference.training import checkpoint, loop

torch.set_num_threads(1)
folder = sys.argv[1]
x = np.random.default_rng(0).poisson(2.0, (40, 15)).astype(np.float32)

def fit(kept, at):
    steps = 0
    def dies(*args):
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
    if at is not None and at % 2:  # in a step, or in what a checkpoint writes
        original = loop.Losses.add
        loop.Losses.add = lambda *args: (dies(), original(*args))[1]
    elif at is not None:
        sync = os.fsync
        os.fsync = lambda number: (dies(), sync(number))[1]
    adata = AnnData(x.copy())
    options = {"n_latent": 2, "n_hidden": 8, "max_epochs": 3, "batch_size": 12}
    tl.fit(adata, checkpoint=kept, checkpoint_every=0, **options)
    return adata

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def save(name, kept):
    adata = fit(kept, None)
    arrays = {key: np.asarray(value) for key, value in adata.obsm.items()}
    arrays["history"] = adata.uns["scuvae"]["history"].to_numpy()
    np.savez(f"{folder}/{name}.npz", **arrays)

assert child(lambda: save("whole", None)) == 0
for at in (3, 2, 4, 1, 5, 10):
    assert child(lambda: fit(f"{folder}/kept", at)) == -signal.SIGKILL, at
assert child(lambda: save("parts", f"{folder}/kept")) == 0
whole, parts = (np.load(f"{folder}/{name}.npz") for name in ("whole", "parts"))
assert set(whole) == set(parts)
for key in whole:
    assert whole[key].tobytes() == parts[key].tobytes(), key
"""


def test_processes_that_are_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_damaged_checkpoint_is_refused_or_read_as_it_was() -> None:
    """Files that are changed, gone, empty, folders, links to nothing or another checkpoint's."""
    counts = outcomes(30, seed=5)
    assert set(counts) == {"as undamaged", "refused"}, counts
