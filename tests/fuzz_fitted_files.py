"""``.h5ad`` files of a fit with random damage: what is read of the fit is what was written.

``python tests/fuzz_fitted_files.py [--n 5000] [--seed 0]``. HDF5 itself can hang or crash on
damage: each file is read by a process of its own, which has ten seconds. What is read is the model,
and where it puts three new cells. Cells, counts and posteriors have no digests: damage to them is
none to the fit.
"""

import argparse
import faulthandler
import os
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import anndata
import numpy as np
import torch
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_model_files import LONGEST
from helpers import fingerprint, small_counts, small_fit

from scuvae import get, tl

ENDS = ["as written", "refused by anndata", "refused", "silently different", "crashed"]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One of seven kinds of damage, more often where there is something."""
    changed = bytearray(data)
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    while not any(data[at : at + 64]) and rng.random() < 0.9:
        at = int(rng.integers(len(data)))
    match rng.integers(7):
        case 0:
            changed[at] ^= 1 << int(rng.integers(8))
        case 1:
            changed[at : at + size] = rng.bytes(size)
        case 2:
            changed[at : at + size] = bytes(size)
        case 3:
            del changed[at : at + size]
        case 4:
            del changed[at:]
        case 5:  # one piece for another, as of another sector
            size = 2 ** int(rng.integers(2, 13))
            other = int(rng.integers(len(data)))
            changed[at : at + size] = data[other : other + size]
        case 6:  # letters of a name
            letters = [i for i in range(at, min(at + 4096, len(data))) if chr(data[i]).isalpha()]
            for i in letters[: int(rng.integers(1, 4))]:
                changed[i] = int(rng.integers(97, 123))
    return bytes(changed)


def read(adata: AnnData, new: AnnData) -> Any:
    """All that the fit says of itself, and where it puts new cells."""
    model = get.model(adata)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    projected = new.copy()
    tl.project(projected, adata, max_steps=2, polish=False)
    placed = [projected.obsm["X_scuvae"], projected.obsm["X_scuvae_scale"]]
    entry = {name: value for name, value in adata.uns["scuvae"].items() if name != "manifest"}
    return fingerprint({"entry": entry, "state": state, "placed": placed[0], "scale": placed[1]})


def ended(path: Path, new: AnnData, expected: Any) -> str:
    """How a process of its own came out of reading it."""
    child = os.fork()
    if child == 0:
        status = ENDS.index("refused by anndata")
        signal.alarm(LONGEST)  # ends a call of C too
        trace = os.open(path.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        faulthandler.dump_traceback_later(LONGEST - 1, file=trace)
        faulthandler.enable(file=trace)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # HDF5's own complaints
            adata = anndata.read_h5ad(path)
            status = ENDS.index("refused")
            status = ENDS.index("as written" if read(adata, new) == expected else ENDS[3])
        except Exception as error:
            if status == ENDS.index("refused") and not isinstance(error, ValueError):
                status = ENDS.index("crashed")
                print(type(error).__name__, error, flush=True)
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return ENDS[code]
    frames = re.findall(r'File "(.*)", line', path.with_suffix(".trace").read_text())
    where = ", in h5py" if frames and "h5py" in frames[0] else ", elsewhere" if frames else ""
    return f"ended by {signal.Signals(-code).name}{where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    new, rng = small_counts(n_obs=3, n_vars=8, seed=1), np.random.default_rng(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.h5ad"
        adata = small_fit(small_counts(n_obs=20, n_vars=8), n_hidden=4, batch_key="batch")
        # Little else than the fit, so that most damage is to it.
        AnnData(adata.X, var=adata.var[[]], uns=adata.uns).write_h5ad(path)
        data, expected, slowest = path.read_bytes(), read(anndata.read_h5ad(path), new), 0.0
        for number in range(args.n):
            changed = damaged(data, rng)
            path.write_bytes(changed)
            start = perf_counter()
            end = ended(path, new, expected)
            slowest = max(slowest, perf_counter() - start)
            counts[end] += 1
            if end == "silently different" or end.startswith("ended by SIGSEGV"):
                print(f"file {number} of seed {args.seed} is {end}", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{name:>30} {count:>7,}")
    print(f"{'slowest':>30} {slowest:>7.1f} s")
    sys.exit(counts["silently different"] > 0)


if __name__ == "__main__":
    main()
