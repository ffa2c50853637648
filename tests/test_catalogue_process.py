"""The catalogue: the process. What it is set to, and what is at its ends, is no matter."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from anndata import AnnData
from catalogue import FIT
from helpers import fingerprint, small_counts, small_fit, unchanged

from scuvae import tl

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX's")


class Sink:
    """What IDEs, R and loggers put in place of stderr: it has no isatty."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


class Broken(Sink):
    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")


@contextmanager
def stderr(new: Any) -> Iterator[None]:
    old, sys.stderr = sys.stderr, new
    try:
        yield
    finally:
        sys.stderr = old


@pytest.mark.parametrize("new", [None, Sink(), Broken()], ids=["None", "no isatty", "closed"])
@pytest.mark.parametrize("progress", [None, True])
def test_stderr_is_what_it_is(new: Any, progress: bool | None) -> None:
    alone, adata = small_fit(small_counts(), max_epochs=1), small_counts()
    with stderr(new):
        tl.fit(adata, **{**FIT, "progress": progress})
    assert fingerprint(adata.obsm) == fingerprint(alone.obsm)


def run(code: str, **environment: str) -> str:
    """The output of a process of its own; it must end well, and soon."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@posix
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread has none to lose")
def test_a_fork_after_a_fit_ends() -> None:
    """Threads do not come along: what was given to them would never end."""
    said = run(
        """
        import os, signal, torch
        from helpers import fingerprint, small_counts, small_fit
        torch.set_num_threads(2)
        def fitted():
            return small_fit(small_counts(300, 200), n_hidden=64, max_epochs=2)
        first = fitted()
        child = os.fork()
        if child == 0:
            signal.alarm(200)  # a child that hangs is ended
            again = fitted()
            import numpy as np
            assert torch.get_num_threads() == 2
            close = np.abs(again.obsm["X_scuvae"] - first.obsm["X_scuvae"]).max() < 0.1
            os._exit(0 if close else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert said.split()[-1] == "0"


@posix
def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Nor a folder of caches: compiled code is then made anew. Nothing asks for the network."""
    none = tmp_path / "none"  # a file: nothing can be made below it, from root neither
    none.write_text("")
    home = str(none / "home")
    said = run(
        """
        import socket
        def refuse(*_, **__):
            raise AssertionError("the network was asked for")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from helpers import small_counts, small_fit
        from scuvae import pl, tl
        adata = small_fit(small_counts(), amortized="semi", max_epochs=1)
        tl.score(adata, n_samples=2)
        print(adata.obsm["X_scuvae"].shape)
        """,
        HOME=home,
        XDG_CACHE_HOME=home,
        NUMBA_CACHE_DIR=home,
        MPLCONFIGDIR=str(tmp_path),
    )
    assert said.split("\n")[-2] == "(60, 3)"


# --- old before new -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    return small_fit(small_counts(), amortized=True, batch_key="batch", max_epochs=1)


ENDS = {
    "in training": "scuvae.tl._fit.train",
    "in the last refinement": "scuvae.inference.training.fit.final_posterior",
    "at the map": "scuvae.tl._fit_slots.new_map",
    "at the digests": "scuvae.tl._fit_slots.sealed",
}


@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_ends_a_second_fit_leaves_the_first(
    where: str, error: type[BaseException], fitted: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = fitted.copy()

    def end(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ENDS[where], end)
    with unchanged(adata), pytest.raises(error):
        small_fit(adata, max_epochs=1)


@pytest.mark.parametrize("verb", ["refine", "to_encoder", "embed", "project"])
def test_what_ends_a_verb_leaves_the_fit(
    verb: str, fitted: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = small_fit(small_counts(), max_epochs=1) if verb == "to_encoder" else fitted.copy()
    first = (adata, fitted) if verb == "project" else (adata,)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"scuvae.tl._{verb}.sealed", end)
    with unchanged(adata), pytest.raises(KeyboardInterrupt):
        getattr(tl, verb)(*first)


def test_many_fits_leave_nothing_open() -> None:
    """Handles and threads of the process are as many after ten fits as after three."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")

    def counted(n: int) -> tuple[int, int]:
        for _ in range(n):
            small_fit(small_counts(), max_epochs=1)
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    assert counted(3) == counted(7)
