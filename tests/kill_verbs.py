"""Every command of ``scuvae`` ended by SIGINT or SIGTERM at random moments: how it ends.

``python tests/kill_verbs.py [--n 4] [--seed 0]``: so many of each signal for each command. A
clean end is a sentence, no traceback, the status 130 or 143, outputs that are the old ones or those
of a run that was left alone, and no litter; a command that was done before has its usual end.
The first moments, in which Python itself starts, are left out: what ends then is Python's.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from helpers import small_counts, small_fit

from scuvae import io, pp, tl

# Commands, their outputs last. FIT has all that a fit can have; NEW has new cells.
COMMANDS = {
    "fit": "fit NEW -o out.h5ad --max-epochs 30 --batch-key batch",
    "fit, checkpoint": "fit NEW -o out.h5ad --max-epochs 30 --checkpoint kept",
    "fit, zarr": "fit NEW -o out.zarr --max-epochs 30",
    "project": "project NEW --reference FIT -o out.h5ad",
    "refine": "refine FIT -o out.h5ad",
    "score": "score FIT -o out.h5ad",
    "gap": "gap FIT -o out.h5ad",
    "denoise": "denoise FIT -o out.h5ad",
    "extend-genes": "extend-genes FEW -o out.h5ad",
    "embed": "embed FIT -o out.h5ad",
    "neighbors": "neighbors FIT -o out.h5ad",
    "rank-genes": "rank-genes FIT --groupby cell_type --table out.csv",
    "transfer-labels": "transfer-labels NEW --reference FIT --labels cell_type -o out.h5ad",
    "novelty": "novelty NEW --reference FIT -o out.h5ad",
    "to-encoder": "to-encoder FEW -o out.h5ad",
    "check predictive": "check predictive FIT -o out.h5ad",
    "check calibration": "check calibration FIT -o out.h5ad --n-cells 50",
    "plot": "plot loss FIT -o out.png",
    "model write": "model write FIT out.scuvae",
    "model show": "model show MODEL --json out.json",
    "demo": "demo -o demo",
}
OLD = b"old"
LATEST = 20.0  # seconds: later, a command is taken for one that does not end


def inputs(folder: Path) -> dict[str, str]:
    """The files that commands read."""
    warnings.simplefilter("ignore")
    fit, few = small_counts(n_obs=200), small_counts(n_obs=200)
    small_fit(fit, amortized=True, batch_key="batch", max_epochs=2)
    small_fit(few, mask_var="highly_variable", max_epochs=2)
    tl.score(fit, n_samples=2)
    pp.neighbors(fit, n_samples=2)
    fit.write_h5ad(folder / "fit.h5ad")
    few.write_h5ad(folder / "few.h5ad")
    small_counts(n_obs=200, seed=1).write_h5ad(folder / "new.h5ad")
    io.write_model(folder / "model.scuvae", fit)
    names = {"FIT": "fit.h5ad", "FEW": "few.h5ad", "NEW": "new.h5ad", "MODEL": "model.scuvae"}
    return {name: str(folder / file) for name, file in names.items()}


def started(command: str, files: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    words = [files.get(word, word) for word in command.split()]
    return subprocess.Popen(
        [sys.executable, "-m", "scuvae", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A parent that ignores SIGINT, as a background job does, would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but those of a checkpoint, which are there to be gone on from."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith("kept/")}


def fault(process: subprocess.Popen[str], signum: int, folder: Path) -> str:
    """What is wrong with an end; "" for nothing, "done" where the signal came too late."""
    try:
        _, said = process.communicate(timeout=LATEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "has not ended"
    status = process.returncode
    left = contents(folder)
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback" in said or "Exception ignored" in said:
        return f"a traceback (status {status}): {lines[-1][:200]}"
    if any(".scuvae-" in name or name.endswith(".tmp") for name in left):
        return "litter"
    # Done; or at its end, where Python itself has taken the signals back.
    new = not all(map(_old_or_whole, left.items()))
    if status == 0 or (status == -signum and new and not said):
        return "done"
    if status != 128 + signum:
        return f"status {status}: {said[-200:]}"
    word = "interrupted" if signum == signal.SIGINT else "terminated"
    if not lines or not re.search(rf"^scuvae: .*{word}", lines[-1]):
        return f"no sentence: {said[-200:]}"
    return "an output all the same" if new else ""


def _old_or_whole(file: tuple[str, bytes]) -> bool:
    """What was there, or one of the demo's pictures."""
    name, data = file
    return data == OLD or (name.endswith(".png") and data.endswith(b"IEND\xaeB`\x82"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a command's name")
    args = parser.parse_args()
    rng, ends = np.random.default_rng(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        files = inputs(Path(place))
        folder = Path(place) / "work"
        for name, command in COMMANDS.items():
            if args.only not in name:
                continue
            folder.mkdir()
            start = perf_counter()
            process = started(command, files, folder)
            _, said = process.communicate()
            seconds = perf_counter() - start
            assert process.returncode == 0, (name, said)
            for number in range(2 * args.n):
                shutil.rmtree(folder)
                folder.mkdir()
                for word in command.split():
                    if word.startswith("out.") and word != "out.zarr":
                        (folder / word).write_bytes(OLD)
                signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
                process = started(command, files, folder)
                sleep(rng.uniform(0.25, max(1.05 * seconds, 0.5)))
                process.send_signal(signum)
                end = fault(process, signum, folder)
                ends[end or "clean"] += 1
                if end not in ("", "done"):
                    print(f"{name}, {signal.Signals(signum).name}: {end}", flush=True)
            shutil.rmtree(folder)
    for end, count in ends.most_common():
        print(f"{end[:60]:>60} {count:>5}")
    sys.exit(bool(set(ends) - {"clean", "done"}))


if __name__ == "__main__":
    main()
