"""Held-out cells: they judge the decoder by the ELBO of an optimised q."""

from collections.abc import Iterable

import torch

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian, concatenate
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.initialization import start
from scuvae.inference.refinement.refine import refine
from scuvae.model import VAE

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
        self.posterior: list[Gaussian] = []

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
                total += elbo(model, batch, q, points).elbo.sum().item()
            n_cells += len(batch)
        self.posterior = renewed
        return total / n_cells

    def q(self) -> Gaussian:
        """q of all held-out cells, in order."""
        return concatenate(self.posterior)
