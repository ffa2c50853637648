"""Where refinement of a cell starts."""

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian, select
from scuvae.distributions.precision import gaussian_at
from scuvae.inference.refinement.gauss_newton import at
from scuvae.inference.refinement.profile_likelihood import profile_log_likelihood
from scuvae.model import VAE


def prior_start(model: VAE, n_cells: int, covariance: str) -> Gaussian:
    """q of the prior's own mean and covariance for each cell."""
    q = model.prior.gaussian()
    each = Gaussian(q.mean.expand(n_cells, -1), q.factor.expand(n_cells, -1, -1))
    return each.as_family(covariance)


def likeliest_start(model: VAE, batch: Batch, covariance: str) -> Gaussian:
    """The prior's scales around the likeliest of its fixed draws, for each cell.

    Where refinement starts without an encoder: from the prior's mean it takes twice as many steps
    and may end in a worse mode.
    """
    mean = likeliest(model, batch)
    precision = model.prior.precision(at(mean)).expand(*mean.shape, mean.shape[-1])
    return gaussian_at(mean, precision, full=covariance == "full")


# Draws of the prior that a cell may begin at.
_PRIOR_POINTS = 512


@torch.no_grad()
def likeliest(model: VAE, batch: Batch) -> Tensor:
    """For each cell the z that explains it best among fixed draws of the prior, (cells, latent).

    By the profile likelihood and the prior's density. Means of training cells as further points
    gain nothing, and would let a cell's posterior depend on them.
    """
    prior = model.prior
    z = torch.cat([prior.gaussian().mean.unsqueeze(0), prior.points(_PRIOR_POINTS)])
    return z[(profile_log_likelihood(model, batch, z) + prior.log_prob(z)).argmax(1)]


def encoded(model: VAE, batch: Batch, covariance: str) -> Gaussian:
    """The encoder's q, but the prior for cells without counts: nothing was observed of them."""
    q = model.encode(batch).as_family(covariance)
    empty = batch.size_factor <= 0
    if not (model.likelihood.support == "counts" and empty.any()):
        return q
    return select([q, prior_start(model, len(batch), covariance)], empty.long())


def initial_posteriors(model: VAE, batch: Batch, covariance: str) -> list[Gaussian]:
    """Where new cells begin: at the likeliest draw of the prior, and at the encoder's q."""
    found = [likeliest_start(model, batch, covariance)]
    if model.encoder is not None and batch.observed is None:
        found.append(encoded(model, batch, covariance))
    return found


def initial_posterior(model: VAE, batch: Batch, covariance: str) -> Gaussian:
    """Where a cell without a q begins: at the encoder's, or at the likeliest draw of the prior."""
    if model.encoder is None or batch.observed is not None:
        return likeliest_start(model, batch, covariance)
    return encoded(model, batch, covariance)
