"""Processes that fit together, forked from one that has imported all they need.

``python tests/ranks.py FOLDER SCENARIO ...`` plays scenarios of tests/test_distributed.py.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse as sp

from scuvae import tl
from scuvae.batches import Batch
from scuvae.cli import main
from scuvae.distributions.gaussian import n_scale_parameters
from scuvae.inference.posteriors import POSTERIORS, objectives
from scuvae.inference.training import loop
from scuvae.inference.training.distributed import joined
from scuvae.inference.training.step import Step
from scuvae.model.decoder import Decoder
from scuvae.model.likelihoods import LIKELIHOODS
from scuvae.model.vae import VAE

# Seconds after which a process that hangs is given up.
HANGS = "6"
CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"n_latent": 2, "n_hidden": 8, "max_epochs": 4, "batch_size": 40}


def ranks(n: int, work: Callable[[int], Any], timeout: str = "60") -> list[int]:
    """Exit codes of ``n`` processes that do ``work``, each told its number: 0 where it returned."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(n),
                    LOCAL_RANK=str(rank),
                    MASTER_ADDR="localhost",
                    MASTER_PORT=str(port),
                    SCUVAE_TIMEOUT=timeout,
                )
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    while len(codes) < n:
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(child)
            continue
        codes[child] = os.waitstatus_to_exitcode(status)
        if len(codes) + len(stopped) == n:  # as torchrun does
            for other in stopped - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def data(n_obs: int = 301, n_vars: int = 30) -> AnnData:
    """Counts of three kinds of cells, one kind after another, as atlases have them."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(1.0, 1.5, (3, n_vars))
    x = rng.poisson(np.repeat(rate, -(-n_obs // 3), 0)[:n_obs]).astype(np.float32)
    adata = AnnData(sp.csr_matrix(x))
    adata.obs["batch"] = rng.choice(["a", "b"], n_obs)
    adata.obs["depth"] = rng.normal(size=n_obs)
    return adata


def saved(adata: AnnData, path: Path) -> None:
    arrays = {key: np.asarray(value) for key, value in adata.obsm.items()}
    history = adata.uns["scuvae"]["history"]
    arrays |= {name: history[name].to_numpy() for name in history}
    np.savez(path, **arrays)


# --- scenarios ----------------------------------------------------------------------------------


def gradients(folder: Path) -> None:
    """Steps of processes, of which one has no cells, against one step on all of these."""

    def compare(rank: int) -> None:
        for name in ("negative_binomial", "gaussian"):
            for kind in ("unamortized", "amortized"):
                for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                    _compare(rank, name, kind, dtype, tolerance)

    assert ranks(3, compare) == [0, 0, 0]


def _compare(rank: int, name: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    n, cuts = 14, [0, 9, 14, 14]
    x = torch.poisson(torch.full((n, 7), 2.0, dtype=dtype), torch.Generator().manual_seed(0))

    def step_on(rows: slice, reduce_gradients: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        encoder = None
        if kind == "amortized":
            from scuvae.model.encoder import Encoder

            encoder = Encoder(7, 2, n_hidden=5, normalization="layer")
        decoder = Decoder(2, 7, n_hidden=5, n_layers=1)
        model = VAE(decoder, LIKELIHOODS[name](7), encoder).to(dtype)
        noise = torch.randn(n, 2, dtype=dtype)[rows]
        index = torch.arange(len(noise))
        given = torch.randn(n, 2, dtype=dtype)[rows].clone()
        raw = torch.zeros(len(noise), n_scale_parameters(2, "full"), dtype=dtype)
        made = POSTERIORS[kind]
        posterior = made(given, raw) if made.has_rows else made()
        posterior.seen = lambda model, batch: batch  # no thinned cells, which are drawn at random
        objectives.normal_like = lambda like, shape=(): noise  # each cell's draw is its own
        step = Step(
            model,
            posterior,
            torch.optim.SGD(model.parameters(), lr=0.0),
            n_obs=200,
            n_samples=1,
            kl_weight=0.7,
            reduce_gradients=reduce_gradients,
        )
        batch = Batch(x[rows], index, x[rows].sum(1))
        posterior.visit(index)
        step(batch)
        return [parameter.grad for parameter in model.parameters()]

    expected = step_on(slice(0, n), None)
    with joined(3, CPU) as group:
        found = step_on(slice(cuts[rank], cuts[rank + 1]), group.reduce_gradients)
    for one, all_ in zip(found, expected, strict=True):
        assert (one - all_).abs().max() <= tolerance * all_.abs().max()


def fits(folder: Path) -> None:
    """One, two and four processes, in memory and from a file, of every scheme."""
    data().write_h5ad(folder / "data.h5ad")
    for seed in range(3):
        saved(tl.fit(data(), copy=True, rng=seed, **OPTIONS), folder / f"one{seed}.npz")

    def several(rank: int, name: str, n: int, backed: bool, **options: Any) -> None:
        path = folder / "data.h5ad"
        adata = read_h5ad(path, backed="r") if backed else data()
        before = set(adata.obsm) | set(adata.uns) | set(adata.obs)
        seen = _seen()
        tl.fit(adata, **OPTIONS | options)
        np.savez(folder / f"seen by {rank} in {name}.npz", *seen)
        if rank:
            assert set(adata.obsm) | set(adata.uns) | set(adata.obs) == before
            return
        assert adata.uns["scuvae"]["params"]["processes"] == n
        saved(adata, folder / f"{name}.npz")

    told = {"batch_key": "batch", "continuous_covariate_keys": ["depth"]}
    for name, n, backed, options in (
        ("two", 2, False, {}),
        ("told", 2, True, told),
        ("four", 4, False, {}),
        ("amortized", 2, False, {"amortized": True}),
        ("semi", 3, False, {"amortized": "semi", "prior": "mixture", "validation_fraction": 0.0}),
    ):
        codes = ranks(n, lambda rank: several(rank, name, n, backed, **options))  # noqa: B023
        assert codes == [0] * n, name


def _seen() -> list[np.ndarray]:
    """The cells of each step, by their rows among all, and how many steps of an epoch those are."""
    original, seen = loop.Losses.add, []

    def add(self: Any, losses: Any, cells: torch.Tensor) -> None:
        seen.append((cells + self.first).numpy())
        original(self, losses, cells)

    loop.Losses.add = add  # type: ignore[method-assign]
    return seen


def commands(folder: Path) -> None:
    """The command line, one process and two: the first writes."""
    data(120).write_h5ad(folder / "input.h5ad")

    def fit(rank: int, name: str) -> None:
        wanted = ["--n-latent", "2", "--max-epochs", "2", "--processes", name, "-q"]
        output = str(folder / f"output {name}.h5ad")
        assert main(["fit", str(folder / "input.h5ad"), "-o", output, *wanted]) == 0

    for name in ("1", "2"):
        assert ranks(int(name), lambda rank: fit(rank, name)) == [0] * int(name)  # noqa: B023


def kills(folder: Path) -> None:
    """A process that dies in its sixth step, and one that hangs: the other ends, and says whom it
    missed. Made again, the fit is what it would have been."""

    def fit(rank: int, name: str, stop: int | None) -> None:
        kept = {"checkpoint": folder / "kept", "checkpoint_every": 0} if name != "whole" else {}
        if stop and rank == 1:
            _at_step(6, lambda: os.kill(os.getpid(), stop))
        adata = data()
        tl.fit(adata, **OPTIONS, **kept)
        if not rank:
            saved(adata, folder / f"{name}.npz")

    assert ranks(2, lambda rank: fit(rank, "whole", None)) == [0, 0]
    for stop in (signal.SIGKILL, signal.SIGSTOP):
        codes = ranks(2, lambda rank: fit(rank, "parts", stop), timeout=HANGS)  # noqa: B023
        assert codes == [1, -signal.SIGKILL], codes
    assert ranks(2, lambda rank: fit(rank, "parts", None)) == [0, 0]

    def other(rank: int) -> None:
        with pytest.raises(ValueError, match=r"\(processes: 2 there, 3 here\)"):
            fit(rank, "parts", None)

    assert ranks(3, other) == [0, 0, 0]


def _at_step(number: int, what: Callable[[], None]) -> None:
    original, taken = loop.Losses.add, 0

    def add(*args: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == number:
            what()
        original(*args)

    loop.Losses.add = add  # type: ignore[method-assign]


def ruined(folder: Path) -> None:
    """A loss of one process is no number: all end with the same error."""

    def fit(rank: int) -> None:
        if rank == 1:
            original, taken = loop.Step.__call__, 0

            def ruin(self: Any, batch: Batch) -> torch.Tensor:
                nonlocal taken
                taken += 1
                found = original(self, batch)
                return found * float("nan") if taken == 3 else found

            loop.Step.__call__ = ruin  # type: ignore[method-assign]
        with pytest.raises(loop.TrainingError) as caught:
            tl.fit(data(), **OPTIONS)
        assert (caught.value.epoch, caught.value.batch) == (0, 2)
        assert min(caught.value.cells) >= 140  # rows of all cells: it has the second half of these
        (folder / f"{rank}.txt").write_text(str(caught.value))

    assert ranks(2, fit) == [0, 0]
    assert (folder / "0.txt").read_text() == (folder / "1.txt").read_text()


def apart(folder: Path) -> None:
    """Processes that ask for different fits are told so; one may fit alone."""

    def differ(rank: int) -> None:
        with pytest.raises(ValueError, match="n_hidden=8, n_hidden=9"):
            tl.fit(data(), **OPTIONS | {"n_hidden": 8 + rank})

    def alone(rank: int) -> None:
        adata = tl.fit(data(60), copy=True, processes=1, rng=rank, **OPTIONS)
        assert "processes" not in adata.uns["scuvae"]["params"]

    assert ranks(2, differ) == [0, 0]
    assert ranks(2, alone) == [0, 0]


SCENARIOS = {work.__name__: work for work in (gradients, fits, commands, kills, ruined, apart)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    tl.fit(data(60), **OPTIONS)  # compiles once what all need
    for name in sys.argv[2:]:
        SCENARIOS[name](Path(sys.argv[1]))
        sys.stdout.write(f"{name}: as it should be\n")
