"""The training loop, one for every posterior."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.spill import release
from scuvae.inference.posteriors import Posterior
from scuvae.inference.training.checkpoint import HeldOut, Progress
from scuvae.inference.training.cuda_graphs import steps_over
from scuvae.inference.training.distributed import ALONE, Processes
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.history import Losses
from scuvae.inference.training.optimizers import Optimizer
from scuvae.inference.training.step import ReduceGradients, Step
from scuvae.kernels.malloc import keep_freed_memory
from scuvae.model import VAE

# Numbers of a table that is kept with a good state. Of a larger one, of a quarter million cells
# and more, copies would take more memory than all else: its rows stay as the last step left them,
# and are refined in the end all the same.
MOST_KEPT = 2**24


class TrainingError(FloatingPointError):
    """The loss became infinite or NaN. The model and posterior are as after the last good look:
    after the last good epoch, unless ``look_every`` says that fewer are enough.

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
    output_precision: Tensor | None = None,
    learning_rate_at: Callable[[float], float] = lambda progress: 1.0,
    held_out: HeldOut | None = None,
    evaluate_every: int = 1,
    early_stopping: EarlyStopping | None = None,
    after_epoch: Callable[[int], None] | None = None,
    look_every: int = 1,
    reduce_gradients: ReduceGradients | None = None,
    processes: Processes = ALONE,
    state: dict[str, Any] | None = None,
    on_step: Callable[[Callable[[], dict[str, Any]], bool], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict[str, float]]:
    """Fit ``model`` and ``posterior`` to the cells, full batch or in minibatches.

    Parts of the model of which nothing is trained are as in evaluation.

    Parameters
    ----------
    cells
        Its iteration is an epoch: every training cell in one batch.
    n_obs
        Number of training cells n, those of other processes too: the loss of a batch of B cells
        weighs n/B, so that its gradient estimates that of all cells; a cell's own parameters are
        moved by its own loss.
    optimizer
        Over the model's parameters, or some; a posterior's rows have their own. On a GPU steps are
        recorded and replayed where it can do all its part there, as those of ``OPTIMIZERS`` but SGD
        can.
    output_precision
        Precisions of a normal prior of the decoder's last weights, broadcast to these: the loss of
        all cells has its −log density beside it. It is no part of the losses that are reported.
    learning_rate_at
        Factor on the learning rate as a function of progress in [0, 1).
    held_out, evaluate_every, early_stopping
        Cells to judge the decoder by, every so many epochs, and when to stop; the best state
        is restored.
    after_epoch
        Moves what has no gradient, at ends of epochs, after the losses were looked at; called with
        the number of epochs done.
    look_every
        Steps at least between two looks at the losses, at ends of epochs: a look makes a GPU wait.
        ``on_epoch`` is called for every epoch, when it is looked at.
    reduce_gradients
        Called once a step, after the backward pass, with the gradients of all parameters that the
        optimiser has and the number of cells they are from: the one place where those of several
        processes can be averaged, in place. What it returns, if anything, is called before the
        optimiser. Steps are then not recorded.
    processes
        What all of them have to agree on is decided on sums over their cells.
    state
        What an earlier call gave, with the same arguments: training goes on from there.
    on_step
        Called after each step with a function that gives the state of everything that the next
        steps depend on, nested dicts of tensors, by reference, and plain values, and with False;
        and once more at the end, with True.

    Returns
    -------
    One row an epoch: ``loss``, ``elbo``, ``reconstruction``, ``kl``, ``validation_elbo`` in nats
    a cell, each cell judged when its batch was visited.
    """
    keep_freed_memory()
    step = Step(
        model,
        posterior,
        optimizer,
        n_obs=n_obs,
        n_samples=n_samples,
        kl_weight=kl_weight,
        output_precision=output_precision,
        reduce_gradients=reduce_gradients,
    )
    visits, take = steps_over(cells, step)
    losses = Losses(n_obs, kl_weight, processes.first)
    progress = Progress(step, cells, losses, held_out, early_stopping)
    if state is not None:
        progress.load_state_dict(state)
    last_good: dict[str, Any] = {}
    before: dict[str, Any] = {}

    while progress.epoch < max_epochs and not progress.stopped:
        epoch, last_epoch = progress.epoch, progress.epoch == max_epochs - 1
        if not losses.n_steps or not before:  # all that was lost has been looked at
            before = _snapshot(model, posterior)
        step.set_rate(learning_rate_at(epoch / max_epochs))
        _to_training(model)
        for batch, index in visits(progress.begin()):
            try:
                losses.add(take(batch), index)
            except torch.linalg.LinAlgError as error:  # a precision that is no longer positive
                _restore(last_good or before, model, posterior)
                visited = [int(row) for row in index]
                raise TrainingError(math.nan, epoch, progress.batch, visited) from error
            progress.batch += 1
            if on_step is not None:
                on_step(progress.state_dict, False)
        losses.end_epoch()
        progress.end_epoch()

        judge = held_out if (epoch + 1) % evaluate_every == 0 or last_epoch else None
        if losses.n_steps < look_every and judge is None and not last_epoch:
            continue
        last_step = losses.last()
        rows, bad = processes.losses(*losses.read())
        if bad is not None:
            # A last step can ruin what only the next loss shows: a first loss that is no number
            # condemns the state that its steps began with.
            _restore(last_good or before if bad.first else before, model, posterior)
            raise TrainingError(bad.loss, bad.epoch, bad.batch, bad.cells)
        last_good = before
        # The last of the steps has no loss after it that would show what it did.
        if processes.most(not _all_finite(model, posterior)):
            _restore(last_good, model, posterior)
            raise TrainingError(math.nan, *last_step)
        if judge is not None:
            model.eval()
            value = judge.elbo(model)
            if math.isnan(value):
                _restore(last_good, model, posterior)
                raise TrainingError(value, *last_step)
            rows[-1]["validation_elbo"] = value
            if early_stopping is not None:
                progress.stopped = early_stopping.update(
                    epoch, value, lambda: _snapshot(model, posterior)
                )
        if after_epoch is not None:
            after_epoch(epoch + 1)
        progress.history += rows
        for row in rows:
            on_epoch(row)

    if early_stopping is not None and early_stopping.state:
        _restore(early_stopping.state, model, posterior)
    model.eval()
    if on_step is not None:
        on_step(progress.state_dict, True)
    return progress.history


def _to_training(model: VAE) -> None:
    model.train()
    for part in model.children():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


def _all_finite(model: VAE, posterior: Posterior) -> bool:
    tensors = [*model.state_dict().values(), *posterior.state_dict().values()]
    # Extremes are no numbers where any entry is none, and need no room of the table's size.
    ends = []
    for tensor in tensors:
        for part in tensor.flatten().split(MOST_KEPT) if tensor.numel() else ():
            ends.append(torch.stack(torch.aminmax(part)).float())
            if tensor.numel() > MOST_KEPT:
                release()
    return bool(torch.stack(ends).isfinite().all())


def _snapshot(model: VAE, posterior: Posterior) -> dict[str, Any]:
    own = posterior.state_dict()
    # All of it or none: means of one epoch do not go with scales of another.
    if max((tensor.numel() for tensor in own.values()), default=0) > MOST_KEPT:
        own = {}
    return copy.deepcopy({"model": dict(model.state_dict()), "posterior": dict(own)})


def _restore(state: dict[str, Any], model: VAE, posterior: Posterior) -> None:
    model.load_state_dict(state["model"])
    posterior.load_state_dict(state["posterior"], strict=False)
