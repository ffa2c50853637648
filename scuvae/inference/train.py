"""The training loop, one for every posterior."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from scuvae.inference.adam import Optimizer, adam
from scuvae.inference.memory import keep_freed_memory
from scuvae.inference.objectives import descend
from scuvae.inference.posteriors import Posterior
from scuvae.model import VAE, Batch

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


# Steps whose losses lie together: small blocks that outlive a step, one by one between its large
# ones, keep these from being used again, and a long epoch would grow by gigabytes.
_ROWS = 1024


class TrainingError(FloatingPointError):
    """The loss became infinite or NaN. The model and posterior are as after the last good epoch.

    Attributes
    ----------
    epoch, batch
        Where it happened, counted from 0.
    cells
        Row numbers of that batch's cells.
    """

    def __init__(self, loss: float, epoch: int, batch: int, cells: list[int]) -> None:
        self.epoch, self.batch, self.cells = epoch, batch, cells
        shown = ", ".join(map(str, cells[:5])) + (", ..." if len(cells) > 5 else "")
        super().__init__(
            f"the loss is {loss} at epoch {epoch}, batch {batch} (rows {shown}): training stopped "
            "and nothing was written. Lower learning_rate=, or look at these cells' values."
        )


class HeldOut(Protocol):
    """Cells to judge the decoder by."""

    def elbo(self, model: VAE) -> float:
        """Mean ELBO in nats a cell, q optimised with the decoder frozen."""


@dataclass
class EarlyStopping:
    """Stop when the held-out ELBO has not risen by ``min_delta`` nats in ``patience`` epochs."""

    patience: int
    min_delta: float = 0.0
    best: float = -math.inf
    best_epoch: int = -1
    state: dict[str, Any] = field(default_factory=dict)

    def update(self, epoch: int, value: float, state: Callable[[], dict[str, Any]]) -> bool:
        if value > self.best + self.min_delta or self.best_epoch < 0:
            self.best, self.best_epoch, self.state = value, epoch, state()
        return epoch - self.best_epoch >= self.patience


def train(
    model: VAE,
    posterior: Posterior,
    cells: Iterable[Batch],
    *,
    n_obs: int,
    optimizer: Optimizer,
    max_epochs: int,
    n_samples: int = 1,
    kl_weight: float = 1.0,
    learning_rate_at: Callable[[float], float] = lambda progress: 1.0,
    held_out: HeldOut | None = None,
    evaluate_every: int = 1,
    early_stopping: EarlyStopping | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict[str, float]]:
    """Fit ``model`` and ``posterior`` to the cells, full batch or in minibatches.

    Parameters
    ----------
    cells
        Its iteration is an epoch: every training cell in one batch.
    n_obs
        Number of training cells n: the loss of a batch of B cells weighs n/B, so that its
        gradient estimates that of all cells; a cell's own parameters are moved by its own loss.
    optimizer
        Over the model's parameters; a posterior's rows have their own.
    learning_rate_at
        Factor on the learning rate as a function of progress in [0, 1).
    held_out, evaluate_every, early_stopping
        Cells to judge the decoder by, every so many epochs, and when to stop; the best state
        is restored.

    Returns
    -------
    One row an epoch: ``loss``, ``elbo``, ``reconstruction``, ``kl``, ``validation_elbo`` in nats
    a cell, each cell judged when its batch was visited.
    """
    keep_freed_memory()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    base_rates = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, float]] = []
    last_good: dict[str, Any] = {}

    for epoch in range(max_epochs):
        rate = learning_rate_at(epoch / max_epochs)
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * rate
        before = _snapshot(model, posterior)
        model.train()
        visited: list[Tensor] = []
        blocks: list[Tensor] = []

        for batch in cells:
            q = posterior(model, batch, kl_weight)
            weight = n_obs / len(batch)
            for parameter in parameters:  # as zero_grad does, without its hooks
                parameter.grad = None
            terms, slope = descend(model, batch, q, n_samples, weight=weight, kl_weight=kl_weight)
            row_number = len(visited) % _ROWS
            if not row_number:
                blocks.append(terms.kl.new_zeros(3, _ROWS))
            blocks[-1][:2, row_number] = terms.sums()
            extra = posterior.descend(model, batch, weight=weight, kl_weight=kl_weight)
            if extra is not None:
                blocks[-1][2, row_number] = extra
            posterior.step(model, batch, slope, scale=weight, kl_weight=kl_weight, rate=rate)
            optimizer.step()
            visited.append(batch.index)

        # Looked at once an epoch: a look at every batch would make a GPU wait for the host.
        fits, divergences, extras = torch.cat(blocks, 1)[:, : len(visited)].cpu()
        values = kl_weight * divergences - fits + extras
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            # A last step can ruin what only the next loss shows: a first loss that is no number
            # condemns the state that the epoch began with.
            _restore(before if first else last_good or before, model, posterior)
            raise TrainingError(values[first].item(), epoch, first, visited[first].tolist())
        last_good = before
        # The last step of an epoch has no loss after it that would show what it did.
        if not _all_finite(model, posterior):
            _restore(last_good, model, posterior)
            raise TrainingError(math.nan, epoch, len(visited) - 1, visited[-1].tolist())
        fit, divergence = (float(part.double().sum()) / n_obs for part in (fits, divergences))
        row = {
            "loss": kl_weight * divergence - fit,
            "elbo": fit - divergence,
            "reconstruction": fit,
            "kl": divergence,
            "validation_elbo": math.nan,
        }
        last_epoch = epoch == max_epochs - 1
        stop = False
        if held_out is not None and ((epoch + 1) % evaluate_every == 0 or last_epoch):
            model.eval()
            row["validation_elbo"] = held_out.elbo(model)
            if not math.isfinite(row["validation_elbo"]):
                _restore(last_good, model, posterior)
                raise TrainingError(
                    row["validation_elbo"], epoch, len(visited) - 1, visited[-1].tolist()
                )
            if early_stopping is not None:
                stop = early_stopping.update(
                    epoch, row["validation_elbo"], lambda: _snapshot(model, posterior)
                )
        history.append(row)
        on_epoch(row)
        if stop:
            break

    if early_stopping is not None and early_stopping.state:
        _restore(early_stopping.state, model, posterior)
    model.eval()
    return history


def _all_finite(model: VAE, posterior: Posterior) -> bool:
    tensors = [*model.state_dict().values(), *posterior.state_dict().values()]
    # Extremes are no numbers where any entry is none, and need no room of the table's size.
    ends = [torch.stack(torch.aminmax(tensor)).float() for tensor in tensors if tensor.numel()]
    return bool(torch.stack(ends).isfinite().all())


def _snapshot(model: VAE, posterior: Posterior) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "posterior": posterior.state_dict()})


def _restore(state: dict[str, Any], model: VAE, posterior: Posterior) -> None:
    model.load_state_dict(state["model"])
    posterior.load_state_dict(state["posterior"])
