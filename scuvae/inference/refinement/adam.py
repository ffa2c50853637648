"""Adam on the mean and scale of each cell, the decoder frozen."""

import torch

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo
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
