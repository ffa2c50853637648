"""Fits that are killed at random moments and made again, until they come to their end.

``python tests/kill_fits.py [--n 200] [--seed 0] [--kinds memory streamed two]``. Each SIGKILL falls
at a random time of a call of ``tl.fit`` with a checkpoint, after every step, of a matrix in memory,
of one that is streamed from disk, or by two processes, of which one at random is killed. What a fit
leaves in the end must be, byte for byte, what one that nobody killed leaves.
"""

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse as sp

from scuvae import tl
from scuvae.batches.sources import on_disk

KINDS = ("memory", "streamed", "two")
OPTIONS: dict[str, Any] = {"n_latent": 2, "n_hidden": 8, "max_epochs": 4, "batch_size": 60}


def fit(kind: str, folder: Path, kept: Path, output: Path) -> None:
    """One call, in a process of its own; what it leaves is there as a whole or not at all."""
    if kind == "streamed":
        on_disk.BUFFER = 2**15  # a tenth of the matrix
    backed = "r" if kind == "streamed" else None
    adata = read_h5ad(folder / "data.h5ad", backed=backed)
    tl.fit(adata, checkpoint=kept, checkpoint_every=0, **OPTIONS)
    if "scuvae" in adata.uns:
        arrays = {key: np.asarray(value) for key, value in adata.obsm.items()}
        arrays["history"] = adata.uns["scuvae"]["history"].to_numpy()
        np.savez(output.with_suffix(".tmp.npz"), **arrays)
        os.replace(output.with_suffix(".tmp.npz"), output)


def started(kind: str, *paths: Path) -> list[int]:
    """The processes of a call."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    n = 2 if kind == "two" else 1
    for rank in range(n):
        child = os.fork()  # nothing is imported anew
        if not child:
            status = 1
            try:
                if n > 1:
                    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), **where)
                    os.environ["SCUVAE_TIMEOUT"] = "60"
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # who misses whom
                fit(kind, *paths)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return children


def killed(kind: str, folder: Path, n: int, seed: int) -> Counter[str]:
    """What became of fits that were killed ``n`` times in all."""
    rng, counts = np.random.default_rng(seed), Counter[str]()
    whole, parts, kept = folder / f"{kind}.npz", folder / f"{kind} parts.npz", folder / kind
    start = perf_counter()
    for child in started(kind, folder, folder / f"{kind} alone", whole):
        os.waitpid(child, 0)
    took = perf_counter() - start
    expected = whole.read_bytes()
    while counts["kills"] < n or not parts.exists():
        children = started(kind, folder, kept, parts)
        if counts["kills"] < n:
            sleep(float(rng.uniform(0, 0.7 * took)))
            os.kill(children[int(rng.integers(len(children)))], signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        counts["kills"] += -signal.SIGKILL in statuses
        if any(status not in (0, 1, -signal.SIGKILL) for status in statuses):
            counts[f"ended by {statuses}"] += 1
        if parts.exists():
            counts["ends"] += 1
            counts["other ends"] += parts.read_bytes() != expected
            if counts["kills"] < n:
                parts.unlink()
                shutil.rmtree(kept)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = np.random.default_rng(0).poisson(1.0, (600, 200)).astype(np.float32)
    tl.fit(AnnData(x[:60].copy()), **OPTIONS)  # compiles once what all need
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AnnData(sp.csr_matrix(x)).write_h5ad(folder / "data.h5ad")
        for kind in args.kinds:
            counts = killed(kind, folder, args.n, args.seed)
            failed |= bool(counts["other ends"]) or any("ended by" in key for key in counts)
            print(kind, dict(counts), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
