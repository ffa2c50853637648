"""Moments of p(z | x) itself, by importance weights from a q that is close.

The q of highest ELBO is narrower than a posterior that is no Gaussian: it would rather miss some of
its mass than reach where there is none. With weights w ∝ p(x, z)/r(z), z ~ r, the Gaussian of the
weighted mean and covariance is the one that minimises KL(p ‖ q) instead: E|C⁻¹ (z − m)|² is L under
p(z | x) whatever its shape. Its ELBO is lower.
"""

import torch

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.model import VAE

# r is a mixture of q with its scales times these: tails that q lacks, and few draws lost in them.
_WIDER = (1.0, 1.3, 2.0)
# A cell keeps its q where so few effective draws for each dimension would say less.
_FEWEST = 3
# Draws that log p is taken of at once.
_AT_ONCE = 16


@torch.no_grad()
def match_moments(
    model: VAE, batch: Batch, q: Gaussian, *, n_samples: int = 256, kl_weight: float = 1.0
) -> Gaussian:
    """q with the posterior's mean and covariance, full as q is.

    Parameters
    ----------
    q
        Close to its optimum. (A diagonal one is too far from correlated posteriors: weight a full
        one, and take its margins.)
    n_samples
        Fixed draws, the same for every cell.
    kl_weight
        β, of p(x | z)^(1/β) p(z).
    """
    q = q.as_family("full")
    kinds = [Gaussian(q.mean, c * q.factor) for c in _WIDER]
    each = -(-n_samples // len(kinds))
    z = torch.cat([k.draw(normal_points(each, q.mean, seed=i)) for i, k in enumerate(kinds)])
    log_p = torch.cat([model.log_likelihood(batch, part) for part in z.split(_AT_ONCE)])
    log_r = torch.stack([kind.log_prob(z) for kind in kinds]).logsumexp(0)
    weight = (log_p / kl_weight + model.prior.log_prob(z) - log_r).softmax(0)
    mean = torch.einsum("sc,scl->cl", weight, z)
    left = (z - mean) * weight.sqrt().unsqueeze(-1)
    covariance = torch.einsum("sck,scl->ckl", left, left)

    size = mean.shape[-1]
    effective = weight.square().sum(0).reciprocal()
    factor, failed = torch.linalg.cholesky_ex(covariance)
    kept = ~((effective > _FEWEST * size) & (failed == 0))
    mean = torch.where(kept[:, None], q.mean, mean)
    factor = torch.where(kept[:, None, None], q.factor, factor)
    return Gaussian(mean, factor)
