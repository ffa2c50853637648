"""Importance weights w = p(x, z) / q(z) of draws from q: what they estimate, and how well.

Everything that is compared is taken over the same draws of noise, and comes with its Monte-Carlo
standard error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.evaluation.pareto import pareto_k
from scuvae.model import VAE

_DRAWS_AT_ONCE = 10


@dataclass(frozen=True)
class Draws:
    """log p(x | z_s) and log w_s for draws of q, (draws, cells) each, float64, and KL, (cells,)."""

    log_likelihood: Tensor
    log_weight: Tensor
    kl: Tensor


@torch.no_grad()
def draw_weights(
    model: VAE, batch: Batch, posteriors: Sequence[Gaussian], n_samples: int
) -> list[Draws]:
    """Draws of each of the posteriors, all from the same noise."""
    like = posteriors[0].mean
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in posteriors]
    for first in range(0, n_samples, _DRAWS_AT_ONCE):
        n = min(_DRAWS_AT_ONCE, n_samples - first)
        noise = normal_like(like, (n,))
        for q, part in zip(posteriors, parts, strict=True):
            z = q.draw(noise)
            log_likelihood = model.log_likelihood(batch, z).double()
            prior = model.prior.log_prob(z.double())
            log_q = q.to(torch.float64).log_prob_of_points(noise.double())
            part.append((log_likelihood, log_likelihood + prior - log_q))
    return [
        Draws(
            torch.cat([log_p for log_p, _ in part]),
            torch.cat([log_w for _, log_w in part]),
            model.prior.kl(q).double(),
        )
        for q, part in zip(posteriors, parts, strict=True)
    ]


def standard_error(terms: Tensor) -> Tensor:
    """Of the mean over the first axis; NaN for a single term."""
    if len(terms) < 2:
        return torch.full_like(terms[0], math.nan)
    return terms.std(0) / math.sqrt(len(terms))


def relative(log_weight: Tensor) -> Tensor:
    """Weights divided by their mean, (draws, cells)."""
    return log_weight.softmax(0) * len(log_weight)


def log_mean(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """ln (1/S) Σ w ≤ log p(x), and its standard error by the delta method, sd(w/w̄)/√S.

    (cells,) each, in nats. The bound rises to log p(x) with the number of draws (Burda, Grosse &
    Salakhutdinov, ICLR 2016).
    """
    bound = log_weight.logsumexp(0) - math.log(len(log_weight))
    return bound, standard_error(relative(log_weight))


def ledger(draws: Draws) -> dict[str, Tensor]:
    """What a posterior is worth to each cell: the columns of :func:`scuvae.tl.score`."""
    reconstruction = draws.log_likelihood.mean(0)
    bound, error = log_mean(draws.log_weight)
    return {
        "elbo": reconstruction - draws.kl,
        "elbo_se": standard_error(draws.log_likelihood),
        "reconstruction": reconstruction,
        "kl": draws.kl,
        "log_evidence": bound,
        "log_evidence_se": error,
        "effective_sample_size": 1 / draws.log_weight.softmax(0).square().sum(0),
        "pareto_k": pareto_k(draws.log_weight),
    }


def gap(better: Draws, worse: Draws) -> tuple[Tensor, Tensor]:
    """By how much one posterior's ELBO exceeds another's, over the same noise, and its error.

    ln w has the ELBO for its mean, and hardly varies where q is close to p(z | x).
    """
    terms = better.log_weight - worse.log_weight
    return terms.mean(0), standard_error(terms)


def gap_to_evidence(bound: Draws, draws: Draws) -> tuple[Tensor, Tensor]:
    """By how much the bound of some draws exceeds the ELBO of others, and the error.

    The error is that of the difference's linear part, w/w̄ − ln w, over the same noise.
    """
    value = log_mean(bound.log_weight)[0] - draws.log_weight.mean(0)
    return value, standard_error(relative(bound.log_weight) - draws.log_weight)
