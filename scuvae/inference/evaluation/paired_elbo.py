"""Two posteriors of the same cells side by side, over the same draws."""

import math

import torch
from torch import Tensor

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo
from scuvae.model import VAE

# Draws that log p is taken of at once.
_AT_ONCE = 8


@torch.no_grad()
def compare(
    model: VAE, batch: Batch, q: Gaussian, encoder: Gaussian, n_draws: int
) -> dict[str, Tensor]:
    """ELBOs of q and of an encoder's q, their difference, and the standard errors of all three.

    Antithetic pairs of draws from torch's random state, independent between pairs and cells, the
    same for both: the error of the difference is that of pairs of differences.

    Parameters
    ----------
    n_draws
        An even number, at least 4.

    Returns
    -------
    ``elbo``, ``elbo_encoder``, ``amortization_gap``, and each with ``_se``: (cells,), in nats.
    """
    sums: dict[str, Tensor] = {}
    n_pairs = n_draws // 2
    for first in range(0, n_pairs, _AT_ONCE // 2):
        half = normal_like(q.mean, (min(_AT_ONCE // 2, n_pairs - first),))
        pairs = {
            name: elbo(model, batch, which, torch.cat([half, -half])).log_likelihood
            for name, which in (("elbo", q), ("elbo_encoder", encoder))
        }
        # float64: a variance of numbers that are large beside their spread.
        pairs = {
            name: values.double().unflatten(0, (2, -1)).mean(0) for name, values in pairs.items()
        }
        pairs["amortization_gap"] = pairs["elbo"] - pairs["elbo_encoder"]
        for name, values in pairs.items():
            sums[name] = sums.get(name, 0) + values.sum(0)
            sums[f"{name}_square"] = sums.get(f"{name}_square", 0) + values.square().sum(0)
    kl, kl_encoder = model.prior.kl(q).double(), model.prior.kl(encoder).double()
    constant = {"elbo": -kl, "elbo_encoder": -kl_encoder, "amortization_gap": kl_encoder - kl}
    out = {}
    for name, shift in constant.items():
        mean = sums[name] / n_pairs
        spread = (sums[f"{name}_square"] / n_pairs - mean.square()).clamp_min(0)
        out[name] = mean + shift
        out[f"{name}_se"] = (spread / (n_pairs - 1)).sqrt() if n_pairs > 1 else mean * math.nan
    return out


def elbo_gain(
    model: VAE,
    batch: Batch,
    q: Gaussian,
    other: Gaussian,
    *,
    n_samples: int = 32,
    kl_weight: float = 1.0,
) -> Tensor:
    """By how much q's ELBO exceeds the other's over the same fixed draws, (cells,), in nats.

    The draws are not those that refinement fits q to.
    """
    points = normal_points(n_samples, q.mean, seed=1)
    ours, theirs = (elbo(model, batch, which, points, at_once=_AT_ONCE) for which in (q, other))
    gain = (ours.log_likelihood - theirs.log_likelihood).mean(0)
    return gain + kl_weight * (theirs.kl - ours.kl)
