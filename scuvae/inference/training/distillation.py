"""Distillation: an encoder for a decoder that was fitted without one and stays as it is.

The encoder maximises the ELBO of its own q, as in amortized training, but the decoder is finished:
besides the training cells it learns from cells drawn from the decoder at their posteriors, new
ones at every step, which no encoder can overfit, and from some of both thinned to fewer counts.
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from scuvae._random import uniform_like
from scuvae.batches import Batch
from scuvae.batches.sparse_rows import dense
from scuvae.batches.thinning import with_shallow
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.posteriors.simulated import simulated
from scuvae.inference.refinement.refine import fixed_elbo
from scuvae.inference.training.early_stopping import EarlyStopping
from scuvae.inference.training.loop import TrainingError
from scuvae.model import VAE

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
    held_out: Iterable[Batch] | None,
    learning_rate: float,
    max_epochs: int,
    kl_weight: float = 1.0,
    totals: bool = False,
    share_simulated: float = SIMULATED,
    weight_decay: float = WEIGHT_DECAY,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict[str, float]]:
    """Train ``model.encoder``; decoder and likelihood are in evaluation mode and not moved.

    Parameters
    ----------
    model
        With an encoder, freshly made.
    stored
        Every cell's own q, by ``Batch.index``.
    cells
        Its iteration is an epoch over the training cells.
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
    One row an epoch: ``loss`` and ``validation_elbo``, nats a cell. The encoder is in evaluation
    mode, its batch norms settled on the training cells.
    """
    encoder = model.encoder
    if encoder is None:
        raise ValueError("model.encoder is None: give the model an encoder to train")
    model.eval()
    counts = model.likelihood.support == "counts"
    frozen = [p for part in (model.decoder, model.likelihood) for p in part.parameters()]
    asked = [p.requires_grad for p in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    every = max(1, max_epochs // 20)
    stopping = None if held_out is None else EarlyStopping(patience=6 * every)
    history: list[dict[str, float]] = []

    for epoch in range(max_epochs):
        rate = 0.5 * (1 + math.cos(math.pi * epoch / max_epochs))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        encoder.train()
        losses: list[Tensor] = []
        visited: list[Tensor] = []
        for batch in cells:
            index = batch.index
            if float(uniform_like(torch.empty(()))) < share_simulated:
                batch = simulated(model, batch, stored[index], totals)
            seen = with_shallow(batch) if counts else batch
            terms = elbo(model, seen, model.encode(seen))
            loss = kl_weight * terms.kl - terms.reconstruction
            optimizer.zero_grad(set_to_none=True)
            loss.mean().backward()
            optimizer.step()
            losses.append(loss.detach()[: len(batch)].mean())
            visited.append(index)
        values = torch.stack(losses).cpu()
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            raise TrainingError(values[first].item(), epoch, first, visited[first].tolist())
        row = {"loss": values.double().mean().item(), "validation_elbo": math.nan}
        stop = epoch == max_epochs - 1
        if stop or (stopping is not None and (epoch + 1) % every == 0):
            settling = map(with_shallow, cells) if counts else cells
            encoder.settle(dense(batch.x) for batch in settling)
            encoder.eval()
            if held_out is not None and stopping is not None:
                row["validation_elbo"] = value = _mean_elbo(model, held_out, kl_weight)
                # An encoder whose q is still too wide for the decoder may yet recover.
                value = value if math.isfinite(value) else -math.inf
                stop |= stopping.update(epoch, value, lambda: copy.deepcopy(encoder.state_dict()))
        history.append(row)
        on_epoch(row)
        if stop:
            break

    if stopping is not None:
        encoder.load_state_dict(stopping.state)
    encoder.eval()
    for parameter, wanted in zip(frozen, asked, strict=True):
        parameter.requires_grad_(wanted)
    return history


@torch.no_grad()
def _mean_elbo(model: VAE, cells: Iterable[Batch], kl_weight: float) -> float:
    """Of the encoder's q, the same draws at every call, in nats a cell."""
    total, n_cells = 0.0, 0
    for batch in cells:
        q = model.encode(batch)
        values = fixed_elbo(model, batch, q) + (1 - kl_weight) * model.prior.kl(q)
        total += values.sum().item()
        n_cells += len(batch)
    return total / n_cells
