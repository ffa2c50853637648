"""Distillation: an encoder for a decoder that was fitted without one and stays as it is.

The encoder maximises the ELBO of its own q, as in amortized training, but the decoder is finished:
besides the training cells it learns from cells drawn from the decoder at their posteriors, new
ones at every step, which no encoder can overfit, and from some of both thinned to fewer counts.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from scuvae._random import uniform_like
from scuvae.batches import Batch
from scuvae.batches.sparse_rows import dense
from scuvae.batches.thinning import with_shallow
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors import Posterior
from scuvae.inference.posteriors.simulated import simulated
from scuvae.inference.refinement.refine import fixed_elbo
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.loop import train
from scuvae.inference.training.optimizers import cosine
from scuvae.model import VAE
from scuvae.model.vae import frozen

# Share of the steps whose cells are drawn from the decoder: with none of them the gap of held-out
# cells was measured twice as wide.
SIMULATED = 0.8
# Decoupled from Adam's gradient (Loshchilov & Hutter, ICLR 2019); it pays where cells are few.
WEIGHT_DECAY = 0.3


def distil(
    model: VAE,
    stored: Gaussian,
    cells: Iterable[Batch],
    *,
    n_obs: int | None = None,
    held_out: Iterable[Batch] | None,
    learning_rate: float,
    max_epochs: int,
    kl_weight: float = 1.0,
    totals: bool = False,
    share_simulated: float = SIMULATED,
    weight_decay: float = WEIGHT_DECAY,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict[str, float]]:
    """Train ``model.encoder``; all else of the model is in evaluation mode and not moved.

    Parameters
    ----------
    model
        With an encoder, freshly made.
    stored
        Every cell's own q, by ``Batch.index``.
    cells
        Its iteration is an epoch over the training cells.
    n_obs
        How many these are; None: they are counted.
    held_out
        Cells that decide when to stop by the ELBO of the encoder's q; None: no early stopping.
    learning_rate
        Of Adam; it falls to zero along a cosine.
    kl_weight
        That of the fit.
    totals
        Whether a cell's size factor is its total.
    share_simulated, weight_decay
        Share of the steps that take cells drawn from the decoder, and the optimiser's decay.

    Returns
    -------
    One row an epoch, as of :func:`scuvae.inference.training.loop.train`: ``validation_elbo`` is of
    the encoder's q, or −inf where that is no number. The encoder is in evaluation mode, its batch
    norms settled on the training cells.
    """
    encoder = model.encoder
    if encoder is None:
        raise ValueError("model.encoder is None: give the model an encoder to train")
    judge = None if held_out is None else _EncoderJudge(cells, held_out, kl_weight)
    every = max(1, max_epochs // 20)
    with ExitStack() as stack:
        for part in model.children():
            if part is not encoder:
                stack.enter_context(frozen(part))
        history = train(
            model,
            _Teacher(stored, totals, share_simulated),
            cells,
            n_obs=sum(map(len, cells)) if n_obs is None else n_obs,
            optimizer=torch.optim.AdamW(
                encoder.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
            ),
            max_epochs=max_epochs,
            kl_weight=kl_weight,
            learning_rate_at=cosine,
            held_out=judge,
            evaluate_every=every,
            early_stopping=None if judge is None else EarlyStopping(patience=6 * every),
            on_epoch=on_epoch,
        )
    if judge is None:
        _settle(model, cells)
    return history


class _Teacher(Posterior):
    """The encoder's q, of the batch's cells or of ones drawn at these cells' own q."""

    has_encoder = True
    refined = False

    def __init__(self, stored: Gaussian, totals: bool, share_simulated: float) -> None:
        super().__init__()
        self.stored, self.totals, self.share_simulated = stored, totals, share_simulated

    def seen(self, model: VAE, batch: Batch) -> Batch:
        if float(uniform_like(torch.empty(()))) < self.share_simulated:
            batch = simulated(model, batch, self.stored[batch.index], self.totals)
        return _deep_and_shallow(model, batch)

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        return model.encode(batch)


class _EncoderJudge:
    """Held-out cells that judge the encoder by the ELBO of its q, batch norms settled before."""

    def __init__(self, cells: Iterable[Batch], held_out: Iterable[Batch], kl_weight: float) -> None:
        self.cells, self.held_out, self.kl_weight = cells, held_out, kl_weight

    def elbo(self, model: VAE) -> float:
        """In nats a cell, the same draws at every call.

        Never NaN: an encoder whose q is still too wide for the decoder may yet recover.
        """
        _settle(model, self.cells)
        total, n_cells = 0.0, 0
        for batch in self.held_out:
            with torch.no_grad():
                q = model.encode(batch)
            values = fixed_elbo(model, batch, q) + (1 - self.kl_weight) * model.prior.kl(q)
            total += values.sum().item()
            n_cells += len(batch)
        return total / n_cells if math.isfinite(total) else -math.inf

    def state_dict(self) -> dict[str, Any]:
        return {}  # the model has it all

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _settle(model: VAE, cells: Iterable[Batch]) -> None:
    """The encoder in evaluation mode, its batch norms' moments those of the training cells."""
    assert model.encoder is not None
    seen = (_deep_and_shallow(model, batch) for batch in cells)
    model.encoder.settle((dense(batch.x), batch.covariates) for batch in seen)
    model.encoder.eval()


def _deep_and_shallow(model: VAE, batch: Batch) -> Batch:
    return with_shallow(batch) if model.likelihood.support == "counts" else batch
