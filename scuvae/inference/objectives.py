"""What inference maximises, and by what it is judged: KL, ELBO, importance-weighted bound."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae.model import VAE, Batch


def kl_to_prior(q: Distribution) -> Tensor:
    """KL(q ‖ N(0, I)) in nats, a cell: ½ (tr Σ + mᵀm − L − ln |Σ|), (cells,)."""
    mean = q.mean
    if isinstance(q, MultivariateNormal):
        tril = q.scale_tril
        trace = tril.square().sum((-2, -1))
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        trace = q.stddev.square().sum(-1)
        log_det = 2 * q.stddev.log().sum(-1)
    return 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1] - log_det)


@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of each cell and its two parts, in nats, (cells,)."""

    reconstruction: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl


def elbo(model: VAE, batch: Batch, q: Distribution, n_samples: int = 1) -> Elbo:
    """E_q[log p(x | z)] − KL(q ‖ prior), the expectation over ``n_samples`` draws, KL analytic."""
    z = q.rsample((n_samples,)) if n_samples > 1 else q.rsample()
    reconstruction = model.log_likelihood(batch, z)
    if n_samples > 1:
        reconstruction = reconstruction.mean(0)
    return Elbo(reconstruction, kl_to_prior(q))


@torch.no_grad()
def log_evidence_bound(
    model: VAE, batch: Batch, q: Distribution, n_samples: int, *, draws_at_once: int = 10
) -> Tensor:
    """The importance-weighted bound ln (1/S) Σ_s p(x, z_s) / q(z_s) ≤ log p(x), (cells,), in nats.

    Rises to log p(x) with the number of draws (Burda, Grosse & Salakhutdinov, ICLR 2016).
    """
    prior = model.prior
    total = None
    for start in range(0, n_samples, draws_at_once):
        z = q.sample((min(draws_at_once, n_samples - start),))
        log_weight = model.log_likelihood(batch, z) + prior.log_prob(z) - q.log_prob(z)
        part = log_weight.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    if total is None:
        raise ValueError(f"n_samples={n_samples}: the bound needs at least one draw")
    return total - math.log(n_samples)
