"""Processes killed at random while they write: what is left, and what the next run makes of it.

``python tests/kill_writers.py [--n 1000] [--seed 0]`` spreads the kills over ``.h5ad``, ``.zarr``
and model files. After each the output must hold all of the old or all of the new; litter is counted
after the next, undisturbed run.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter, sleep

import anndata
import numpy as np
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parent))
from helpers import small_counts, small_fit

from scuvae import get, io
from scuvae._replacing import checked_target
from scuvae.cli.files import write
from scuvae.cli.signals import terminable


def kinds() -> list[str]:
    return [".h5ad", ".zarr", ".scuvae"]


def _mark_of(target: Path) -> str:
    """Which of the two was written; an error if it is neither."""
    if target.suffix == ".scuvae":
        model = io.read_model(target)
        get.model(model)
        return "old" if int(model.uns["scuvae"]["params"]["rng"]) == 0 else "new"
    read = anndata.read_zarr if target.suffix == ".zarr" else anndata.read_h5ad
    adata = read(target)
    assert adata.shape == (300, 100)
    assert np.isfinite(adata.obsm["X_scuvae"]).all()
    return str(adata.uns["mark"])


def _save(adata: AnnData, target: Path, mark: str) -> None:
    """As the command line writes."""
    if target.suffix == ".scuvae":
        io.write_model(target, adata, key=mark)
    else:
        checked_target(target, folder=target.suffix == ".zarr")
        adata.uns["mark"] = mark
        write(adata, target)


def killed(kind: str, folder: Path, n: int, signum: int, seed: int) -> Counter[str]:
    """What ``n`` writers, killed at random times, left of a file that was there."""
    adata = small_counts(n_obs=300, n_vars=100)
    for number, key in enumerate(("old", "new")):
        small_fit(adata, key_added=key, rng=number, max_epochs=1)
    adata.obsm["X_scuvae"] = adata.obsm["old"]
    if kind == ".zarr":  # each of its arrays is a folder with files in it: fewer of them
        adata = AnnData(adata.X, obsm={"X_scuvae": adata.obsm["X_scuvae"]})
    target = folder / f"out{kind}"
    rng, counts = np.random.default_rng(seed), Counter[str]()
    _save(adata, target, "old")
    for _ in range(n):
        start = perf_counter()
        _save(adata, target, "old")
        took = perf_counter() - start
        counts["litter after the next run"] += len(set(os.listdir(folder)) - {target.name})
        child = os.fork()  # nothing is imported anew: the kills fall while it writes
        if not child:
            status = 1
            try:
                with terminable():
                    _save(adata, target, "new")
                status = 0
            finally:
                os._exit(status)
        sleep(float(rng.uniform(0, 1.2 * took)))
        os.kill(child, signum)
        os.waitpid(child, 0)
        left = [name for name in os.listdir(folder) if name.startswith(".")]
        counts[f"left by {signal.Signals(signum).name}"] += len(left)
        try:
            counts[_mark_of(target)] += 1
        except Exception as error:
            counts["lost"] += 1
            print(type(error).__name__, error, file=sys.stderr)
    _save(adata, target, "old")
    counts["litter after the next run"] += len(set(os.listdir(folder)) - {target.name})
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    each = -(-args.n // (2 * len(kinds())))
    for kind in kinds():
        for signum in (signal.SIGKILL, signal.SIGTERM):
            with tempfile.TemporaryDirectory() as folder:
                counts = killed(kind, Path(folder), each, signum, args.seed)
            print(kind, signum.name, each, dict(counts), flush=True)


if __name__ == "__main__":
    main()
