"""A fit between tensors: start, train, finish with a posterior for every cell."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from scuvae._random import go_apart, permutation
from scuvae.batches import Batch, Cells
from scuvae.batches.sparse_rows import dense
from scuvae.batches.spill import release
from scuvae.batches.thinning import with_shallow
from scuvae.distributions.gaussian import Gaussian, concatenate, moments, n_scale_parameters, pack
from scuvae.inference.posteriors import POSTERIORS, Posterior
from scuvae.inference.posteriors.whitened_pca import MOST_CELLS, WhitenedPCA
from scuvae.inference.refinement.initialization import encoded
from scuvae.inference.refinement.refine import LOCAL_STEPS, refine
from scuvae.inference.training.checkpoint import Checkpoint
from scuvae.inference.training.distributed import ALONE, Processes
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.gene_totals import DENOISING_DRAWS, GeneTotals
from scuvae.inference.training.held_out import HeldOutCells
from scuvae.inference.training.level_effects import LevelEffects
from scuvae.inference.training.optimizers import OPTIMIZERS, cosine
from scuvae.inference.training.settings import Settings, scheme_of
from scuvae.model import VAE
from scuvae.model.linear_start import start_decoder
from scuvae.runtime import chunk_on, show_progress

__all__ = ["Start", "bar", "final_posterior", "finish", "start"]

logger = logging.getLogger("scuvae")

# Gives q of training cells to start from: of some row numbers, those and q, a part after another.
Begin = Callable[[torch.Tensor], Iterable[tuple[torch.Tensor, Gaussian]]]

# Cells that the decoder's start is fitted to, and a prior that learns.
_MOST_TO_START = 5000
# Rounds that give genes' totals back, once q is final, and what a gene may be off by before the
# last; and what is said of genes that are off by more after all rounds.
_MOST_ROUNDS, _OFF, _FAR_OFF = 4, 0.02, 0.2
# Steps between two looks at a GPU's losses, for which it has to be waited for.
_LOOK_EVERY = 64
# Cells that a pass over all takes at once where each costs next to nothing.
_AT_ONCE = 8192
# Between two lines about progress where there is no bar.
SECONDS_A_LINE = 15.0


@dataclass(frozen=True)
class Start:
    """What training begins with.

    Attributes
    ----------
    arguments
        Those of :func:`scuvae.inference.training.loop.train`.
    """

    model: VAE
    posterior: Posterior
    cells: Cells
    training: torch.Tensor
    """Row numbers of training cells; those of held-out ones."""
    validation: torch.Tensor
    settings: Settings
    arguments: dict[str, Any]
    processes: Processes = ALONE

    @property
    def n_done(self) -> int:
        """Epochs that an earlier call has done."""
        state = self.arguments.get("state")
        return 0 if state is None else int(state["epoch"])

    @property
    def held_out(self) -> HeldOutCells | None:
        found: HeldOutCells | None = self.arguments["held_out"]
        return found


def start(
    model: VAE,
    cells: Cells,
    held_out: np.ndarray,
    settings: Settings,
    *,
    early_stopping: bool,
    seed: int,
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
    begin: Begin | None = None,
) -> Start:
    """Where cells and decoder start, and how they are trained; ``held_out`` is (cells,), bool.

    ``begin``: the model goes on from what it is, with q of the training cells that this gives.

    What a checkpoint holds already takes the place of all this when training begins. Of several
    processes each has its own cells, and all start where one alone would.
    """
    state = None if checkpoint is None else checkpoint.read()
    if checkpoint is not None and state is not None:
        logger.info("going on after %d epochs of %s", state["epoch"], checkpoint.folder)
    where = next(model.parameters()).device
    training = torch.as_tensor(np.flatnonzero(~held_out), device=where)
    validation = torch.as_tensor(np.flatnonzero(held_out), device=where)
    n_obs = sum(processes.numbers(len(training)))
    posterior = _posterior(model, cells, training, settings, processes, begin).to(where)
    table = posterior.rows()
    # The measured recipe; rmsprop, sgd and gradient steps fit plain networks from a random start.
    measured = settings.measured
    if measured and table is not None and begin is None:
        some = _drawn(training, _MOST_TO_START, processes)
        means = processes.together(table.mean[some])
        start_decoder(model, processes.batch(cells.batch(some)), means)
    processes.alike(*(values for values in model.state_dict().values() if values.numel()))
    precision = None
    if measured and model.likelihood.link != "identity":  # η is no value then: a prior fits all
        precision = model.decoder.output_precision(n_obs)
    judge = None
    if processes.most(len(validation)):
        judge = HeldOutCells(
            cells.loader(validation, chunk_on(where, model.n_vars)),
            covariance=settings.covariance,
            local_step=settings.local_step,
            processes=processes,
        )
    every = max(1, settings.max_epochs // 20)
    order = torch.Generator().manual_seed((seed + processes.rank) % 2**63)
    effects = None
    if precision is not None and model.decoder.linear_path and model.decoder.n_covariates:
        effects = LevelEffects(model, precision)
        precision = effects.precision
    learn = None
    if model.prior.learns or effects is not None:
        some = _drawn(training, _MOST_TO_START, processes)
        few = cells.loader(some, chunk_on(where, model.n_vars))
        share = sum(processes.numbers(len(some))) / n_obs
        learn = _Learnt(model, posterior, few, settings, processes, effects, share, every)
    if processes.several:
        go_apart(processes.rank, where)
    batches = cells.loader(training, processes.share(settings.batch_size), order)
    arguments: dict[str, Any] = {
        "model": model,
        "posterior": posterior,
        "cells": processes.paced(batches),
        "n_obs": n_obs,
        "optimizer": OPTIMIZERS[settings.optimizer](model.parameters(), lr=settings.learning_rate),
        "max_epochs": settings.max_epochs,
        "n_samples": settings.n_samples,
        "kl_weight": settings.kl_weight,
        "output_precision": precision,
        "learning_rate_at": cosine if settings.optimizer == "adam" else lambda progress: 1.0,
        "held_out": judge,
        "evaluate_every": every,
        "early_stopping": EarlyStopping(6 * every) if early_stopping and judge else None,
        "after_epoch": learn,
        "look_every": 1 if where.type == "cpu" else _LOOK_EVERY,
        "reduce_gradients": processes.reduce_gradients if processes.several else None,
        "processes": processes,
    }
    if checkpoint is not None:
        arguments |= {"state": state, "on_step": checkpoint}
    return Start(model, posterior, cells, training, validation, settings, arguments, processes)


@contextmanager
def bar(
    name: str, max_epochs: int, progress: bool | None, n_done: int = 0
) -> Iterator[Callable[[dict[str, float]], None]]:
    """A bar over the epochs, and what to call with the row of each.

    Where there is none for want of a terminal, a line in the log ``scuvae.progress`` now and then.
    """
    hidden = not show_progress(progress)
    lines = hidden and progress is None
    said, epoch = monotonic(), n_done
    with tqdm(total=max_epochs, initial=n_done, desc=name, disable=hidden) as shown:

        def on_epoch(row: dict[str, float]) -> None:
            nonlocal said, epoch
            epoch += 1
            shown.update()
            shown.set_postfix(loss=f"{row['loss']:.1f}")
            if lines and monotonic() - said > SECONDS_A_LINE:
                said = monotonic()
                line = "%s: epoch %d of at most %d, loss %.1f nats per cell"
                logger.getChild("progress").info(line, name, epoch, max_epochs, row["loss"])

        yield on_epoch


def finish(begun: Start) -> dict[str, np.ndarray]:
    """After training every cell's posterior under the final decoder: its moments.

    Of several processes each has those of its own cells.
    """
    model, posterior, cells, settings = begun.model, begun.posterior, begun.cells, begun.settings
    processes = begun.processes
    judge, table = begun.held_out, posterior.rows()
    counts = model.likelihood.support == "counts"
    if model.encoder is not None:
        settling = cells.loader(begun.training, processes.share(settings.batch_size))
        seen = with_shallow if counts else lambda batch: batch
        model.encoder.settle((dense(batch.x), batch.covariates) for batch in map(seen, settling))
        averages = [values for values in model.encoder.buffers() if values.is_floating_point()]
        processes.add(*averages)
        for values in averages:
            values /= processes.size
    if judge is not None and table is not None:
        at = 0
        for q in judge.parts():
            table.store(begun.validation[at : at + len(q.mean)], q)
            at += len(q.mean)
            release()
    if not counts:
        parts = final_posterior(model, posterior, cells, settings)
        return moments(parts, settings.covariance, cells.room)
    # Intercepts move q a little, and q totals: a second round, after q is final, leaves what nobody
    # sees, but of genes that share cells of which they are the most.
    totals = _totals(begun, 2)
    totals.give_back()
    totals = GeneTotals(model, DENOISING_DRAWS)
    parts = final_posterior(model, posterior, cells, settings, totals)
    found = moments(parts, settings.covariance, cells.room)
    processes.add(totals.observed, totals.predicted)
    for _ in range(_MOST_ROUNDS):
        off = totals.off
        totals.give_back()
        if off < _OFF:
            break
        totals = _totals(begun, DENOISING_DRAWS)
    if off > _FAR_OFF:
        logger.warning(
            "a gene's total is off by up to %.0f %%: tl.predictive_check names the worst genes",
            100 * off,
        )
    return found


def _totals(begun: Start, n_samples: int) -> GeneTotals:
    """Genes' totals over the cells of all processes, by the q that there are."""
    totals = GeneTotals(begun.model, n_samples)
    for batch in _everyone(begun.model, begun.cells):
        totals.add(batch, _present(begun.model, begun.posterior, batch, begun.settings)[0])
    begun.processes.add(totals.observed, totals.predicted)
    return totals


def final_posterior(
    model: VAE,
    posterior: Posterior,
    cells: Cells,
    settings: Settings,
    totals: GeneTotals | None = None,
) -> Iterator[Gaussian]:
    """q of every cell under the final decoder, in parts: the encoder's, or refined.

    Each part is added to ``totals``, and put into the table where there is one.
    """
    table = posterior.rows()
    for batch in _everyone(model, cells):
        with torch.no_grad():
            q = _final(model, posterior, batch, settings)
        if table is not None:
            table.store(batch.index, q)
        if totals is not None:
            totals.add(batch, q)
        yield q


def _final(model: VAE, posterior: Posterior, batch: Batch, settings: Settings) -> Gaussian:
    starts = _present(model, posterior, batch, settings)
    if not posterior.refined:
        return starts[0]
    return refine(
        model, batch, starts, local_step=settings.local_step, kl_weight=settings.kl_weight
    )


@torch.no_grad()
def _present(model: VAE, posterior: Posterior, batch: Batch, settings: Settings) -> list[Gaussian]:
    """What is there of a batch's q: its rows, and the encoder's."""
    table = posterior.rows()
    # Of one latent dimension a table cannot tell the families apart.
    found = [] if table is None else [table(model, batch).as_family(settings.covariance)]
    if model.encoder is not None:
        found.append(encoded(model, batch, settings.covariance))
    return found


@dataclass(frozen=True)
class _Learnt:
    """What is learnt from some cells' posteriors, without gradients: called after each epoch."""

    model: VAE
    posterior: Posterior
    cells: Iterable[Batch]
    settings: Settings
    processes: Processes
    effects: LevelEffects | None
    share: float
    """Of all training cells, these are so many; epochs between two looks at offsets."""
    every: int

    def __call__(self, n_epochs: int) -> None:
        self.model.eval()
        if self.model.prior.learns:
            found = [q for _, q in self._present()]
            self.model.prior.refit(self.processes.posterior(concatenate(found)))
            self.processes.alike(*self.model.prior.state_dict().values())
        # At first offsets are those of the decoder's start; each look costs most of a step.
        if self.effects is not None and n_epochs % self.every == 0 and n_epochs > self.every:
            information = self.effects.information(self.model, self._present())
            self.processes.add(information)
            self.effects.update(self.model, information / self.share)
            self.processes.alike(self.effects.precision)

    def _present(self) -> Iterator[tuple[Batch, Gaussian]]:
        for batch in self.cells:
            yield batch, _present(self.model, self.posterior, batch, self.settings)[0]


def _everyone(model: VAE, cells: Cells) -> Iterable[Batch]:
    where = cells.size_factor.device
    return cells.loader(torch.arange(len(cells), device=where), chunk_on(where, model.n_vars))


def _drawn(training: torch.Tensor, most: int, processes: Processes) -> torch.Tensor:
    """Some of all processes' training cells, as one alone draws them: this one's, in order."""
    n_training = processes.numbers(len(training))
    before = sum(n_training[: processes.rank])
    some = permutation(sum(n_training))[:most].sort().values - before
    return training[some[(some >= 0) & (some < len(training))]]


def _posterior(
    model: VAE,
    cells: Cells,
    training: torch.Tensor,
    settings: Settings,
    processes: Processes = ALONE,
    begin: Begin | None = None,
) -> Posterior:
    kind = POSTERIORS[scheme_of(settings.amortized)]
    if not kind.has_rows:
        return kind()
    like = cells.size_factor
    mean = torch.from_numpy(cells.room(settings.n_latent)).to(like.device)
    n_raw = n_scale_parameters(settings.n_latent, settings.covariance)
    raw_of_each = like.new_zeros(1, n_raw)
    if LOCAL_STEPS[settings.local_step].pca_start and begin is None:
        # From random or zero means the decoder needs many epochs to tell the cells apart.
        some = processes.batch(cells.batch(_drawn(training, MOST_CELLS, processes)))
        pca = WhitenedPCA(some, settings.n_latent, inputs=model.likelihood.pca_input())
        processes.alike(pca.basis, pca.centre)
        for batch in cells.loader(training, _AT_ONCE):
            mean[batch.index] = pca(batch)
        diagonal = torch.full((1, settings.n_latent), -1.0)  # a standard deviation of .3
        raw_of_each = _raw_from_diagonal(diagonal, settings.covariance).to(like)
    raw = torch.from_numpy(cells.room(n_raw)).to(like.device)
    for rows in raw.split(_AT_ONCE):
        rows += raw_of_each
        release()
    posterior = kind(
        mean,
        raw,
        local_step=settings.local_step,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
    )
    table = posterior.rows()
    if begin is not None and table is not None:
        for index, q in begin(training):
            table.store(index, q)
    return posterior


def _raw_from_diagonal(raw: torch.Tensor, covariance: str) -> torch.Tensor:
    return pack(torch.diag_embed(raw)) if covariance == "full" else raw
