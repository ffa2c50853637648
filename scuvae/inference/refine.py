"""Refine: local steps on q until it converges, the decoder frozen.

The one function behind validation, projection of new cells, repair of encoders, the amortization
gap and bridges to models trained elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.inference.local_steps import LOCAL_STEPS, draw, normal_points
from scuvae.inference.objectives import kl_to_prior
from scuvae.inference.starts import likeliest
from scuvae.model import VAE, Batch, gaussian, raw_scale

# A later start has to be better than the first by so many nats.
_TIE = 0.05


@torch.no_grad()
def fixed_elbo(model: VAE, batch: Batch, q: Distribution, n_samples: int | None = None) -> Tensor:
    """Each cell's ELBO over fixed draws, other than those that refinement fits q to, in nats.

    By default there are at least twice as many draws as latent dimensions: their second moment is
    exact.
    """
    z = draw(q, normal_points(n_samples or max(16, 2 * q.mean.shape[-1]), q.mean, seed=1))
    return model.log_likelihood(batch, z).mean(0) - kl_to_prior(q)


def refine(
    model: VAE,
    batch: Batch,
    starts: Sequence[Distribution],
    *,
    local_step: str = "natural",
    **options: Any,
) -> Distribution:
    """q of a batch's cells, refined from each start; the best is kept for each cell.

    Parameters
    ----------
    model
        In evaluation mode; its parameters are not moved.
    starts
        Distributions of one family, over the batch's cells.
    local_step, options
        A name from ``LOCAL_STEPS`` and what that step takes.
    """
    step = LOCAL_STEPS[local_step]
    refined = [step(model, batch, start, **options) for start in starts]
    if len(refined) == 1:
        return refined[0]
    values = torch.stack([fixed_elbo(model, batch, q) for q in refined])
    # Starts that end at one optimum differ by rounding, which must not choose between them.
    values[0] += _TIE
    return select(refined, values.argmax(0))


def select(options: Sequence[Distribution], choice: Tensor) -> Distribution:
    """For each cell the distribution that ``choice``, (cells,), names."""
    cells = torch.arange(len(choice), device=choice.device)
    mean = torch.stack([q.mean for q in options])[choice, cells]
    raw = torch.stack([raw_scale(q) for q in options])[choice, cells]
    return gaussian(mean, raw)


def concatenate(parts: Sequence[Distribution]) -> Distribution:
    """One distribution over the cells of several batches, in order."""
    return gaussian(torch.cat([q.mean for q in parts]), torch.cat([raw_scale(q) for q in parts]))


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


def as_family(q: Distribution, covariance: str) -> Distribution:
    """``q`` as a member of the family: a diagonal one is full too; a full one keeps its margins."""
    if covariance == "full" and not isinstance(q, MultivariateNormal):
        return MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))
    if covariance == "diagonal" and isinstance(q, MultivariateNormal):
        return Independent(Normal(q.mean, q.stddev), 1)
    return q
