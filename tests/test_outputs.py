"""Outputs: the old file or the new one, whatever happens; nothing is left, nothing is lost."""

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import small_counts, small_fit
from kill_writers import killed, kinds

from scuvae import _replacing, cli, io, tl
from scuvae._replacing import checked_target, replacing, sweep, temporary

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX's")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@posix
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_it_writes(kind: str, signum: int, tmp_path: Path) -> None:
    """``tests/kill_writers.py`` does it a thousand times."""
    counts = killed(kind, tmp_path, 4, signum, seed=1)
    assert counts["lost"] == counts["litter after the next run"] == 0
    assert sum(counts[name] for name in ("old", "new")) == 4


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_is_replaced_at_once(
    exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanging:  # as some file systems are
        monkeypatch.setattr(_replacing, "exchange", lambda a, b: False)
    target = tmp_path / "out.zarr"
    for turn in ("old", "new"):
        with replacing(target) as new:
            new.mkdir()
            (new / turn).write_text(turn)
    assert names(target) == {"new"}
    assert names(tmp_path) == {"out.zarr"}


@posix
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_renames_waits(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_replacing, "exchange", lambda a, b: False)
    target = tmp_path / "out.zarr"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def interrupted(source: Path, to: Path) -> None:
        rename(source, to)
        if Path(to).name == "old":
            os.kill(os.getpid(), signum)

    class Ended(BaseException):
        pass

    def end(number: int, frame: Any) -> None:
        raise Ended

    before = signal.signal(signum, end)
    monkeypatch.setattr(os, "rename", interrupted)

    def replace() -> None:
        with replacing(target) as new:
            new.mkdir()
            (new / "new").write_text("new")

    try:
        with pytest.raises(Ended):
            replace()
    finally:
        signal.signal(signum, before)
    assert names(target) == {"new"}
    assert names(tmp_path) == {"out.zarr"}


def test_what_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """SIGKILL between two renames, where there is no exchange."""
    left = tmp_path / f".out.zarr{_replacing.MARK}abc"
    (left / "old").mkdir(parents=True)
    (left / "old" / "zarr.json").write_text("{}")
    (left / "target").write_text("out.zarr")
    sweep(tmp_path)
    assert names(tmp_path) == {"out.zarr"}
    assert names(tmp_path / "out.zarr") == {"zarr.json"}


@posix
def test_what_a_living_process_holds_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / f".dead.h5ad{_replacing.MARK}abc").mkdir()
    (tmp_path / ".other.h5ad.abc").mkdir()
    code = f"""
import sys, time
from pathlib import Path
from scuvae._replacing import temporary
with temporary(Path({str(tmp_path / "out.h5ad")!r})):
    print("ready", flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        sweep(tmp_path)
        left = names(tmp_path)
        assert len(left) == 2
        assert ".other.h5ad.abc" in left
        other.communicate("\n")
    assert names(tmp_path) == {".other.h5ad.abc"}


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with replacing(tmp_path / f"{number % 2}.txt") as new:
                new.write_text(str(number % 2) * 1000)
            sweep(tmp_path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # which raises what a thread did
    assert names(tmp_path) == {"0.txt", "1.txt"}
    for number in range(2):
        assert (tmp_path / f"{number}.txt").read_text() == str(number) * 1000


@posix
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_modes_are_kept(suffix: str, tmp_path: Path) -> None:
    adata, target = small_counts(n_obs=5), tmp_path / f"out{suffix}"
    mode = 0o750 if suffix == ".zarr" else 0o640
    for _ in range(2):
        with replacing(target) as new:
            adata.write_zarr(new) if suffix == ".zarr" else adata.write_h5ad(new)
        if _ == 0:
            target.chmod(mode)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_all_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        sync(handle)
        done.append(f"sync {os.fstat(handle).st_ino}")

    def replaced(source: Path, target: Path) -> None:
        done.append(f"rename {os.stat(source).st_ino}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    io.write_model(tmp_path / "model.scuvae", small_fit(small_counts()))
    file, folder = (tmp_path / "model.scuvae").stat().st_ino, tmp_path.stat().st_ino
    assert done == [f"sync {file}", f"rename {file}", f"sync {folder}"]


@posix
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_no_file_can_replace(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_counts().write_h5ad(tmp_path / "in.h5ad")
    output = tmp_path / "out.h5ad"
    if kind == "fifo":
        os.mkfifo(output)
    else:
        output.symlink_to("/dev/null")
    assert cli.main(["fit", str(tmp_path / "in.h5ad"), "-o", str(output)]) == 1
    assert "which no file can replace" in capsys.readouterr().err
    assert names(tmp_path) == {"in.h5ad", "out.h5ad"}
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) or os.name == "nt"


# --- found out before the work ------------------------------------------------------------------


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(adata: AnnData, **_: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(tl, "fit", fit)


@pytest.mark.usefixtures("no_fit")
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_no_space(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_counts().write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.setattr("scuvae.cli.files.free_bytes", lambda folder: 123)
    output = tmp_path / f"out{suffix}"
    assert cli.main(["fit", str(tmp_path / "in.h5ad"), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert "no space for" in error
    assert "123 are free" in error
    assert names(tmp_path) == {"in.h5ad"}


@pytest.mark.parametrize("slot", ["obs", "var", "raw", "uns"])
@pytest.mark.usefixtures("no_fit")
def test_what_no_file_takes(
    slot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a file can hold it: what anndata reads is not all that it writes."""
    adata = small_counts(n_obs=6)
    adata.write_h5ad(tmp_path / "in.h5ad")
    mixed = pd.Series([1, "a", None, 2.5, (), {}] * 10, dtype=object)
    match slot:
        case "obs":
            adata.obs["odd"] = mixed[: adata.n_obs].to_numpy()
        case "var":
            adata.var["_index"] = 1.0
        case "raw":
            adata.raw = adata.copy()
            adata.raw.var["_index"] = 1.0
        case "uns":
            adata.uns["odd"] = {1: object()}
    monkeypatch.setattr("scuvae.cli.files.read", lambda path: adata)
    line = ["fit", str(tmp_path / "in.h5ad"), "-o", str(tmp_path / "out.h5ad")]
    assert cli.main(line) == 1
    assert f"adata.{slot} cannot be written" in capsys.readouterr().err
    assert names(tmp_path) == {"in.h5ad"}


@posix
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".scuvae"])
def test_the_disk_is_full(suffix: str, tmp_path: Path) -> None:
    """A limit on a file's size stands for it: a write then fails, at the limit's byte."""
    adata = small_fit(small_counts(n_obs=80, n_vars=200))
    target = tmp_path / f"out{suffix}"
    code = f"""
import os, resource, sys, warnings
warnings.simplefilter("ignore")
import anndata
from pathlib import Path
from scuvae import io
from scuvae.cli.files import write
adata, target = anndata.read_h5ad({str(tmp_path / "in.h5ad")!r}), Path({str(target)!r})
def save():
    io.write_model(target, adata) if target.suffix == ".scuvae" else write(adata, target)
save()
before = {{p: p.read_bytes() for p in target.parent.rglob("*") if p.is_file()}}
for limit in (0, 100, 3000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save()
    except OSError as error:
        assert "bytes" in str(error) and "free" in str(error), error
    else:
        # Of a store each chunk is a file of its own.
        assert target.suffix == ".zarr" and limit > 100, limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if target.suffix != ".zarr":
        assert before == {{p: p.read_bytes() for p in target.parent.rglob("*") if p.is_file()}}
    assert sorted(p.name for p in target.parent.iterdir()) == ["in.h5ad", target.name]
if target.suffix == ".zarr":
    assert anndata.read_zarr(target).shape == (80, 200)
os._exit(0)  # HDF5 may crash at the process's end where its last write failed
"""
    adata.write_h5ad(tmp_path / "in.h5ad")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_long_name(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 120 + ".txt")
    with temporary(target), replacing(target) as new:
        new.write_text("x")
    assert names(tmp_path) == {target.name}
    assert checked_target(target) == target
    assert np.all([target.read_text() == "x"])
