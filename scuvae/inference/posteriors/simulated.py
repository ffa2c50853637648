"""Cells drawn from a decoder at posteriors: new ones at every call, which no encoder overfits."""

from dataclasses import replace

import torch

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE


@torch.no_grad()
def simulated(model: VAE, batch: Batch, q: Gaussian, totals: bool = False) -> Batch:
    """As many cells drawn from the decoder at draws of ``q``, of the same sizes and batches.

    With ``totals`` their size factors are their own totals: what a real cell of such counts has.
    """
    eta = model.decoder(q.draw(normal_like(q.mean)), batch.covariates)
    x = model.likelihood_of(batch.covariates).sample(eta, batch.size_factor)
    size_factor = x.sum(1).clamp_min(1) if totals else batch.size_factor
    return replace(batch, x=x, size_factor=size_factor)
