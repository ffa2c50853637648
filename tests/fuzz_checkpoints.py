"""Folders of ``checkpoint=`` with random damage: a fit that goes on ends as one that nobody ended.

``python tests/fuzz_checkpoints.py [--n 200] [--seed 0]``. Each file in turn is damaged as those of
``fuzz_fitted_files.py`` are, or is gone, empty, a folder, a link to nothing, or an older
checkpoint's. The fit then gives what it would have given, to the byte, or an error that names the
file and says what to do.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_fitted_files import damaged
from helpers import fingerprint, small_counts, small_fit

from scuvae.inference.training import loop

OPTIONS: dict[str, Any] = {"max_epochs": 4, "checkpoint_every": 0, "n_hidden": 4, "batch_size": 8}
WAYS = ["bytes"] * 5 + ["gone", "empty", "folder", "nowhere", "older"]


class Ended(BaseException):
    """The process is gone, as far as a fit can tell."""


def data() -> AnnData:
    return small_counts(n_obs=20, n_vars=8)


def ended_after(n_steps: int, folder: Path) -> None:
    """Leave the checkpoint of a fit that was ended after so many steps."""
    original, calls = loop.Losses.add, 0

    def add(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > n_steps:
            raise Ended
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Losses, "add", add)
        with pytest.raises(Ended):
            small_fit(data(), checkpoint=folder, **OPTIONS)


def change(folder: Path, older: Path, number: int, rng: np.random.Generator) -> str:
    """Damage one of the folder's files; the files take turns."""
    files = sorted(folder.iterdir())
    path = files[number % len(files)]
    way = WAYS[int(rng.integers(len(WAYS)))]
    if way == "bytes":
        path.write_bytes(damaged(path.read_bytes(), rng))
        return way
    other = next(file for file in older.iterdir() if file.suffix == path.suffix)
    path.unlink()
    if way == "empty":
        path.write_bytes(b"")
    elif way == "folder":
        path.mkdir()
    elif way == "nowhere":
        path.symlink_to(folder / "nothing")
    elif way == "older":
        shutil.copy(other, path)
    return way


def outcome(folder: Path, expected: Any) -> str:
    """How the fit went on."""
    adata = data()
    before = fingerprint(adata)
    try:
        small_fit(adata, checkpoint=folder, **OPTIONS)
    except (ValueError, OSError) as error:
        said = str(error)
        named = str(folder) in said and "delete" in said and "\n" not in said
        if not named or fingerprint(adata) != before:
            return f"{type(error).__name__} in other words: {said}"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "as undamaged" if fingerprint(adata) == expected else "silently different"


def outcomes(n: int, seed: int) -> Counter[str]:
    rng, counts = np.random.default_rng(seed), Counter[str]()
    expected = fingerprint(small_fit(data(), **OPTIONS))
    with tempfile.TemporaryDirectory() as place:
        kept, older, used = (Path(place) / name for name in ("kept", "older", "used"))
        ended_after(2, older)
        ended_after(7, kept)
        assert outcome(shutil.copytree(kept, used), expected) == "as undamaged"
        for number in range(n):
            shutil.rmtree(used)
            shutil.copytree(kept, used)
            way = change(used, older, number, rng)
            end = outcome(used, expected)
            counts[end] += 1
            if end not in ("as undamaged", "refused"):
                print(f"damage {number} of seed {seed}, {way}: {end}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = outcomes(args.n, args.seed)
    for name, count in sorted(counts.items()):
        print(f"{name:>30} {count:>7,}")
    sys.exit(set(counts) > {"as undamaged", "refused"})


if __name__ == "__main__":
    main()
