"""What several processes gain: one alone, as many that know nothing of each other, and together.

    python tests/benchmarks/processes.py --cells 10000 --batch-size 128 256 1024 --json out.json

Simulated counts as in scaling.py. Contestants take turns: one process that fits all cells; N that
fit an N-th each, alone, in batches of an N-th, which is what the machine has to give; N that fit
all cells together, by ``gloo``, in batches of the same total. Seconds an epoch are those of the
training loop, the medians over epochs and turns: of wall time, which others on the machine disturb,
and of CPU time, all processes' and what their exchanges take with it. ``speed-up`` is by wall time,
``of attainable`` divides that by what strangers reach; ``by CPU`` is N × one's CPU time over that
of all together, which wall time would show on idle cores if nobody ever waited.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _common import platform_of, print_table, simulated, write_json

COLUMNS = {
    "batch_size": ("cells a step", "d"),
    "who": ("who", ""),
    "wall_s": ("wall s an epoch", ".2f"),
    "cpu_s": ("CPU s an epoch, all", ".2f"),
    "speed_up": ("speed-up", ".2f"),
    "of_attainable": ("of attainable", ".2f"),
    "by_cpu": ("by CPU", ".2f"),
    "elbo": ("held-out ELBO", ".2f"),
}


def fitted(x: Any, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds an epoch of the training loop in this process, and the last held-out ELBO."""
    import anndata as ad

    import scuvae
    from scuvae.inference.training.loop import train

    walls, cpus = [], []

    def traced(*positional: Any, **named: Any) -> Any:
        def on_epoch(row: dict[str, float]) -> None:
            walls.append(time.perf_counter())
            cpus.append(time.process_time())

        named.pop("on_epoch")
        on_epoch({})
        return train(*positional, on_epoch=on_epoch, **named)

    adata = ad.AnnData(x)
    with patch("scuvae.tl._fit.train", traced):
        scuvae.tl.fit(
            adata,
            likelihood="nb",
            batch_size=batch_size,
            max_epochs=args.epochs,
            early_stopping=False,
            progress=False,
        )
    wall, cpu = np.diff(walls).tolist(), np.diff(cpus).tolist()
    found = {"wall_s": statistics.median(wall), "cpu_s": statistics.median(cpu)}
    if "scuvae" in adata.uns:
        found["elbo"] = float(adata.uns["scuvae"]["history"]["validation_elbo"].iloc[-1])
    return found


def forked(n: int, group: bool, work: Any) -> list[dict[str, Any]]:
    """What ``work(number)`` returns in each of ``n`` processes, which may be a group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(n):
            child = os.fork()
            if not child:
                if group:
                    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), **where)
                (Path(folder) / str(rank)).write_text(json.dumps(work(rank)))
                os._exit(0)
            children.append(child)
        for child in children:
            if os.waitpid(child, 0)[1]:
                raise SystemExit("a process failed")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cells", type=int, default=10_000)
    add("--genes", type=int, default=2000)
    add("--density", type=float, default=0.08)
    add("--processes", type=int, default=2)
    add("--batch-size", type=int, nargs="+", default=[128, 256, 1024])
    add("--epochs", type=int, default=3)
    add("--turns", type=int, default=2)
    add("--json", help="file for all figures")
    args = parser.parse_args()
    n = args.processes
    torch.set_num_threads(1)
    x = simulated(args.cells, args.genes, args.density)
    fitted(x[:500], 128, argparse.Namespace(epochs=1))  # compiled once
    parts = [x[i * args.cells // n : (i + 1) * args.cells // n] for i in range(n)]
    found: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
    for _ in range(args.turns):
        for size in args.batch_size:
            for who, count, work in (
                ("one", 1, lambda rank: fitted(x, size, args)),  # noqa: B023
                (f"{n} strangers", n, lambda rank: fitted(parts[rank], size // n, args)),  # noqa: B023
                (f"{n} together", n, lambda rank: fitted(x, size, args)),  # noqa: B023
            ):
                turn = forked(count, who.endswith("together"), work)
                found.setdefault((size, who), []).append(turn)
                wall = max(each["wall_s"] for each in turn)
                print(f"{size} cells a step, {who}: {wall:.2f} s an epoch", flush=True)
    rows = []
    for (size, who), turns in found.items():
        wall = statistics.median(max(each["wall_s"] for each in turn) for turn in turns)
        cpu = statistics.median(sum(each["cpu_s"] for each in turn) for turn in turns)
        elbo = turns[0][0]["elbo"] if "strangers" not in who else float("nan")
        row = {"batch_size": size, "who": who, "wall_s": wall, "cpu_s": cpu, "elbo": elbo}
        rows.append(row)
        one = next(r for r in rows if r["batch_size"] == size)
        row["speed_up"] = one["wall_s"] / wall
        row["by_cpu"] = len(turns[0]) * one["cpu_s"] / cpu
        attainable = rows[-2]["speed_up"] if who.endswith("together") else row["speed_up"]
        row["of_attainable"] = row["speed_up"] / attainable
    print_table(rows, COLUMNS)
    write_json(args.json, {"platform": platform_of("cpu"), "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
