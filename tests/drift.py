"""Memory and handles of one process over many epochs and many fits.

``python tests/drift.py [--epochs 500] [--fits 100] [--cells 2000] [--genes 500]``. Printed is the
resident memory after a warm-up and at the end, and how many files are open: over the epochs of one
fit, and over fits of all likelihoods and schemes, scored and saved.
"""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parent))
from helpers import LIKELIHOOD_NAMES, SCHEMES, small_counts, small_data

from scuvae import get, io, tl
from scuvae.inference.training import fit as training

PAGE = os.sysconf("SC_PAGE_SIZE")


def now() -> tuple[float, int]:
    """Resident memory in MB, and open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * PAGE / 1e6, len(os.listdir("/proc/self/fd"))


def said(what: str, first: tuple[float, int], last: tuple[float, int]) -> bool:
    drift = last[0] / first[0] - 1
    print(
        f"{what}: {first[0]:.0f} MB after the warm-up, {last[0]:.0f} at the end ({drift:+.2%}); "
        f"open files {first[1]} and {last[1]}",
        flush=True,
    )
    return drift < 0.01 and first[1] == last[1]


def over_epochs(n: int, adata: AnnData) -> bool:
    seen = []

    class Looking(training.tqdm):  # type: ignore[name-defined, misc]
        """A bar that looks at every tenth epoch."""

        epochs = 0

        def update(self, n: float | None = 1) -> None:
            self.epochs += 1
            if not self.epochs % 10:
                seen.append(now())

    bar, training.tqdm = training.tqdm, Looking
    try:
        tl.fit(adata, max_epochs=n, early_stopping=False, progress=False)
    finally:
        training.tqdm = bar
    return said(f"{n} epochs", seen[len(seen) // 10], seen[-1])


def over_fits(n: int, folder: Path) -> bool:
    kinds = [(name, scheme) for name in LIKELIHOOD_NAMES for scheme in SCHEMES]
    warm, first = 2 * len(kinds), (0.0, 0)
    for number in range(warm + n):
        if number == warm:
            first = now()
        likelihood, amortized = kinds[number % len(kinds)]
        adata = small_data(likelihood, n_obs=300, n_vars=200)
        tl.fit(adata, likelihood=likelihood, amortized=amortized, max_epochs=3, progress=False)
        tl.score(adata, n_samples=5)
        adata.write_h5ad(folder / "fit.h5ad")
        io.write_model(folder / "fit.scuvae", adata)
        get.model(io.read_model(folder / "fit.scuvae"))
    return said(f"{n} fits", first, now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--fits", type=int, default=100)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steady = over_epochs(args.epochs, small_counts(n_obs=args.cells, n_vars=args.genes))
    with tempfile.TemporaryDirectory() as folder:
        steady &= over_fits(args.fits, Path(folder))
    sys.exit(not steady)


if __name__ == "__main__":
    main()
