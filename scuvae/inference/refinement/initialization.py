"""Where refinement of a cell starts."""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.batches import Batch
from scuvae.distributions.gaussian import as_family, select
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.refinement.profile_likelihood import affinity
from scuvae.model import VAE


def prior_start(model: VAE, n_cells: int, covariance: str) -> Distribution:
    """q = p(z) for each cell."""
    like = next(model.decoder.parameters())
    return _wide(like.new_zeros(n_cells, model.n_latent), covariance)


def likeliest_start(model: VAE, batch: Batch, covariance: str) -> Distribution:
    """The prior's scales around the likeliest of its fixed draws, for each cell.

    Where refinement starts without an encoder: from the prior's mean it takes twice as many steps
    and may end in a worse mode.
    """
    return _wide(likeliest(model, batch), covariance)


def _wide(mean: Tensor, covariance: str) -> Distribution:
    n_cells, n_latent = mean.shape
    if covariance == "full":
        eye = torch.eye(n_latent, dtype=mean.dtype, device=mean.device)
        return MultivariateNormal(mean, scale_tril=eye.expand(n_cells, -1, -1), validate_args=False)
    return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)


# Draws of the prior that a cell may begin at.
_PRIOR_POINTS = 512


@torch.no_grad()
def likeliest(model: VAE, batch: Batch) -> Tensor:
    """For each cell the z that explains it best among fixed draws of the prior, (cells, latent).

    By :func:`scuvae.inference.refinement.profile_likelihood.affinity` and the prior's density.
    Means of training cells as further points gain nothing, and would let a cell's posterior depend
    on them.
    """
    like = next(model.decoder.parameters())
    drawn = normal_points(_PRIOR_POINTS, like.new_empty(model.n_latent)).squeeze(1)
    z = torch.cat([like.new_zeros(1, model.n_latent), drawn])
    return z[(affinity(model, batch, z) - 0.5 * z.square().sum(-1)).argmax(1)]


def encoded(model: VAE, batch: Batch, covariance: str) -> Distribution:
    """The encoder's q, but the prior for cells without counts: nothing was observed of them."""
    q = as_family(model.encode(batch), covariance)
    empty = batch.size_factor <= 0
    if not (model.likelihood.support == "counts" and empty.any()):
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
