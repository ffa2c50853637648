"""Recorded steps: what they do with fixed arrays is what steps do. Recording is a GPU's own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse as sp
from small_models import COUNTS, UNIQUE, likelihood_of, model_of, posterior_of
from torch import Tensor

from scuvae.batches import Cells, SparseRows
from scuvae.batches.loader import Loader
from scuvae.batches.sources.in_memory import DenseSource, SparseSource
from scuvae.inference.training import cuda_graphs as replays
from scuvae.inference.training.step import Step

pytestmark = pytest.mark.usefixtures("fixed_random_state")

CPU = torch.device("cpu")


def counts(n_cells: int, n_vars: int, rate: float = 0.6) -> sp.csr_array:
    x = torch.poisson(torch.full((n_cells, n_vars), rate)).double().numpy()
    x[3] = 0  # a cell without counts
    return sp.csr_array(x)


def rows_of(x: sp.csr_array) -> SparseRows:
    arrays = (torch.from_numpy(np.asarray(a, t)) for a, t in ((x.indptr, int), (x.indices, int)))
    return SparseRows(*arrays, torch.from_numpy(x.data), x.shape[1])


@pytest.mark.parametrize("size", [None, 60, 400])
@pytest.mark.parametrize("last", [2, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_entries_of_zero_say_nothing(name: str, last: int, size: int | None) -> None:
    """Rows with as many entries as one likes: values, slopes and weights are those of the rows.

    Float64 takes the operators of a GPU; rows whose last is empty are among them.
    """
    x = counts(8, 20)
    rows = torch.tensor([5, 0, 7, last])
    found = rows_of(x).padded(rows, size)
    dense = torch.from_numpy(x.toarray())[rows]
    exact = SparseRows.from_dense(dense)
    assert len(found.value) == (len(exact.value) if size is None else size)
    assert torch.equal(found.dense, dense)
    assert torch.equal(found.sum(), dense.sum(1))
    likelihood = likelihood_of(name, 20)
    eta = torch.randn(3, 4, 20, dtype=torch.float64)
    results = []
    for block in (found, exact):
        likelihood.zero_grad()
        leaf = eta.clone().requires_grad_()
        value = likelihood.log_prob(block, leaf, dense.sum(1))
        value.sum().backward()
        weights = likelihood.fisher(block, eta, dense.sum(1))
        grads = [parameter.grad for parameter in likelihood.parameters()]
        results.append([value.detach(), leaf.grad, *weights, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums in another order


class Resident(SparseSource):
    """A sparse matrix whose rows are padded, as on a GPU; in float64, which has its operators."""

    def __init__(self, x: sp.csr_array) -> None:
        super().__init__(x, CPU)
        self.matrix = rows_of(x)

    def rows(self, index: Tensor, on_host: Tensor | None = None, size: int | None = None) -> Any:
        return self.matrix.padded(index, size)

    def sizes(self, on_host: Tensor) -> Tensor | None:
        return self.host_lengths[on_host].sort(descending=True).values.cumsum(0)


class Dense(DenseSource):
    """In float64 as well."""

    def __init__(self, x: sp.csr_array) -> None:
        super().__init__(x.toarray(), CPU)
        self.x = self.x.double()


def played_again(
    function: Callable[[], Tensor], pool: Any
) -> tuple[Callable[[], Any], Tensor, Any]:
    """In place of a graph: the function itself, whose arrays are those of the recording."""
    result = torch.full((3,), torch.nan, dtype=torch.float64)
    return lambda: result.copy_(function()), result, pool


# What is recorded: steps of each kind, for batches of 5 and for the last one of 3.
RECORDED = {
    ("unamortized", "natural"): 4,
    ("unamortized", "gradient"): 2,
    ("amortized", "natural"): 2,
    ("semi", "natural"): 0,
}


@pytest.mark.parametrize(("kind", "local_step"), RECORDED)
@pytest.mark.parametrize("name", UNIQUE)
def test_recorded_steps_are_the_steps(
    name: str, kind: str, local_step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 epochs of 23 cells in batches of 5, with renewals of precisions and falling rates."""
    monkeypatch.setattr(replays, "capture", played_again)
    x = counts(23, 12)
    source = Dense(x) if name == "gaussian" else Resident(x)
    fits = []
    for replayed in (False, True):
        torch.manual_seed(1)
        model = model_of(name, encoder=True)
        posterior = posterior_of(kind, 23, 2, "full", local_step=local_step)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        step = Step(model, posterior, optimizer, n_obs=23, n_samples=2, kl_weight=0.5)
        loader = Loader(Cells(source), torch.arange(23), 5, torch.Generator().manual_seed(2))
        recorder = replays.Replays(loader, step)
        visits, take = replays.steps_over(loader, step)
        if replayed:
            visits, take = recorder.visits, recorder.take
        losses = []
        for number in range(25):
            step.set_rate(1 / (1 + number))
            losses += [(take(batch).clone(), cells.tolist()) for batch, cells in visits(0)]
        fits.append((losses, [*model.parameters(), *posterior.buffers()]))
    assert len(recorder.recorded) == RECORDED[kind, local_step]
    for (found, cells), (expected, others) in zip(fits[1][0], fits[0][0], strict=True):
        assert cells == others
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for found, expected in zip(fits[1][1], fits[0][1], strict=True):
        # roundings: sums are taken in another order
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class OnGPU:
    """Batches that claim to be there."""

    device, resident = torch.device("cuda"), True

    def parts(self) -> Any: ...
    def gather(self, index: Tensor, on_host: Tensor | None = None) -> Any: ...
    def __iter__(self) -> Any: ...


def test_what_is_recorded_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("poisson")

    def recorded(cells: Any, optimizer: torch.optim.Optimizer) -> bool:
        posterior = posterior_of("unamortized", 3, 2)
        step = Step(model, posterior, optimizer, n_obs=3, n_samples=1, kl_weight=1.0)
        return replays.steps_over(cells, step)[1] is not step

    rate = torch.tensor(0.1)
    able = torch.optim.Adam(model.parameters(), lr=rate, capturable=True)
    assert recorded(OnGPU(), able)
    assert not recorded([], able)
    assert not recorded(OnGPU(), torch.optim.Adam(model.parameters(), lr=rate))
    assert not recorded(OnGPU(), torch.optim.SGD(model.parameters(), lr=0.1))
    elsewhere = OnGPU()
    elsewhere.resident = False  # the host sends each batch
    assert not recorded(elsewhere, able)
    monkeypatch.setenv("SCUVAE_CUDA_GRAPHS", "0")
    assert not recorded(OnGPU(), able)


def test_a_recording_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> Any:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuses)
    with pytest.raises(RuntimeError, match=r"failed: operation not permitted\. Set .*GRAPHS=0"):
        replays.capture(lambda: torch.zeros(3), None)
