"""Steps ask for no number of a tensor: on a GPU the host would wait for it, and it for the host."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import COUNTS, batch_of, model_of, posterior_of
from torch.utils._python_dispatch import TorchDispatchMode

from scuvae.batches import Batch, sparse_rows, thinning
from scuvae.distributions import precision
from scuvae.inference.training.loop import train
from scuvae.inference.training.optimizers import adam

pytestmark = pytest.mark.usefixtures("fixed_random_state")

# Operators whose result, or its shape, depends on numbers.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}


class Watch(TorchDispatchMode):
    """Says which waiting operators were called while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        masks = [
            index.dtype is torch.bool
            for index in (args[1] if name in ("aten::index", "aten::index_put_") else ())
            if index is not None
        ]
        sizes = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or any(masks) or sizes:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Watched:
    """Batches, watched from the first one on until the last step is done."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.watch, self.n_steps = batches, Watch(), 0

    def __iter__(self) -> Iterator[Batch]:
        with self.watch:
            for batch in self.batches:
                yield batch
                self.n_steps += 1


@pytest.mark.parametrize(
    ("kind", "local_step"),
    [("unamortized", "natural"), ("unamortized", "gradient"), ("amortized", "natural")],
)
@pytest.mark.parametrize("name", COUNTS)
def test_steps_wait_for_nothing(
    name: str, kind: str, local_step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, whose operators are those of a GPU; with renewals of all precisions."""
    monkeypatch.setattr(precision, "at_hand", lambda values: False)
    for module in (sparse_rows, thinning):
        monkeypatch.setattr(module, "at_hand", lambda values: False)
    model = model_of(name, encoder=True, n_covariates=2)
    x = torch.poisson(torch.full((12, model.n_vars), 3.0)).double()
    batches = [
        batch_of(x[rows], index=rows, covariates=torch.eye(2).double()[rows % 2], sparse=True)
        for rows in torch.arange(12).split(4)
    ]
    cells = Watched(batches)
    posterior = posterior_of(kind, 12, 2, "full", local_step=local_step)
    options = {"n_obs": 12, "optimizer": adam(model.parameters()), "max_epochs": 1}
    train(model, posterior, cells, n_samples=2, **options)
    assert cells.n_steps == 3
    assert cells.watch.found == []


def test_a_number_that_is_asked_for_is_seen() -> None:
    with Watch() as watch:
        x = torch.randn(4)
        _ = x[x > 0]
        _ = x.sum().item()
        _ = bool((x > 9).any())
        _ = torch.repeat_interleave(torch.tensor([1, 2]))
        _ = x.nonzero()
    assert len(watch.found) == 5
