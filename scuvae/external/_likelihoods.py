"""scvi-tools' likelihoods in the parameters that refinement moves: log p(x | z) and its curvature.

A decoder's output is a :class:`Heads`: log μ of every gene, and where the likelihood has them the
logit of the dropout probability and log θ, any of which may depend on z. Means are taken without
the 1e-8 that scvi-tools adds to them, which matters only where a count meets a smaller mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import dense, sparse


class Heads(NamedTuple):
    """What a decoder says of each gene, (..., cells, genes) each, or their Jacobians.

    ``logit`` is None but for zero inflation. ``log_theta``, the log inverse dispersion (for a
    Gaussian log σ), may have fewer dimensions where it depends on less; as a Jacobian it is None
    where it does not depend on z.
    """

    log_mu: Tensor
    logit: Tensor | None = None
    log_theta: Tensor | None = None


@dataclass(frozen=True)
class CellLikelihood:
    """``log_prob(x, heads)`` in nats, (..., cells), ``fisher(heads)``, ``root(heads, jacobian)``.

    ``fisher`` is the expected Fisher information of log μ, (cells, genes). The root R, (cells,
    latent, outputs), has R Rᵀ = Jᵀ F J with F that of all heads, and J given as (cells, latent,
    genes) for each head.
    """

    log_prob: Callable[[Tensor | SparseRows, Heads], Tensor]
    fisher: Callable[[Heads], Tensor]
    root: Callable[[Heads, Heads], Tensor]


# --- Poisson --------------------------------------------------------------------------------------


def _poisson(x: Tensor | SparseRows, heads: Heads) -> Tensor:
    x = sparse(x)
    at = heads.log_mu.flatten(-2)[..., x.flat]
    terms = x.value * at - torch.lgamma(x.value + 1)
    return (-heads.log_mu.exp().sum(-1)).index_add(-1, x.row, terms)


def _poisson_fisher(heads: Heads) -> Tensor:
    return heads.log_mu.exp()


def _poisson_root(heads: Heads, jacobian: Heads) -> Tensor:
    return jacobian.log_mu * _poisson_fisher(heads).sqrt().unsqueeze(-2)


# --- negative binomial, with zero inflation or without --------------------------------------------


def _negative_binomial(x: Tensor | SparseRows, heads: Heads) -> Tensor:
    log_theta = _theta(heads)
    x = sparse(x)
    log1p_ratio = F.softplus(heads.log_mu - log_theta, threshold=30.0)  # log1p(μ/θ)
    log_zero = -log_theta.exp() * log1p_ratio
    at = log1p_ratio.flatten(-2)[..., x.flat]
    log_mu_at = heads.log_mu.flatten(-2)[..., x.flat]
    log_theta_at = log_theta.expand(*log_theta.shape[:-2], *x.shape).flatten(-2)[..., x.flat]
    terms = _rising(x.value, log_theta_at) + x.value * (log_mu_at - at)
    if heads.logit is None:
        return log_zero.sum(-1).index_add(-1, x.row, terms)
    # Every gene as a zero, ln(π + (1−π) NB(0)) = softplus(log odds) + ln NB(0) − softplus(logit),
    # then the nonzeros put right.
    excess = F.softplus(heads.logit - log_zero, threshold=30.0)
    terms = terms - excess.flatten(-2)[..., x.flat]
    at_zero = excess + log_zero - F.softplus(heads.logit, threshold=30.0)
    return at_zero.sum(-1).index_add(-1, x.row, terms)


def _rising(x: Tensor, log_theta: Tensor) -> Tensor:
    """lgamma(x+θ) − lgamma(θ) − x ln θ − lgamma(x+1) of the nonzeros, in float64: θ may be large.

    With Σ −θ log1p(μ/θ) over all genes and x (ln μ − log1p(μ/θ)) it is log NB.
    """
    wide, x = log_theta.double(), x.double()
    theta = wide.exp()
    out = torch.lgamma(x + theta) - torch.lgamma(theta) - x * wide - torch.lgamma(x + 1)
    return out.to(log_theta.dtype)


class _Information(NamedTuple):
    """Fisher information of log μ, and with zero inflation what else is in its 2 × 2 block."""

    mu: Tensor
    cross: Tensor | None = None
    drop: Tensor | None = None


def _information(heads: Heads) -> _Information:
    """w = μθ/(μ+θ); inflated, the Fisher information of (log μ, logit) is a 2 × 2 block.

    It is the expectation over x of the score's outer product. With s = −θμ/(θ+μ) the score of
    ln NB(0), p₀ = P(x = 0) and r = (1−π) NB(0)/p₀:
    F_μμ = (1−π) w − p₀ r(1−r) s², F_μπ = p₀ r(1−r) s, F_ππ = p₀ (1−r−π)² + (1−p₀) π².
    log θ is orthogonal to log μ; where it depends on z its own information is left out.
    """
    log_theta = _theta(heads)
    theta, odds = log_theta.exp(), heads.log_mu - log_theta
    w = theta * torch.sigmoid(odds)
    if heads.logit is None:
        return _Information(w)
    log_zero = -theta * F.softplus(odds, threshold=30.0)
    r, drop = torch.sigmoid(log_zero - heads.logit), torch.sigmoid(heads.logit)
    p_zero = drop + (1 - drop) * log_zero.exp()
    mixed = p_zero * r * (1 - r)
    f_mu = ((1 - drop) * w - mixed * w.square()).clamp_min(1e-12)
    f_drop = p_zero * (1 - r - drop).square() + (1 - p_zero) * drop.square()
    return _Information(f_mu, -mixed * w, f_drop)


def _negative_binomial_fisher(heads: Heads) -> Tensor:
    return _information(heads).mu


def _negative_binomial_root(heads: Heads, jacobian: Heads) -> Tensor:
    f_mu, cross, f_drop = _information(heads)
    first = f_mu.sqrt()
    if jacobian.logit is None or cross is None or f_drop is None:
        return jacobian.log_mu * first.unsqueeze(-2)
    # The block's Cholesky factor, by hand.
    below = cross / first
    second = (f_drop - below.square()).clamp_min(0).sqrt()
    return torch.cat(
        [
            jacobian.log_mu * first.unsqueeze(-2) + jacobian.logit * below.unsqueeze(-2),
            jacobian.logit * second.unsqueeze(-2),
        ],
        -1,
    )


# --- Gaussian -------------------------------------------------------------------------------------


def _normal(x: Tensor | SparseRows, heads: Heads) -> Tensor:
    log_sigma = _theta(heads)
    z = (dense(x) - heads.log_mu.exp()) * (-log_sigma).exp()
    return (-0.5 * z.square() - log_sigma).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def _normal_fisher(heads: Heads) -> Tensor:
    return (2 * (heads.log_mu - _theta(heads))).exp()


def _normal_root(heads: Heads, jacobian: Heads) -> Tensor:
    """μ²/σ² for log μ and 2 for log σ."""
    root = jacobian.log_mu * _normal_fisher(heads).sqrt().unsqueeze(-2)
    if jacobian.log_theta is None:
        return root
    return torch.cat([root, math.sqrt(2) * jacobian.log_theta], -1)


def _theta(heads: Heads) -> Tensor:
    if heads.log_theta is None:
        raise TypeError("this likelihood needs log θ")
    return heads.log_theta


LIKELIHOODS: dict[str, CellLikelihood] = {
    "poisson": CellLikelihood(_poisson, _poisson_fisher, _poisson_root),
    "nb": CellLikelihood(_negative_binomial, _negative_binomial_fisher, _negative_binomial_root),
    "zinb": CellLikelihood(_negative_binomial, _negative_binomial_fisher, _negative_binomial_root),
    "normal": CellLikelihood(_normal, _normal_fisher, _normal_root),
}
