"""What inference maximises, and by what it is judged: KL, ELBO, importance-weighted bound."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae.model import VAE, Batch
from scuvae.model.rising import asks_gradient, compiled


def kl_to_prior(q: Distribution) -> Tensor:
    """KL(q ‖ N(0, I)) in nats, a cell: ½ (tr Σ + mᵀm − L − ln |Σ|), (cells,)."""
    mean = q.mean
    if isinstance(q, MultivariateNormal):
        tril = q.scale_tril
        if mean.dim() == 2 and compiled(mean) and not asks_gradient(mean, tril):
            from scuvae.model.gaussian_kernels import kl

            return kl(mean.detach().contiguous(), tril.detach().contiguous())
        trace = tril.square().sum((-2, -1))
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        trace = q.stddev.square().sum(-1)
        log_det = 2 * q.stddev.log().sum(-1)
    return 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1] - log_det)


@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of each cell and its two parts, in nats, (cells,).

    ``draws`` of z are what the reconstruction is a mean over, (cells, latent) or (draws, cells,
    latent); those of a q that asks for no gradient are leaves that ask for their own.
    """

    reconstruction: Tensor
    kl: Tensor
    draws: Tensor

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl


def elbo(model: VAE, batch: Batch, q: Distribution, n_samples: int = 1) -> Elbo:
    """E_q[log p(x | z)] − KL(q ‖ prior), the expectation over ``n_samples`` draws, KL analytic."""
    z = q.rsample((n_samples,)) if n_samples > 1 else q.rsample()
    if torch.is_grad_enabled():
        z.requires_grad_()
    reconstruction = model.log_likelihood(batch, z)
    if n_samples > 1:
        reconstruction = reconstruction.mean(0)
    return Elbo(reconstruction, kl_to_prior(q), z)
