"""Held-out cells: they judge the decoder by the ELBO of an optimised q."""

from collections.abc import Iterable

import torch
from torch.distributions import Distribution

from scuvae.inference.local_steps import draw
from scuvae.inference.objectives import kl_to_prior
from scuvae.inference.refine import (
    as_family,
    concatenate,
    likeliest_start,
    prior_start,
    refine,
    select,
)
from scuvae.model import VAE, Batch

# Local steps of the first evaluation, from the encoder or the prior, and of later ones, from the
# last q: it moves little between evaluations.
_STEPS = {"natural": (8, 1), "gradient": (100, 20)}


# Draws that an evaluation takes of each q.
_DRAWS = 8


class HeldOutCells:
    """Keeps each cell's q from one evaluation to the next, so that each needs few local steps.

    Parameters
    ----------
    cells
        Batches in a fixed order.
    covariance, local_step
        The family of q, and how it is optimised.
    """

    def __init__(self, cells: Iterable[Batch], *, covariance: str, local_step: str) -> None:
        self.cells = cells
        self.covariance = covariance
        self.local_step = local_step
        self.posterior: list[Distribution] = []

    def elbo(self, model: VAE) -> float:
        """Mean ELBO in nats a cell, after a few local steps on every q."""
        first, later = _STEPS[self.local_step]
        steps = later if self.posterior else first
        total, n_cells = 0.0, 0
        renewed = []
        # The same draws at every evaluation, so that evaluations differ by the decoder alone.
        noise = torch.Generator().manual_seed(0)
        for i, batch in enumerate(self.cells):
            q = refine(
                model,
                batch,
                [self.posterior[i] if self.posterior else start(model, batch, self.covariance)],
                local_step=self.local_step,
                max_steps=steps,
            )
            renewed.append(q)
            points = torch.randn(_DRAWS, *q.mean.shape, generator=noise).to(q.mean)
            with torch.no_grad():
                expected = model.log_likelihood(batch, draw(q, points)).mean(0)
                total += (expected - kl_to_prior(q)).sum().item()
            n_cells += len(batch)
        self.posterior = renewed
        return total / n_cells

    def q(self) -> Distribution:
        """q of all held-out cells, in order."""
        return concatenate(self.posterior)


def encoded(model: VAE, batch: Batch, covariance: str) -> Distribution:
    """The encoder's q, but the prior for cells without counts: nothing was observed of them."""
    q = as_family(model.encode(batch), covariance)
    empty = batch.size_factor <= 0
    if not (model.likelihood.counts and empty.any()):
        return q
    return select([q, prior_start(model, len(batch), covariance)], empty.long())


def starts(model: VAE, batch: Batch, covariance: str) -> list[Distribution]:
    """Where new cells begin: at the likeliest draw of the prior, and at the encoder's q."""
    found = [likeliest_start(model, batch, covariance)]
    if model.encoder is not None and batch.observed is None:
        found.append(encoded(model, batch, covariance))
    return found


def start(model: VAE, batch: Batch, covariance: str) -> Distribution:
    """Where a cell without a q begins: at the encoder's, or at the likeliest draw of the prior."""
    if model.encoder is None or batch.observed is not None:
        return likeliest_start(model, batch, covariance)
    return encoded(model, batch, covariance)
