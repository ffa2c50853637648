"""Mistakes planted in a copy of the package, one after another: which do the tests catch?

``python tests/mutations.py [--only WORDS] [--skip N] [--list]``. Each mistake is a replacement of
text that occurs once in a file; the tests named beside it, run on the copy, must fail. What is
heavy is imported once; every mistake then has a process of its own, so that all take some minutes.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from mistakes import FORMULAS, SURVIVED, Mistake
from mistakes_of_places import SLOTS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "scuvae"
# Seconds after which a mistake counts as noticed: its test no longer ends.
LONGEST = 600


MISTAKES = [*SURVIVED, *FORMULAS, *SLOTS]


def planted(mistake: Mistake, copy: Path) -> str:
    """Plant it; returned is the file's text as it was."""
    path = copy / "scuvae" / mistake.file
    text = path.read_text(encoding="utf-8")
    if text.count(mistake.old) != 1:
        raise SystemExit(
            f"{mistake.what}: {mistake.file} has {text.count(mistake.old)} such places"
        )
    path.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    return text


def failed(mistake: Mistake, copy: Path) -> bool:
    """Whether its tests fail, in a process of their own."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(TESTS)]
            signal.alarm(LONGEST)
            files = [f"{TESTS / w}" if w.endswith(".py") else w for w in mistake.tests.split()]
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                import pytest

                status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files]))
        finally:
            os._exit(status)
    _, state = os.waitpid(child, 0)
    # No tests found, or a broken command line, would be no proof.
    code = os.waitstatus_to_exitcode(state)
    if code > 1:
        raise SystemExit(f"{mistake.what}: pytest ended with {code}")
    return code != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mistakes that are called so")
    parser.add_argument("--skip", type=int, default=0, help="the first, of those")
    parser.add_argument("--list", action="store_true", help="check that all can be planted")
    args = parser.parse_args()
    chosen = [m for m in MISTAKES if args.only in m.what][args.skip :]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / "scuvae", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(TESTS.parent / "pyproject.toml", copy)
        # Compiled code of files that are not touched is made once.
        os.environ["NUMBA_CACHE_DIR"] = str(copy / "compiled")
        os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
        import anndata  # noqa: F401
        import scanpy  # noqa: F401
        import torch

        torch.set_num_threads(1)  # a forked process has no others
        survived = []
        for mistake in chosen:
            start = time.monotonic()
            text = planted(mistake, copy)
            try:
                caught = True if args.list else failed(mistake, copy)
            finally:
                path = copy / "scuvae" / mistake.file
                path.write_text(text, encoding="utf-8")
            seconds = time.monotonic() - start
            print(
                f"{'caught' if caught else 'SURVIVED':9}{seconds:6.0f} s  {mistake.what}",
                flush=True,
            )
            if not caught:
                survived.append(mistake.what)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught; survived: {survived or 'none'}")


if __name__ == "__main__":
    main()
