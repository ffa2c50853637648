"""Fits of several processes: what one gives, each cell once, and all end when one does."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from helpers import small_counts, small_fit, unchanged

from scuvae import tl
from scuvae.inference.training.distributed import own_rows
from scuvae.inference.training.held_out import hold_out

HERE = Path(__file__).parent
N_OBS, N_EPOCHS = 301, 4


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the scenarios of tests/ranks.py left, and what was said; each asserts by itself."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["gradients", "fits", "commands", "kills", "ruined", "apart"]
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), str(folder), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"{name}: as it should be" in done.stdout
    return folder, done.stderr


def read(folder: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"{name}.npz"))


@pytest.mark.parametrize("name", ["two", "four", "told"])
def test_several_processes_fit_as_well_as_one(name: str, played: tuple[Path, str]) -> None:
    """Other draws and nothing else: seeds of one process differ by .02 nats."""
    alone = [read(played[0], f"one{seed}") for seed in range(3)]
    found = read(played[0], name)
    for column in ("validation_elbo", "elbo"):
        values = [each[column][-1] for each in alone]
        assert abs(found[column][-1] - np.mean(values)) < 0.3
    # The same start, hence the same axes: with covariates those of another.
    if name != "told":
        one = alone[0]["X_scuvae"]
        for k in range(2):
            assert np.corrcoef(found["X_scuvae"][:, k], one[:, k])[0, 1] > 0.9


@pytest.mark.parametrize("name", ["two", "four", "told", "amortized", "semi"])
def test_every_cell_has_its_posterior(name: str, played: tuple[Path, str]) -> None:
    """Also those behind the last shard's last batch."""
    found = read(played[0], name)
    assert found["X_scuvae"].shape == (N_OBS, 2)
    for key in ("X_scuvae", "X_scuvae_scale", "X_scuvae_embed"):
        assert np.isfinite(found[key]).all()
        assert found[key].any(1).all()
    # Nobody was left with the prior.
    assert (np.abs(found["X_scuvae_scale"] - 1) > 1e-6).any(1).all()


@pytest.mark.parametrize(("name", "n"), [("two", 2), ("four", 4), ("amortized", 2), ("semi", 3)])
def test_every_training_cell_is_seen_once_an_epoch(
    name: str, n: int, played: tuple[Path, str]
) -> None:
    fraction = 0.0 if name == "semi" else 0.1
    training = np.flatnonzero(~hold_out(N_OBS, fraction))
    steps = [list(read(played[0], f"seen by {rank} in {name}").values()) for rank in range(n)]
    assert len({len(each) for each in steps}) == 1  # all take as many
    per_epoch = len(steps[0]) // N_EPOCHS
    assert per_epoch == -(-len(training) // 40)  # as many as one process takes
    for epoch in range(N_EPOCHS):
        seen = [each[epoch * per_epoch : (epoch + 1) * per_epoch] for each in steps]
        together = np.concatenate([cells for each in seen for cells in each])
        assert np.array_equal(np.sort(together), training)
        of_steps = [sum(len(each[k]) for each in seen) for k in range(per_epoch)]
        # Batches of all processes: 40 cells, rounded up to as many in each.
        assert all(size == -(-40 // n) * n for size in of_steps[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_shards_are_runs_with_as_many_training_cells(size: int, fraction: float) -> None:
    held_out = hold_out(101, fraction)
    rows = [own_rows(held_out, rank, size) for rank in range(size)]
    assert np.array_equal(np.concatenate([np.arange(101)[some] for some in rows]), np.arange(101))
    n_training = [(~held_out[some]).sum() for some in rows]
    assert max(n_training) - min(n_training) <= 1
    with pytest.raises(ValueError, match="102 processes, but"):
        own_rows(held_out, 0, 102)


def test_a_process_that_dies_or_hangs_is_named(played: tuple[Path, str]) -> None:
    """Twice, for SIGKILL and SIGSTOP; both ended, and the next fit was what it would have been."""
    folder, said = played
    assert said.count("LostProcess: process 1 of 2 has ended or hangs") == 2
    whole, parts = (read(folder, name) for name in ("whole", "parts"))
    assert list(whole) == list(parts)
    for key, value in whole.items():
        assert value.tobytes() == parts[key].tobytes(), key


def test_the_first_process_of_a_command_writes(played: tuple[Path, str]) -> None:
    one, two = (anndata.read_h5ad(played[0] / f"output {n}.h5ad") for n in (1, 2))
    assert two.uns["scuvae"]["params"]["processes"] == 2
    tl.score(two, n_samples=2)  # as any other fit
    assert "processes" not in one.uns["scuvae"]["params"]
    assert set(one.obsm) == set(two.obsm)
    elbos = [a.uns["scuvae"]["history"]["validation_elbo"].iloc[-1] for a in (one, two)]
    assert abs(elbos[0] - elbos[1]) < 1


def test_processes_are_not_started_from_within() -> None:
    adata = small_counts()
    with unchanged(adata), pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2") as error:
        small_fit(adata, processes=2)
    assert "this one is alone" in str(error.value)
    assert "notebook" in str(error.value)
    with pytest.raises(ValueError, match="processes=0"):
        tl.fit(adata, processes=0)
    small_fit(adata, processes=1)
    assert "processes" not in adata.uns["scuvae"]["params"]


# Kills itself in its first life, in a step of its own.
SCRIPT = """
import os, signal, sys
from scuvae.cli import main
from scuvae.inference.training import loop

steps, original = 0, loop.Losses.add
def add(*args):
    global steps
    steps += 1
    if steps == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)

loop.Losses.add = add
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_takes_several_files_and_restarts_what_was_killed(
    played: tuple[Path, str], tmp_path: Path
) -> None:
    """The command line, whole, of several files, and killed: the same results."""
    (tmp_path / "script.py").write_text(SCRIPT)
    base = ["--n-latent", "2", "--max-epochs", "3", "--batch-size", "20", "-q"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--standalone", "--max-restarts", "1"]
    whole = played[0] / "input.h5ad"
    adata, parts = anndata.read_h5ad(whole), [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    adata[:100].copy().write_h5ad(parts[0])
    adata[100:].copy().write_h5ad(parts[1])
    outputs = []
    for target, inputs, kept in (
        (["-m", "scuvae"], [whole], []),
        (["-m", "scuvae"], parts, []),
        (["script.py"], [whole], ["--checkpoint", "kept", "--checkpoint-every", "0"]),
    ):
        outputs.append(tmp_path / f"{len(outputs)}.h5ad")
        command = ["fit", *map(str, inputs), "-o", str(outputs[-1]), *base, *kept]
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*run, *target, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "rank: 1" in done.stderr or "local_rank: 1" in done.stderr
    one, *others = map(anndata.read_h5ad, outputs)
    for other in others:
        for key in one.obsm:
            assert np.asarray(one.obsm[key]).tobytes() == np.asarray(other.obsm[key]).tobytes()
