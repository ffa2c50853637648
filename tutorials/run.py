"""Execute every notebook of this folder, from top to bottom, in a fresh kernel each.

python tutorials/run.py            # in full; outputs are saved into the notebooks
python tutorials/run.py --short    # SCUVAE_TUTORIAL=short, nothing is saved
python tutorials/run.py --jobs 2   # so many at a time, of one thread each
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent


def execute(path: Path, *, save: bool) -> None:
    notebook = nbformat.read(path, as_version=4)
    # record_timing would put the time of the run into the file's diff.
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    if save:
        # The kernel reports its exact Python: noise in the diff between two machines.
        notebook.metadata.get("language_info", {}).pop("version", None)
        nbformat.write(notebook, path)


def outcome(path: Path, *, save: bool) -> tuple[str, bool]:
    """A line about a notebook, and whether it ran to its end."""
    start = perf_counter()
    try:
        execute(path.resolve(), save=save)
    except CellExecutionError as error:
        return f"{path.name}: {error}\n", False
    return f"{path.name}: {perf_counter() - start:.0f} s\n", True


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the tutorials.")
    parser.add_argument(
        "--short", action="store_true", help="few epochs; the files stay as they are"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in this folder")
    args = parser.parse_args()
    if args.short:
        os.environ["SCUVAE_TUTORIAL"] = "short"  # the kernels inherit it
    else:
        os.environ.pop("SCUVAE_TUTORIAL", None)
        os.environ.pop("MPLBACKEND", None)  # another than the notebook's shows no picture

    if args.jobs > 1:  # they would wait for each other's threads
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    failed = 0
    paths = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for text, well in pool.map(partial(outcome, save=not args.short), paths):
            failed += not well
            (sys.stdout if well else sys.stderr).write(text)
            sys.stdout.flush()
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
