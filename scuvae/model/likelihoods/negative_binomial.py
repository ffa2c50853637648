"""The negative binomial log-likelihood of a softmax mean over sparse counts, gradients closed-form.

log NB(x; μ, θ) = c(x, θ) − lgamma(x+1) + x ln μ − (θ + x) log1p(μ/θ),
c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ,      μ = ℓ softmax(η).

Most counts are zero, where only −θ log1p(μ/θ) is left: the other terms are computed at the
nonzeros alone. Passes over the dense block are what a step pays for: the softmax is part of the
function, and values and slopes come from one softmax and one log1p. On a CPU a compiled kernel
(``kernels/count_likelihoods.py``) makes them in one pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae._random import gamma, poisson
from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.kernels.dispatch import compiled
from scuvae.kernels.slopes import Slopes
from scuvae.model.likelihoods.autograd import Linear, rows_of
from scuvae.model.likelihoods.autograd import log_prob as row_log_prob
from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.link import (
    Genes,
    add_at,
    add_rows,
    at,
    keep_counts,
    softmax,
    through_softmax,
)
from scuvae.model.likelihoods.rising_factorial import log_rising_factorial

# Dispersions below e^-60 act as this one: their dense terms are zero, but must not overflow.
_LEAST_LOG_THETA = -60.0


def log_prob(
    x: SparseRows,
    eta: Tensor | Linear,
    size_factor: Tensor,
    log_theta: Tensor,
    logit_dropout: Tensor | None = None,
) -> Tensor:
    """log NB of each cell's counts in nats, zero-inflated where ``logit_dropout`` is given.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    eta
        Logits of the means' shares, (..., cells, genes), or the linear layer that makes them.
    size_factor
        Expected totals ℓ > 0, (cells,) or (..., cells).
    log_theta
        Log inverse dispersions, (genes,).
    logit_dropout
        Log odds of a zero that is no count, (genes,), or for each cell and draw as ``eta``.

    Returns
    -------
    (..., cells), summed over genes.
    """
    parameters = (log_theta,) if logit_dropout is None else (log_theta, logit_dropout)
    return row_log_prob(passes, x, eta, size_factor, *parameters)


def passes(
    eta: Tensor,
    x: SparseRows,
    size: Tensor,
    weight: Tensor | None,
    log_theta: Tensor,
    logit: Tensor | None = None,
    *,
    keep: bool,
    spare: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Slopes | None]:
    if not compiled(eta):
        return _dense_passes(eta, x, size, log_theta, logit, keep)
    from scuvae.kernels.count_likelihoods import negative_binomial

    n_genes, shape = eta.shape[-1], eta.shape[:-1]
    if logit is not None and logit.dim() > 1:
        logit = logit.reshape(-1, n_genes).contiguous()
    out, slopes = negative_binomial(
        eta.view(-1, n_genes),
        *(x.starts, x.col, x.value),
        *log_rising_factorial(x.value, x.col, log_theta),
        *rows_of(size, weight, shape),
        *(log_theta, logit),
        keep=keep,
        spare=spare,
        wanted=wanted,
    )
    return out.view(shape), slopes and slopes.view(shape)


def _dense_passes(
    eta: Tensor,
    x: SparseRows,
    size: Tensor,
    log_theta: Tensor,
    logit: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Slopes | None]:
    """By torch's operators: on a GPU, or in another precision."""
    theta, inverse = log_theta.exp(), inverse_theta(log_theta)
    pi, log_total = softmax(eta)
    mu = pi * size.unsqueeze(-1)
    ratio = mu * inverse
    log1p_ratio = ratio.log1p()

    # At the nonzeros from logarithms, which survive where π and 1/θ do not.
    value, row, col, flat = x.value, x.row, x.col, x.flat
    log_mu_at = at(eta, flat) + (size.log() - log_total).index_select(-1, row)
    log_ratio_at = log_mu_at - log_theta.index_select(0, col)
    log1p_at = F.softplus(log_ratio_at, threshold=30.0)
    constant, constant_slope = log_rising_factorial(value, col, log_theta)
    at_nonzeros = (log_mu_at - log1p_at).mul_(value).add_(constant)

    out = -(log1p_ratio @ theta)
    kept = None
    if logit is not None:
        log_odds_zero = (log1p_ratio * theta).add_(logit)  # dropout against NB's own zero
        excess = F.softplus(log_odds_zero, threshold=30.0)
        at_nonzeros.addcmul_(at(excess, flat), (value > 0).to(eta), value=-1)
        out = out + excess.sum(-1) - F.softplus(logit).sum(-1)
        kept = keep_counts(torch.sigmoid(log_odds_zero.neg_()), x)
    out = add_rows(out, row, at_nonzeros)
    if not keep:
        return out, None

    slope = mu.div_(ratio.add_(1.0)).neg_()  # of −θ log1p(μ/θ) in ln μ
    theta_slope = (log1p_ratio * theta).add_(slope).neg_()
    if kept is not None:
        slope.mul_(kept)
        theta_slope.mul_(kept)
    share_at = torch.sigmoid(log_ratio_at)  # μ/(θ+μ)
    add_at(theta_slope, flat, value * share_at + constant_slope)
    eta_slope, size_slope = through_softmax(slope, pi, flat, value * (1 - share_at))
    own = [theta_slope]
    if kept is not None and logit is not None:
        own.append(torch.sigmoid(-logit) - kept)
    return out, Slopes(eta_slope, size_slope, None, tuple(own))


def inverse_theta(log_theta: Tensor) -> Tensor:
    """1/θ, (genes,), that times any mean stays finite."""
    return (-log_theta).clamp_max(-_LEAST_LOG_THETA).exp()


class NegativeBinomial(Likelihood):
    """NB with mean μ and variance μ + μ²/θ, θ a gene's inverse dispersion.

    log p = lgamma(x+θ) − lgamma(θ) − lgamma(x+1) + θ ln(θ/(θ+μ)) + x ln(μ/(θ+μ)).
    """

    name = "negative_binomial"
    link = "softmax"
    support = "counts"
    passes = staticmethod(passes)

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        self.log_theta = nn.Parameter(torch.zeros(n_vars))

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return log_prob(sparse(x), eta, size_factor, self.log_theta[genes])

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return mu.div_(1 + mu * inverse_theta(self.log_theta[genes]))

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu * (1 + mu * inverse_theta(self.log_theta[genes]))

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return stabilised_counts(mu, inverse_theta(self.log_theta[genes]))

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return log_zero_probability(mu, self.log_theta[genes]).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return poisson(gamma_means(mu, self.log_theta[genes]))


def stabilised_counts(mu: Tensor, excess: Tensor) -> Tensor:
    """∫ dμ / √(μ (1 + a μ)) = 2 asinh(√(a μ)) / √a for a > 0."""
    root = excess.clamp_min(1e-12).sqrt()  # below, a Poisson's 2 √μ
    return 2 * (mu.sqrt() * root).asinh() / root


def log_zero_probability(mu: Tensor, log_theta: Tensor) -> Tensor:
    """ln NB(0) = −θ ln(1 + μ/θ)."""
    return -log_theta.exp() * (mu * inverse_theta(log_theta)).log1p()


def gamma_means(mu: Tensor, log_theta: Tensor) -> Tensor:
    """Draws of the rate of a negative binomial: gamma with mean μ and shape θ."""
    # Above 1e6 the rate's relative spread is under .001, which counts do not show.
    theta = log_theta.exp().clamp_max(1e6)
    return mu * (gamma(theta.expand_as(mu)) / theta)
