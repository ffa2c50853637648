"""Processes killed at random while they write checkpoints: what is left, to the number.

``python tests/kill_checkpoints.py [--n 1000] [--seed 0]``. A process writes checkpoints one after
another, each of tensors that are full of its number, and says through a pipe which it begins and
which it has done; a SIGKILL ends it at a random moment. What the folder holds then must be the last
that was done, or the one that was begun, whole; the next process goes on from there. The folder
holds two files once one more is done.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch

from scuvae.inference.training.checkpoint import Checkpoint

N_NUMBERS = 100_000


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, every=0.0, fit={"n_latent": 2})


def write(kept: Checkpoint, number: int) -> None:
    tensors = {"weights": torch.full((N_NUMBERS,), float(number)), "bias": torch.ones(3) * number}
    kept.write({"epoch": number, "model": tensors, "posterior": {}})


def number_in(folder: Path) -> int | None:
    """The number of the checkpoint that is there; an error where it is not whole."""
    state = checkpoint(folder).read()
    if state is None:
        return None
    number = int(state["epoch"])
    for values in state["model"].values():
        if not (values == number).all():
            raise ValueError(f"checkpoint {number} has parts of another")
    return number


def writer(folder: Path, pipe: int) -> None:
    """Write until something ends it."""
    kept = checkpoint(folder)
    state = kept.read()
    number = 0 if state is None else int(state["epoch"])
    while True:
        number += 1
        os.write(pipe, f"b{number} ".encode())
        write(kept, number)
        os.write(pipe, f"d{number} ".encode())


def killed(folder: Path, n: int, seed: int) -> Counter[str]:
    rng, counts = np.random.default_rng(seed), Counter[str]()
    start = perf_counter()
    for number in range(1, 4):
        write(checkpoint(folder / "tried"), number)
    took = (perf_counter() - start) / 3
    kept, last = folder / "kept", 0
    for _ in range(n):
        ours, theirs = os.pipe()
        child = os.fork()  # nothing is imported anew: the kills fall while it writes
        if not child:
            try:
                writer(kept, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        said = os.read(ours, 1)  # it has begun
        sleep(float(rng.uniform(0, 3 * took)))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        while part := os.read(ours, 2**16):
            said += part
        os.close(ours)
        words = said.decode().split()
        done = max([last, *(int(word[1:]) for word in words if word[0] == "d")])
        begun = max(int(word[1:]) for word in words if word[0] == "b")
        counts["kills"] += status == -signal.SIGKILL
        counts["in a write"] += begun > done
        try:
            found = number_in(kept)
        except Exception as error:
            counts["lost"] += 1
            print(type(error).__name__, error, file=sys.stderr)
            return counts
        if (found or 0) not in (done, begun):
            counts["older than the last that was done"] += 1
        counts["the one that was begun is there"] += begun > done and found == begun
        last = found or 0
    last_one = checkpoint(kept)
    last_one.read()
    write(last_one, last + 1)
    counts["litter after one more"] = len(os.listdir(kept)) - 2
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = killed(Path(folder), args.n, args.seed)
    print(dict(counts))
    bad = ("lost", "older than the last that was done", "litter after one more")
    sys.exit(any(counts[name] for name in bad))


if __name__ == "__main__":
    main()
