"""Refine: local steps on q until it converges, the decoder frozen.

The one function behind validation, projection of new cells, repair of encoders, the amortization
gap and bridges to models trained elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scuvae._errors import near
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian, select
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.adam import Gradient
from scuvae.inference.refinement.local_step import LocalStep
from scuvae.inference.refinement.natural_gradient import NaturalGradient
from scuvae.model import VAE

# A later start has to be better than the first by so many nats.
_TIE = 0.05


@torch.no_grad()
def fixed_elbo(model: VAE, batch: Batch, q: Gaussian, n_samples: int | None = None) -> Tensor:
    """Each cell's ELBO over fixed draws, other than those that refinement fits q to, in nats.

    By default there are at least twice as many draws as latent dimensions: their second moment is
    exact.
    """
    points = normal_points(n_samples or max(16, 2 * q.mean.shape[-1]), q.mean, seed=1)
    return elbo(model, batch, q, points).elbo


def refine(
    model: VAE,
    batch: Batch,
    starts: Sequence[Gaussian],
    *,
    local_step: str = "natural",
    **options: Any,
) -> Gaussian:
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
    step = LOCAL_STEPS[local_step].refine
    refined = [step(model, batch, start, **options) for start in starts]
    if len(refined) == 1:
        return refined[0]
    values = torch.stack([fixed_elbo(model, batch, q) for q in refined])
    # Starts that end at one optimum differ by rounding, which must not choose between them.
    values[0] += _TIE
    return select(refined, values.argmax(0))


# What a diagnosis asks of natural steps, where some more of them do not matter.
THOROUGH = NaturalGradient.thorough


LOCAL_STEPS: dict[str, type[LocalStep]] = {"natural": NaturalGradient, "gradient": Gradient}


def step_options(local_step: str, max_steps: int | None, params: dict[str, Any]) -> dict[str, Any]:
    """Options of :func:`scuvae.inference.refinement.refine.refine` for a fit's cells.

    Natural steps end by themselves once a cell has converged; gradient steps cannot tell, and
    unless told otherwise take as many as they need.
    """
    if local_step not in LOCAL_STEPS:
        raise ValueError(
            f"the fit's local_step={local_step!r} is not registered: set "
            f"scuvae.inference.refinement.refine.LOCAL_STEPS[{local_step!r}] to its class first. "
            f"{near(local_step, LOCAL_STEPS)}"
        )
    steps = LOCAL_STEPS[local_step].options if max_steps is None else {"max_steps": max_steps}
    return {"local_step": local_step, "kl_weight": float(params["kl_weight"]), **steps}
