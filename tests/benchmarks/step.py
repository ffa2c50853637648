"""Milliseconds a training step: scuvae, scvi-tools, and the decoder's bare matrix products.

    python tests/benchmarks/step.py --json out.json
    python tests/benchmarks/step.py --inference unamortized --likelihood nb --profile

A step of scuvae is one of its real ``train`` with its real loader, set up as ``tl.fit`` does it:
batches gathered from CSR, draws, backward pass, Adam, local steps with their renewals, and an
epoch's share of what is done once an epoch, in the mean over as many epochs as ``tl.fit`` takes of
so many cells: renewals become rarer as a fit goes on. scvi-tools' steps are its module's loss,
backward pass and Adam on minibatches that are ready as dense tensors, and those of its real
training loop. The contestants take turns, and medians over the turns are reported: of CPU time, or
on a GPU of wall time.
"""

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from _common import platform_of, print_table, seconds_now, simulated, write_json

from scuvae.batches import Cells
from scuvae.batches.compact_rows import CompactRows
from scuvae.batches.loader import Loader
from scuvae.batches.sources.registry import source_of
from scuvae.inference.training.fit import _posterior
from scuvae.inference.training.loop import train
from scuvae.inference.training.optimizers import OPTIMIZERS
from scuvae.inference.training.settings import INFERENCE, Settings
from scuvae.io.model_arrays import build_model
from scuvae.model.likelihoods import LIKELIHOODS

SCHEMES = {name: amortized for amortized, name in INFERENCE.items()}
COLUMNS = {
    "contestant": ("step of", ""),
    "ms": ("ms", ".3f"),
    "products": ("/ products", ".2f"),
    "scvi": ("/ scvi-tools' step", ".3f"),
    "loop": ("/ scvi-tools' loop", ".3f"),
    "roofline": ("of the roofline", ".3f"),
}

Turn = Callable[[], int]
"""Takes some steps and says how many."""


# --- contestants ---------------------------------------------------------------------------------


def scuvae_turn(x: Any, scheme: str, args: argparse.Namespace) -> Turn:
    """The epochs of a whole fit by the package's own loop, on a model that may have seen some."""
    settings = _settings(len_of(x), SCHEMES[scheme], args)
    params = {**settings.__dict__, "likelihood": LIKELIHOODS[args.likelihood].name}
    model = build_model(params, x.shape[1], LIKELIHOODS[args.likelihood](x.shape[1]))
    model = model.to(args.device)
    cells = Cells(source_of(x, torch.device(args.device)))
    rows = torch.arange(len(cells), device=args.device)
    posterior = _posterior(model, cells, rows, settings).to(args.device)
    # As tl.fit makes it, where it does so by more than the name of its class.
    optimizer = OPTIMIZERS["adam"](model.parameters(), lr=settings.learning_rate)
    loader = Loader(cells, rows, args.batch_size, torch.Generator().manual_seed(0))

    def turn() -> int:
        epochs = args.epochs or settings.max_epochs
        if scheme == "unamortized":
            posterior.rule.visits[:] = 0  # renewals as in a fit that begins
        train(model, posterior, loader, n_obs=len(cells), optimizer=optimizer, max_epochs=epochs)
        return epochs * -(-len(cells) // args.batch_size)

    return turn


def products_turn(args: argparse.Namespace, n_latent: int = 10, n_hidden: int = 128) -> Turn:
    """The decoder's matrix products and no more: two forward, four backward."""
    b, p = args.batch_size, args.genes

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device)

    z, w0, w1, slope = (
        random(*s) for s in [(b, n_latent), (n_hidden, n_latent), (p, n_hidden), (b, p)]
    )
    h, eta, w0_grad, w1_grad, z_grad, h_grad = (
        random(*s) for s in [(b, n_hidden), (b, p), w0.shape, w1.shape, z.shape, (b, n_hidden)]
    )

    def turn(steps: int = 500) -> int:
        for _ in range(steps):
            torch.mm(z, w0.T, out=h)
            torch.mm(h, w1.T, out=eta)
            torch.mm(slope.T, h, out=w1_grad)
            torch.mm(slope, w1, out=h_grad)
            torch.mm(h_grad.T, z, out=w0_grad)
            torch.mm(h_grad, w0, out=z_grad)
        return steps

    return turn


def scvi_turn(x: Any, args: argparse.Namespace) -> Turn:
    """scvi-tools' module on tensors that are ready: loss, backward pass, Adam as it sets it up."""
    import _scvi
    import scvi

    options = {**_scvi.MODEL, "gene_likelihood": SCVI_NAMES[args.likelihood]}
    module = scvi.module.VAE(x.shape[1], n_batch=1, **options).train().to(args.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
    batches = []
    for start in range(0, min(x.shape[0], 16 * args.batch_size), args.batch_size):
        part = torch.tensor(x[start : start + args.batch_size].toarray(), device=args.device)
        which = torch.zeros(len(part), 1, dtype=torch.long, device=args.device)
        keys = scvi.REGISTRY_KEYS
        batches.append({keys.X_KEY: part, keys.BATCH_KEY: which, keys.LABELS_KEY: which})

    def turn() -> int:
        for tensors in batches:
            _, _, losses = module(tensors, loss_kwargs={"kl_weight": 1.0})
            optimizer.zero_grad()
            losses.loss.backward()
            optimizer.step()
        return len(batches)

    return turn


SCVI_NAMES = {
    "nb": "nb",
    "negative_binomial": "nb",
    "zinb": "zinb",
    "zero_inflated_negative_binomial": "zinb",
    "poisson": "poisson",
    "gaussian": "normal",
}


def scvi_loop(x: Any, args: argparse.Namespace) -> float:
    """Seconds of a step of scvi-tools' ``train``; its first epoch is not counted."""
    from unittest.mock import patch

    import _scvi
    import anndata as ad

    adata = ad.AnnData(x)
    with patch.dict(_scvi.MODEL, gene_likelihood=SCVI_NAMES[args.likelihood]):
        taken = _scvi.seconds_per_epoch(adata, 3, batch_size=args.batch_size, device=args.device)
    return taken / -(-adata.n_obs // args.batch_size)


def _settings(n_obs: int, amortized: bool | str, args: argparse.Namespace) -> Settings:
    """As ``tl.fit`` resolves its defaults, without held-out cells."""
    values: dict[str, Any] = {
        "amortized": amortized,
        "likelihood": args.likelihood,
        "n_latent": 10,
        "n_hidden": 128,
        "n_layers": 1,
        "covariance": None,
        "validation_fraction": 0.0,
        "max_epochs": None,
        "batch_size": args.batch_size,
        "learning_rate": None,
        "optimizer": "adam",
        "local_step": "natural",
        "n_samples": args.n_samples,
        "kl_weight": 1.0,
        "dropout": None,
    }
    return Settings.resolve(n_obs, **values)


def len_of(x: Any) -> int:
    return int(x.shape[0])


# --- the least time that a step can take ----------------------------------------------------------


def least_ms(args: argparse.Namespace, n_nonzeros: float, n_hidden: int = 128) -> float:
    """Of an unamortized step, by the device's own speed in products and copies, measured now.

    Operations: those of the products with the last layer, forward and two backward. Bytes: each
    weight read twice, its gradient written and read, weight and two moments of Adam read and
    written; each nonzero and its gene read. η and what comes of it never need to leave the device's
    caches.
    """
    size, numbers = (2048, 2**25) if args.device == "cpu" else (8192, 2**28)
    a, b, out = (torch.randn(size, size, device=args.device) for _ in range(3))
    long, copied = (torch.empty(numbers, device=args.device) for _ in range(2))

    def seconds(work: Callable[[], Any]) -> float:
        work()
        taken = []
        for _ in range(5):
            before = seconds_now(args.device)
            work()
            taken.append(seconds_now(args.device) - before)
        return statistics.median(taken)

    operations = 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out))
    n_bytes = 8 * len(long) / seconds(lambda: copied.copy_(long))
    weights = n_hidden * args.genes
    times = (
        6 * args.batch_size * weights / operations,
        (4 * 10 * weights + 8 * n_nonzeros) / n_bytes,
    )
    print(
        f"{operations / 1e12:.1f} TFLOP/s, {n_bytes / 1e12:.2f} TB/s: {1e3 * max(times):.4f} ms\n"
    )
    return 1e3 * max(times)


# --- measuring -----------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    x = simulated(args.batches * args.batch_size, args.genes, args.density)
    print(
        f"batch {args.batch_size} × {args.genes} genes, {x.nnz / np.prod(x.shape):.1%} nonzero, "
        f"{args.likelihood}, {args.device}, {args.threads} thread(s)\n"
    )
    turns = {"matrix products": products_turn(args)}
    turns |= {f"scuvae, {scheme}": scuvae_turn(x, scheme, args) for scheme in args.inference}
    if args.compact:
        small = CompactRows.of(x, counts=True)
        print(f"counts take {small.nbytes / x.nnz:.2f} bytes a nonzero, row starts included")
        turns |= {
            f"scuvae, {scheme}, counts in bytes": scuvae_turn(small, scheme, args)
            for scheme in args.inference
        }
    with_scvi = not args.no_scvi and find_spec("scvi") is not None
    if with_scvi:
        turns["scvi-tools, module"] = scvi_turn(x, args)
    torch.set_num_threads(args.threads)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for repetition in range(args.repetitions + 1):
        for name, turn in turns.items():
            before = seconds_now(args.device)
            steps = turn()
            if repetition:  # the first turn warms up
                times[name].append((seconds_now(args.device) - before) / steps)
    if with_scvi:
        times["scvi-tools, loop"] = [scvi_loop(x, args) for _ in range(2)]
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        ms = [1e3 * seconds for seconds in taken]
        rows.append({"contestant": name, "ms": statistics.median(ms), "ms_all": ms})
    by_name = {row["contestant"]: row["ms"] for row in rows}
    least = least_ms(args, x.nnz / args.batches)
    for row in rows:
        for column, other in (
            ("products", "matrix products"),
            ("scvi", "scvi-tools, module"),
            ("loop", "scvi-tools, loop"),
        ):
            if other in by_name:
                row[column] = row["ms"] / by_name[other]
        row["roofline"] = least / row["ms"]
    print_table(rows, COLUMNS)
    return rows


def profile(args: argparse.Namespace) -> None:
    """Where a step's time goes, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    x = simulated(args.batches * args.batch_size, args.genes, args.density)
    for scheme in args.inference:
        turn = scuvae_turn(x, scheme, args)
        turn()
        activities = [ProfilerActivity.CPU]
        if args.device != "cpu":
            activities.append(ProfilerActivity.CUDA)
        with profiler(activities=activities, record_shapes=args.shapes) as found:
            steps = turn()
        averages = found.key_averages(group_by_input_shape=args.shapes)
        taken = attrgetter(f"self_{'cpu' if args.device == 'cpu' else 'device'}_time_total")
        total = sum(map(taken, averages))
        print(f"\n{scheme}: {total / steps / 1e3:.2f} ms a step in operators\n")
        rows = []
        for event in sorted(averages, key=lambda e: -taken(e))[: args.top]:
            name = event.key
            if args.shapes:
                name += " " + str([s for s in event.input_shapes if s])[:60]
            rows.append(
                {
                    "name": name,
                    "ms": taken(event) / steps / 1e3,
                    "share": 100 * taken(event) / total,
                    "calls": event.count / steps,
                }
            )
        columns = {"name": ("operator", ""), "ms": ("ms", ".3f"), "share": ("%", ".1f")}
        print_table(rows, {**columns, "calls": ("calls", ".1f")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--density", type=float, default=0.09, help="share of nonzeros")
    add("--genes", type=int, default=2000)
    add("--batch-size", type=int, default=128)
    add("--batches", type=int, default=32, help="of the simulated data set")
    add("--likelihood", default="nb", choices=list(SCVI_NAMES))
    add("--inference", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    add("--n-samples", type=int, default=1, help="draws of z; scvi-tools takes one")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--epochs", type=int, help="of a turn, in place of those of a default fit")
    add("--repetitions", type=int, default=3, help="turns of each that count")
    add("--compact", action="store_true", help="steps on counts in three bytes too")
    add("--no-scvi", action="store_true")
    add("--profile", action="store_true", help="operators of a step, instead of the table")
    add("--shapes", action="store_true", help="profile by shapes of the operands too")
    add("--top", type=int, default=25, help="operators to show")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.profile:
        profile(args)
        return
    rows = measure(args)
    write_json(
        args.json, {"platform": platform_of(args.device), "arguments": vars(args), "rows": rows}
    )


if __name__ == "__main__":
    main()
