"""The command line: what reaches tl, what is written, and what is left when it fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import anndata
import numpy as np
import pytest
from anndata import AnnData

from scuvae import _replacing, cli, datasets, tl
from scuvae.cli import files
from scuvae.cli.paths import SUFFIXES
from scuvae.cli.signals import Terminated, terminable


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "in.h5ad"
    AnnData(np.arange(12, dtype=np.float32).reshape(4, 3)).write_h5ad(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments that reach ``tl.fit`` and ``tl.project``, which here only leave a mark."""
    seen: list[dict[str, Any]] = []

    def fit(adata: AnnData, **arguments: Any) -> None:
        adata.uns["fitted"] = 1
        seen.append(arguments)

    def project(adata: AnnData, reference: AnnData, **arguments: Any) -> None:
        fit(adata, **arguments)

    monkeypatch.setattr(tl, "fit", fit)
    monkeypatch.setattr(tl, "project", project)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--help", 0),
        ("fit --help", 0),
        ("project --help", 0),
        ("demo --help", 0),
        ("rank-genes --help", 0),
        ("check calibration --help", 0),
        ("plot volcano --help", 0),
        ("score missing.h5ad -o out.h5ad", 1),
        ("--version", 0),
        ("", 2),
        ("fit in.h5ad", 2),
        ("fit in.csv -o out.h5ad", 2),
        # What schemes there are, the registered ones too, tl.fit knows.
        ("fit in.h5ad -o out.h5ad --inference both", 1),
        ("fit in.h5ad -o out.h5ad --n-latent ten", 2),
        ("fit missing.h5ad -o out.h5ad", 1),
    ],
)
def test_answers_without_heavy_imports(line: str, status: int, tmp_path: Path) -> None:
    code = f"""
import sys
from scuvae.cli import main
try:
    status = main({line.split()!r})
except SystemExit as end:
    status = end.code
heavy = {{"torch", "anndata", "scanpy", "numpy", "pandas", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    assert bool(run.stdout) == (status == 0)
    assert not list(tmp_path.iterdir())


def test_unset_flags_are_not_passed(
    counts: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    assert cli.main(["fit", str(counts), "-o", str(tmp_path / "out.h5ad")]) == 0
    assert calls == [{}]


@pytest.mark.parametrize(
    ("name", "value"), [("unamortized", False), ("amortized", True), ("semi", "semi")]
)
def test_inference_names(
    name: str, value: object, counts: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    output = str(tmp_path / "out.h5ad")
    assert cli.main(["fit", str(counts), "-o", output, "--inference", name]) == 0
    assert calls == [{"amortized": value}]


def test_polish_without_a_word(counts: Path, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    files = [str(counts), "--reference", str(counts), "-o", str(tmp_path / "out.h5ad")]
    assert cli.main(["project", *files, "--polish"]) == 0
    assert calls == [{"polish": True}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.txt", None, "cannot read 'gone.txt': No such file"),
        ("genes.h5ad", b"\x89HDF\xff", "cannot read 'genes.h5ad': no text in UTF-8"),
        ("empty.txt", b"\n \n", "'empty.txt' holds no names"),
    ],
)
def test_a_file_without_names_of_genes(
    name: str,
    content: bytes | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["project", "a.h5ad", "--reference", "b.h5ad", "-o", "c.h5ad", "--genes", name])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("adata.X holds NaN\n  at cell 'a'"), "adata.X holds NaN at cell 'a'"),
        (KeyError("no layer 'count'"), "no layer 'count'"),
        (RuntimeError("broken"), "RuntimeError: broken (--debug shows where)"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_error_is_one_line(
    error: Exception,
    line: str,
    counts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(adata: AnnData, **_: Any) -> None:
        raise error

    monkeypatch.setattr(tl, "fit", fit)
    output = tmp_path / "out.h5ad"
    output.write_bytes(b"old")
    before = contents(tmp_path)
    assert cli.main(["fit", str(counts), "-o", str(output)]) == 1
    assert capsys.readouterr() == ("", f"scuvae: error: fit {counts}: {line}\n")
    assert contents(tmp_path) == before
    with pytest.raises(type(error)):
        cli.main(["fit", str(counts), "-o", str(output), "--debug"])


def test_user_mistake_end_to_end(
    tmp_path: Path, counts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    assert cli.main(["fit", str(counts), "-o", str(tmp_path / "out.h5ad"), "--layer", "raw"]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("scuvae: error: ")
    assert "'raw'" in stderr
    assert stderr.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["broken.h5ad", "empty.h5ad", "broken.zarr"])
def test_unreadable_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no such format")
    assert cli.main(["fit", str(tmp_path / name), "-o", str(tmp_path / "out.h5ad")]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"scuvae: error: fit: cannot read {tmp_path / name}: ")
    assert stderr.count("\n") == 1


def test_warnings_are_one_line(
    counts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(adata: AnnData, **_: Any) -> None:
        import logging
        import warnings

        warnings.warn("cell 'a'\nhas no counts", stacklevel=1)
        warnings.warn("gone in 2.0", FutureWarning, stacklevel=1)
        logging.getLogger("scuvae.tl").info("device: cpu")

    monkeypatch.setattr(tl, "fit", fit)
    line = ["fit", str(counts), "-o", str(tmp_path / "out.h5ad")]
    assert cli.main(line) == 0
    assert capsys.readouterr().err == "scuvae: warning: cell 'a' has no counts\n"
    assert cli.main([*line, "-v"]) == 0
    assert "scuvae: device: cpu\n" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_output_is_replaced(
    suffix: str, counts: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    output = tmp_path / f"out{suffix}"
    for _ in range(2):
        assert cli.main(["fit", str(counts), "-o", str(output)]) == 0
        assert files.read(output).uns["fitted"] == 1
        assert {path.name for path in tmp_path.iterdir()} == {counts.name, output.name}
    again = tmp_path / "again.h5ad"
    assert cli.main(["fit", str(output), "-o", str(again)]) == 0
    assert anndata.read_h5ad(again).n_obs == 4


def test_output_link_is_written_through(
    counts: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "out.h5ad"
    link.symlink_to(elsewhere / "real.h5ad")
    assert cli.main(["fit", str(counts), "-o", str(link)]) == 0
    assert link.is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["real.h5ad"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failed_write_keeps_the_old_file(
    suffix: str,
    counts: Path,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / f"out{suffix}"
    assert cli.main(["fit", str(counts), "-o", str(output)]) == 0
    before = contents(tmp_path)

    def full(self: AnnData, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AnnData, "write_h5ad", full)
    monkeypatch.setattr(AnnData, "write_zarr", full)
    assert cli.main(["fit", str(counts), "-o", str(output)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_store_is_put_back_if_the_new_one_cannot_take_its_place(
    counts: Path, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.zarr"
    assert cli.main(["fit", str(counts), "-o", str(output)]) == 0
    before = contents(tmp_path)
    monkeypatch.setattr(_replacing, "exchange", lambda a, b: False)  # as some file systems are
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if Path(target) == output and Path(source).name == "new.zarr":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    assert cli.main(["fit", str(counts), "-o", str(output)]) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "hardlink"])
@pytest.mark.parametrize("role", ["input", "reference"])
def test_input_is_never_overwritten(
    how: str,
    role: str,
    counts: Path,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.h5ad"
    other.write_bytes(counts.read_bytes())
    output = tmp_path / "out.h5ad"
    match how:
        case "same":
            output = counts
        case "relative":
            output = tmp_path / ".." / tmp_path.name / counts.name
        case "symlink":
            output.symlink_to(counts)
        case "hardlink":
            os.link(counts, output)
    new, reference = (counts, other) if role == "input" else (other, counts)
    before = contents(tmp_path)
    line = ["project", str(new), "--reference", str(reference), "-o", str(output)]
    assert cli.main(line) == 1
    assert "would overwrite" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert calls == []


def test_store_that_holds_the_input_is_not_replaced(
    tmp_path: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "in.zarr"
    AnnData(np.ones((2, 2), dtype=np.float32)).write_zarr(store)
    before = contents(tmp_path)
    for output in (store, store / "X.zarr", store / "out.h5ad"):
        assert cli.main(["fit", str(store), "-o", str(output)]) == 1
        assert "would overwrite" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("missing/out.h5ad", "no such folder"),
        ("folder.h5ad", "is a folder"),
        ("folder.zarr", "no zarr store"),
        ("locked/out.h5ad", "Permission denied"),
    ],
)
def test_bad_output_is_refused_before_the_work(
    output: str,
    message: str,
    counts: Path,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("folder.h5ad", "folder.zarr", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("keep")
    if output.startswith("locked"):  # permission bits do not stop root, who may run this

        def locked(target: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(_replacing, "temporary", locked)
    before = contents(tmp_path)
    assert cli.main(["fit", str(counts), "-o", str(tmp_path / output)]) == 1
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert calls == []


@pytest.mark.parametrize("when", ["fit", "write"])
@pytest.mark.parametrize(
    ("signum", "status", "line"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_signals(when: str, signum: int, status: int, line: str, tmp_path: Path) -> None:
    # Light stand-ins for the data and for tl: what is tested is how the process ends.
    code = f"""
import sys, time, types
from pathlib import Path
import scuvae
from scuvae import cli

def wait(when):
    if when == {when!r}:
        print("ready", flush=True)
        time.sleep(60)

class Data:
    def write_h5ad(self, path):
        Path(path).write_bytes(b"part")
        wait("write")

scuvae.tl = types.SimpleNamespace(fit=lambda adata: wait("fit"))
from scuvae.cli import files
files.read = lambda path: Data()
files.check_writing = lambda adata, output: None
files._check_space = lambda adata, output: None
sys.exit(cli.main(["fit", "in.h5ad", "-o", "out.h5ad"]))
"""
    (tmp_path / "in.h5ad").write_bytes(b"in")
    (tmp_path / "out.h5ad").write_bytes(b"old")
    before = contents(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A parent that ignores SIGINT, as a background job does, would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert process.wait(timeout=30) == status
        assert process.stderr.read() == f"scuvae: {line}\n"
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_while_code_is_made_from_text(tmp_path: Path) -> None:
    """As libraries do while they are imported: Python would end ``-m`` by a signal after all."""
    (tmp_path / "ends.py").write_text("""
import signal, sys
from scuvae.cli.messages import say
from scuvae.cli.signals import terminable
def main():
    try:
        with terminable():
            exec("signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        return say("interrupted", 130)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
""")
    done = subprocess.run(
        [sys.executable, "-m", "ends"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr == "scuvae: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("signum", "ended"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_within_a_finalizer_is_not_lost(
    signum: signal.Signals, ended: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised there Python prints and forgets."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signum)

    def finalize() -> None:
        Finalized()
        sleep(30)

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    hook, alarm = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(ended), terminable():
            finalize()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not said
    assert sys.unraisablehook == hook
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.skipif(os.name == "nt", reason="FIFOs are POSIX's")
def test_an_input_that_is_no_file_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To open a FIFO waits for somebody to write to it: that may be never."""
    fifo, cells = str(tmp_path / "fifo.h5ad"), str(tmp_path / "in.h5ad")
    os.mkfifo(fifo)
    datasets.linear_factor(9, 5, 1).write_h5ad(cells)
    out = ["-o", str(tmp_path / "out.h5ad")]
    for argv in (
        ["fit", fifo, *out],
        ["fit", fifo, cells, *out],
        ["fit", cells, "--reference", fifo, *out],
        ["project", cells, "--reference", fifo, *out],
        ["model", "show", fifo],
        ["plot", "loss", fifo, "-o", str(tmp_path / "a.png")],
    ):
        assert cli.main(argv) == 1
        assert "fifo.h5ad is a FIFO or device: name a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["denoise", cells, "--genes", fifo, "--table", str(tmp_path / "t.csv")])
    assert "is no file: name a text file of genes" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"reference=.* is a FIFO or device"):
        tl.project(datasets.linear_factor(9, 5, 1), fifo)
    assert cli.main(["model", "show", str(tmp_path / "gone.h5ad")]) == 1
    assert "gone.h5ad: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signum", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_signal_that_a_checkpoint_answers_is_said_too(
    signum: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from scuvae.inference.training import loop

    original = loop.Losses.add

    def add(*args: Any) -> None:
        original(*args)
        signal.raise_signal(signum)

    monkeypatch.setattr(loop.Losses, "add", add)
    cells, out, kept = (str(tmp_path / name) for name in ("in.h5ad", "out.h5ad", "kept"))
    datasets.linear_factor(30, 5, 1).write_h5ad(cells)
    argv = ["fit", cells, "-o", out, "--checkpoint", kept, "-q", "--likelihood", "gaussian"]
    assert cli.main([*argv, "--n-latent", "2"]) == 128 + signum
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"scuvae: {word}: the fit goes on from {kept}"
    assert not Path(out).exists()


def test_places_that_nothing_can_be_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work, of inputs and of outputs; and a number of threads that none has."""
    cells, long = str(tmp_path / "in.h5ad"), "a" * 300 + ".h5ad"
    datasets.linear_factor(9, 5, 1).write_h5ad(cells)
    (tmp_path / "loop.h5ad").symlink_to("loop.h5ad")
    loop, out = str(tmp_path / "loop.h5ad"), ["-o", str(tmp_path / "out.h5ad")]
    for path, says in ((long, "too long for a file"), (loop, "leads round to itself")):
        for argv in (
            ["fit", path, *out],
            ["fit", cells, "-o", path],
            [
                "fit",
                cells,
                "--checkpoint",
                path.removesuffix(".h5ad") if path == long else path,
                *out,
            ],
            ["fit", cells, "--reference", path, *out],
            ["model", "show", path],
        ):
            assert cli.main(argv) == 1, argv
            assert says in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()
    small = ["--max-epochs", "1", "-q", "--likelihood", "gaussian", "--n-latent", "2"]
    assert cli.main(["fit", cells, *out, *small, "--threads", "9" * 50]) == 0


# --------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fit_then_project(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = datasets.pbmc68k_counts()
    reference, new = cells[:150].copy(), cells[150:200, ::-1].copy()
    paths = {name: str(tmp_path / f"{name}{suffix}") for name in ("in", "fit", "new", "out")}
    for data, name in ((reference, "in"), (new, "new")):
        data.write_zarr(paths[name]) if suffix == ".zarr" else data.write_h5ad(paths[name])

    options = ["--max-epochs", "2", "--n-latent", "4", "--rng", "3", "-q"]
    assert cli.main(["fit", paths["in"], "-o", paths["fit"], *options]) == 0
    line = ["project", paths["new"], "--reference", paths["fit"], "-o", paths["out"]]
    assert cli.main(line) == 0
    assert capsys.readouterr().err == ""

    tl.fit(reference, max_epochs=2, n_latent=4, rng=3)
    fitted, projected = files.read(Path(paths["fit"])), files.read(Path(paths["out"]))
    np.testing.assert_array_equal(fitted.obsm["X_scuvae"], reference.obsm["X_scuvae"])
    assert projected.obsm["X_scuvae"].shape == (50, 4)
    assert np.isfinite(projected.obsm["X_scuvae"]).all()
    assert list(projected.var_names) == list(new.var_names)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    run = subprocess.run(
        [sys.executable, "-m", "scuvae", "demo", "-o", str(folder)], capture_output=True, text=True
    )
    # On a slow machine a fit says how far it is.
    said = [line for line in run.stderr.splitlines() if " of at most " not in line]
    assert (run.returncode, said) == (0, [])
    pictures = {"loss.png", "observed_vs_predicted.png", "umap.png"}
    assert {path.name for path in folder.iterdir()} == {"demo.h5ad", *pictures}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert str(folder / name) in run.stdout
    adata = anndata.read_h5ad(folder / "demo.h5ad")
    for key in ("amortized", "unamortized"):
        assert key in run.stdout
        assert adata.obsm[key].shape[0] == adata.n_obs
        assert adata.obsm[f"X_{key}_umap"].shape == (adata.n_obs, 2)
