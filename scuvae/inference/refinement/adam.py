"""Gradient steps on the mean and scale of each cell; with the decoder frozen by Adam."""

from typing import Any

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.local_step import LocalStep, Table
from scuvae.inference.refinement.row_optimizers import ROW_OPTIMIZERS
from scuvae.model import VAE
from scuvae.model.vae import frozen


def refine_gradient(
    model: VAE,
    batch: Batch,
    q: Gaussian,
    *,
    max_steps: int = 200,
    n_samples: int = 4,
    kl_weight: float = 1.0,
    learning_rate: float = 0.1,
) -> Gaussian:
    """Adam on each cell's mean and scale over fixed draws, its rate falling to zero."""
    mean = q.mean.detach().clone().requires_grad_()
    raw = q.raw.detach().clone().requires_grad_()
    # A short memory of squared gradients: the first are orders of magnitude larger than the last.
    optimizer = torch.optim.Adam([mean, raw], lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    with torch.enable_grad(), frozen(model):
        for step in range(max_steps):
            # New points at each step, the same for every cell: few fixed ones bias the scales.
            points = normal_points(n_samples, mean, seed=step)
            terms = elbo(model, batch, Gaussian.of(mean, raw), points)
            loss = (kl_weight * terms.kl - terms.reconstruction).sum()
            # Of q alone: the decoder's own gradients are neither needed nor touched.
            mean.grad, raw.grad = torch.autograd.grad(loss, [mean, raw])
            optimizer.step()
            schedule.step()
    return Gaussian.of(mean.detach(), raw.detach())


class Gradient(LocalStep):
    """Rows move by a row optimiser, as in the plain algorithm."""

    pca_start = False
    held_out = (100, 20)
    through_q = True
    refine = staticmethod(refine_gradient)

    # Row optimisers move their rows as the networks' optimiser moves weights, by the same schedule.
    def __init__(self, table: Table, optimizer: str, learning_rate: float) -> None:
        super().__init__(table, optimizer, learning_rate)
        make = ROW_OPTIMIZERS[optimizer]
        self.optimizers = {
            "mean": make(table.mean, learning_rate),
            "raw": make(table.raw, learning_rate),
        }

    def visit(self, on_host: Tensor) -> str | None:
        return "gradient"

    def step(
        self,
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        *,
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None:
        for (name, own), gradient in zip(self.optimizers.items(), gradients, strict=True):
            own.step(getattr(self.table, name), batch.index, gradient / scale, rate)

    def state_dict(self) -> dict[str, Any]:
        return {name: own.state_dict() for name, own in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in self.optimizers.items():
            own.load_state_dict(state[name])
