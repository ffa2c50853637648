"""q of cells that a fit has not seen, from nothing but their values and the decoder."""

from typing import Any, Literal

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.refinement.initialization import initial_posteriors
from scuvae.inference.refinement.moments import match_moments
from scuvae.inference.refinement.refine import LOCAL_STEPS, refine
from scuvae.inference.refinement.stein import polish as polish_batch
from scuvae.model import VAE

Polish = bool | Literal["moments"]
# What may follow the local steps: nothing, steps by the ELBO's own curvature, and after those the
# moments of p(z | x).
POLISH: tuple[Polish, ...] = (False, True, "moments")
_STEPS = 20


def infer(
    model: VAE, batch: Batch, covariance: str, *, polish: Polish = False, **options: Any
) -> Gaussian:
    """Local steps from the likeliest draw of the prior, and from the encoder's q if there is one.

    The better is kept for each cell.

    Parameters
    ----------
    covariance
        The family of q.
    polish
        One of ``POLISH``. With any, ``max_steps`` bounds the steps of each kind.
    options
        Of :func:`scuvae.inference.refinement.refine.refine`.
    """
    family = family_of(polish, covariance)
    weight = options.get("kl_weight", 1.0)
    most = options.get("max_steps", _STEPS)
    first = LOCAL_STEPS[options.get("local_step", "natural")].before_polish
    if polish and first:
        options = first | options | {"max_steps": min(most, first["max_steps"])}
    q = refine(model, batch, initial_posteriors(model, batch, family), **options)
    if polish:
        q = polish_batch(model, batch, q, max_steps=min(most, _STEPS), kl_weight=weight)
    if polish == "moments":
        q = match_moments(model, batch, q, kl_weight=weight).as_family(covariance)
    return q


def family_of(polish: Polish, covariance: str) -> str:
    """The family that steps are taken in: a posterior's scales are the margins of a full q."""
    return "full" if polish == "moments" else covariance
