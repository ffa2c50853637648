"""q of cells that a fit has not seen, from nothing but their values and the decoder."""

from typing import Any

from torch.distributions import Distribution

from scuvae.inference.polish import polish
from scuvae.inference.refine import likeliest_start, refine
from scuvae.inference.validation import start
from scuvae.model import VAE, Batch


def infer(
    model: VAE, batch: Batch, covariance: str, *, polished: bool = False, **options: Any
) -> Distribution:
    """Local steps from the likeliest draw of the prior, and from the encoder's q if there is one.

    The better is kept for each cell.

    Parameters
    ----------
    covariance
        The family of q.
    polished
        Whether steps by Stein's precision follow.
    options
        Of :func:`scuvae.inference.refine.refine`.
    """
    starts = [likeliest_start(model, batch, covariance)]
    if model.encoder is not None and batch.observed is None:
        starts.append(start(model, batch, covariance))
    q = refine(model, batch, starts, **options)
    weight = options.get("kl_weight", 1.0)
    return polish(model, batch, q, kl_weight=weight) if polished else q
