"""What inference maximises, and by what it is judged: KL, ELBO, importance-weighted bound."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import draw, kl_to_prior
from scuvae.kernels.dispatch import asks_gradient, compiled
from scuvae.model import VAE


@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of each cell and its two parts, in nats, (cells,)."""

    reconstruction: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl

    def sums(self, n: int | None = None) -> Tensor:
        """Reconstruction and KL over all cells, or the first n, (2,)."""
        return torch.stack([self.reconstruction, self.kl])[:, :n].sum(1)


def elbo(model: VAE, batch: Batch, q: Distribution, n_samples: int = 1) -> Elbo:
    """E_q[log p(x | z)] − KL(q ‖ prior), the expectation over ``n_samples`` draws, KL analytic."""
    z, kl = _drawn(q, n_samples)
    return Elbo(_mean(model.log_likelihood(batch, z), n_samples), kl)


def descend(
    model: VAE, batch: Batch, q: Distribution, n_samples: int, *, weight: float, kl_weight: float
) -> tuple[Elbo, Tensor]:
    """The ELBO as above, and the backward pass of ``weight`` Σ (β KL − reconstruction).

    Gradients are added to the ``grad`` of all that ask for one: the model's parameters, and what q
    comes from. Returned beside the ELBO is that of the reconstruction's part in the draws of z,
    (cells, latent) or (draws, cells, latent).
    """
    z, kl = _drawn(q, n_samples)
    reconstruction, slope = model.reverse(batch, z.detach(), -weight / n_samples)
    if z.requires_grad:
        torch.autograd.backward([z, kl], [slope, torch.full_like(kl, weight * kl_weight)])
    return Elbo(_mean(reconstruction, n_samples), kl.detach()), slope


def _drawn(q: Distribution, n_samples: int) -> tuple[Tensor, Tensor]:
    """Draws of q, (cells, latent) or (draws, cells, latent), and its KL to the prior."""
    shape = (n_samples,) if n_samples > 1 else ()
    if isinstance(q, MultivariateNormal):
        mean, tril = q.loc, q.scale_tril
        if mean.dim() == 2 and compiled(mean) and not asks_gradient(mean, tril):
            from scuvae.kernels.gaussian import draw as compiled_draw

            points = normal_like(mean, shape)
            return compiled_draw(mean.detach().contiguous(), tril.detach().contiguous(), points)
    return draw(q, normal_like(q.mean, shape)), kl_to_prior(q)


def _mean(values: Tensor, n_samples: int) -> Tensor:
    return values.mean(0) if n_samples > 1 else values
