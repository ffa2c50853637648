"""Held-out cells: they judge the decoder by the ELBO of an optimised q."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian, pack, unpack
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.initialization import initial_posterior
from scuvae.inference.refinement.refine import LOCAL_STEPS
from scuvae.inference.training.distributed import ALONE, Processes
from scuvae.model import VAE

# Draws that an evaluation takes of each q.
_DRAWS = 8


def hold_out(n_cells: int, fraction: float) -> np.ndarray:
    """Which cells are held out, drawn once and for all for so many cells.

    Drawn anew by each seed, they were half of what two seeds' maps differ by.
    """
    held_out = np.zeros(n_cells, bool)
    held_out[np.random.default_rng(0).permutation(n_cells)[: int(n_cells * fraction)]] = True
    return held_out


class HeldOutCells:
    """Keeps each cell's q from one evaluation to the next, so that each needs few local steps.

    Parameters
    ----------
    cells
        Batches in a fixed order.
    covariance, local_step
        The family of q, and how it is optimised.
    processes
        Those whose held-out cells judge together; a process may have none.
    """

    def __init__(
        self,
        cells: Iterable[Batch],
        *,
        covariance: str,
        local_step: str,
        processes: Processes = ALONE,
    ) -> None:
        self.cells = cells
        self.processes = processes
        self.covariance = covariance
        self.local_step = local_step
        # Means, and factors without what is zero in them.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def elbo(self, model: VAE) -> float:
        """Mean ELBO in nats a cell, after a few local steps on every q; NaN if it is not finite."""
        local_step = LOCAL_STEPS[self.local_step]
        first = not self._kept
        steps = local_step.held_out[not first]
        total, n_cells = 0.0, 0
        # The same draws at every evaluation, so that evaluations differ by the decoder alone.
        noise = torch.Generator().manual_seed(0)
        for i, batch in enumerate(self.cells):
            q = initial_posterior(model, batch, self.covariance) if first else self._part(i)
            q = local_step.refine(model, batch, q, max_steps=steps)
            self._kept[i : i + 1] = [(q.mean, self._packed(q.factor))]
            points = torch.randn(_DRAWS, *q.mean.shape, generator=noise).to(q.mean)
            with torch.no_grad():
                total += elbo(model, batch, q, points).elbo.sum().item()
            n_cells += len(batch)
        sums = torch.tensor([total, n_cells], dtype=torch.float64)
        self.processes.add(sums)
        total, n_cells = sums.tolist()
        return total / n_cells if math.isfinite(total) else math.nan

    def parts(self) -> Iterator[Gaussian]:
        """q of the held-out cells, a batch after another."""
        return map(self._part, range(len(self._kept)))

    def _part(self, i: int) -> Gaussian:
        mean, factor = self._kept[i]
        return Gaussian(
            mean, unpack(factor, mean.shape[1]) if self.covariance == "full" else factor
        )

    def _packed(self, factor: Tensor) -> Tensor:
        return pack(factor) if self.covariance == "full" else factor

    def state_dict(self) -> dict[str, Any]:
        """Each batch's q, to the last digit."""
        named = enumerate(self.parts())
        return {str(i): {"mean": q.mean, "factor": q.factor} for i, q in named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        parts = (state[str(i)] for i in range(len(state)))
        self._kept = [(part["mean"], self._packed(part["factor"])) for part in parts]
