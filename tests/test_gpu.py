"""A GPU gives what the CPU gives. Skipped where there is none."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SCHEMES, posterior_of, small_counts
from scipy import sparse as sp
from small_models import COUNTS, likelihood_of

from scuvae import get, tl
from scuvae.batches import Batch, Cells
from scuvae.batches.sources import in_memory as sources
from scuvae.batches.sources.in_memory import SparseSource
from scuvae.inference.posteriors import Posterior
from scuvae.inference.training import cuda_graphs as replays
from scuvae.inference.training.loop import train
from scuvae.model import VAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("fixed_random_state"),
]


@pytest.mark.parametrize("amortized", SCHEMES)
def test_a_fit_on_a_gpu_is_the_fit_on_the_cpu(amortized: bool | str) -> None:
    """Another device draws other numbers: held-out ELBOs agree, within what a seed changes."""
    adata = small_counts(n_obs=400)
    adata.X = sp.csr_matrix(adata.X)
    elbo = {}
    for device in ("cpu", "cuda"):
        fitted = tl.fit(
            adata, amortized=amortized, n_latent=2, max_epochs=40, device=device, copy=True
        )
        elbo[device] = get.history(fitted)["validation_elbo"].max()
        for values in posterior_of(fitted).values():
            assert np.isfinite(values).all()
    # nats a cell; seeds on one device differ by a third of this
    assert elbo["cuda"] == pytest.approx(elbo["cpu"], abs=0.02 * abs(elbo["cpu"]))


class Watched:
    """Batches of an epoch, at none of whose steps the host may wait for the GPU."""

    def __init__(self, cells: Iterable[Batch]) -> None:
        self.cells = cells

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self.cells:
                torch.cuda.set_sync_debug_mode("error")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amortized", [False, True])
def test_steps_do_not_wait(amortized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tests/test_waiting.py, by the operators that steps call."""
    adata = small_counts(n_obs=300)
    adata.X = sp.csr_matrix(adata.X)

    def watched(model: VAE, posterior: Posterior, cells: Iterable[Batch], **options: Any) -> Any:
        return train(model, posterior, Watched(cells), **options)

    monkeypatch.setattr("scuvae.tl._fit.train", watched)
    # Batches of one size, in whole epochs: precisions are then renewed of all cells or of none.
    options: dict[str, Any] = {"max_epochs": 20, "batch_size": 50, "validation_fraction": 0}
    tl.fit(adata, amortized=amortized, n_latent=2, device="cuda", **options)
    assert len(get.history(adata)) == 20


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_replayed_steps_are_the_steps(
    name: str, amortized: bool, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings draw the numbers that the steps would: fits differ by roundings."""
    adata = small_counts(n_obs=230)
    adata.X = sp.csr_matrix(adata.X)
    recorded: list[object] = []
    capture = replays.capture
    monkeypatch.setattr(replays, "capture", lambda *args: recorded.append(args) or capture(*args))
    options: dict[str, Any] = {"max_epochs": 12, "batch_size": 50, "optimizer": optimizer}
    options |= {"learning_rate": 1e-3, "validation_fraction": 0, "device": "cuda"}
    histories = []
    for warm in (2, 10**6):
        monkeypatch.setattr(replays, "WARM", warm)
        fitted = tl.fit(
            adata, likelihood=name, amortized=amortized, n_latent=2, **options, copy=True
        )
        histories.append(get.history(fitted)["elbo"].to_numpy())
    # Batches of 50 and of 30; without an encoder those of epochs 1 and 9 renew precisions.
    assert len(recorded) == (2 if amortized else 3)
    # float32 sums in another order at every step, which steps carry on
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-3)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_values_and_gradients_are_those_of_the_cpu(
    name: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sp.csr_array(torch.poisson(torch.full((30, 50), 0.4)).numpy())
    x.data[0] = 300.0
    likelihood = likelihood_of(name, 50, torch.float32)
    eta = torch.randn(3, 8, 50)
    rows = torch.tensor([5, 0, 29, 7, 8, 1, 2, 11])
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        if device.type == "cuda" and pinned:
            monkeypatch.setattr(sources, "fits", lambda n_bytes, device: False)
        moved = likelihood.to(device)
        moved.zero_grad()
        leaf = eta.to(device, copy=True).requires_grad_()
        batch = Cells(SparseSource(x, device)).batch(rows.to(device), rows)
        value = moved.log_prob(batch.x, leaf, batch.size_factor)
        value.sum().backward()
        parts = [value.detach(), leaf.grad, *(p.grad for p in moved.parameters())]
        found.append([part.cpu().clone() for part in parts])
    for cpu, cuda in zip(*found, strict=True):
        # float32 sums in another order, and Stirling's series in place of the table
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-3)
