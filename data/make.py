"""Remake the files of this folder, or check that they would come out the same.

    python data/make.py            write them here, with SHA256SUMS
    python data/make.py --check    remake them in a temporary folder and compare the values

Needs scuvae installed; no network.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from scuvae import datasets

HERE = Path(__file__).resolve().parent
SIMULATION = "linear_factor.npz"
COUNTS = "pbmc68k_counts.h5ad"
SUMS = "SHA256SUMS"


def write(folder: Path) -> None:
    # Written out, not taken from scuvae, so that the package can be tested against it.
    rng = np.random.default_rng(1)
    l = rng.normal(scale=0.5, size=(200, 3))  # noqa: E741
    f = rng.normal(scale=0.5, size=(500, 3))
    x = rng.normal(loc=l @ f.T, scale=0.3)
    np.savez_compressed(folder / SIMULATION, l=l, f=f, x=x)
    datasets.pbmc68k_counts().write_h5ad(folder / COUNTS, compression="gzip")


def sums(folder: Path) -> str:
    digests = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (SIMULATION, COUNTS)
    }
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def differences(folder: Path) -> list[str]:
    """What in ``folder`` differs from the files here; values count, compressed bytes do not."""
    found = []
    with np.load(HERE / SIMULATION) as kept, np.load(folder / SIMULATION) as made:
        if sorted(kept) != sorted(made):
            return [f"{SIMULATION}: arrays {sorted(kept)}, remade {sorted(made)}"]
        for name in kept:
            # l f' may differ in the last digit from one BLAS to another.
            if kept[name].shape != made[name].shape or not np.allclose(
                kept[name], made[name], rtol=0, atol=1e-12
            ):
                found.append(f"{SIMULATION}: {name}")

    kept, made = ad.read_h5ad(HERE / COUNTS), ad.read_h5ad(folder / COUNTS)
    if kept.shape != made.shape or (kept.X != made.X).nnz:
        found.append(f"{COUNTS}: X")
    for name in ("obs", "var"):
        try:
            pd.testing.assert_frame_equal(getattr(kept, name), getattr(made, name))
        except AssertionError:
            found.append(f"{COUNTS}: {name}")
    if kept.uns.keys() != made.uns.keys() or any(
        not np.array_equal(np.asarray(kept.uns[k]), np.asarray(made.uns[k])) for k in kept.uns
    ):
        found.append(f"{COUNTS}: uns")
    return found


def check() -> list[str]:
    if sums(HERE) != (HERE / SUMS).read_text():
        return [f"{SUMS}: a file here is not the one that was summed"]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return differences(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing here")
    if not parser.parse_args().check:
        write(HERE)
        (HERE / SUMS).write_text(sums(HERE))
        return 0
    found = check()
    print("\n".join(found) if found else "data: as remade", file=sys.stderr if found else None)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
