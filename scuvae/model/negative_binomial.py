"""The negative binomial log-likelihood over sparse counts, with closed-form gradients.

log NB(x; μ, θ) = c(x, θ) − lgamma(x+1) + x ln μ − (θ + x) log1p(μ/θ),
c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ.

Most counts are zero, where only −θ log1p(μ/θ) is left: the other terms are computed at the
nonzeros alone. c tends to 0 as θ → ∞ (Poisson), and is computed without the cancellation that the
difference of two lgamma suffers in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.model.batch import SparseRows

# Stirling's series starts this far above θ, where three of its terms reach float32's precision.
_SHIFT = 4


def log_prob(
    x: SparseRows, log_mu: Tensor, log_theta: Tensor, logit_dropout: Tensor | None = None
) -> Tensor:
    """log NB of each cell's counts in nats, zero-inflated where ``logit_dropout`` is given.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    log_mu
        Log means, (..., cells, genes).
    log_theta
        Log inverse dispersions, (genes,).
    logit_dropout
        Log odds of a zero that is no count, (genes,).

    Returns
    -------
    (..., cells), summed over genes.
    """
    result: Tensor = _LogProb.apply(log_mu, log_theta, logit_dropout, x, torch.is_grad_enabled())
    return result


class _LogProb(torch.autograd.Function):
    """Values and gradients in one go: training always needs both."""

    @staticmethod
    def forward(
        ctx: Any,
        log_mu: Tensor,
        log_theta: Tensor,
        logit: Tensor | None,
        x: SparseRows,
        grad_enabled: bool,
    ) -> Tensor:
        log_mu = log_mu.contiguous()  # results take its layout, and are written to when flattened
        theta = log_theta.exp()
        log_ratio = log_mu - log_theta
        log1p_ratio = F.softplus(log_ratio, threshold=30.0)  # log1p(μ/θ)
        share = torch.sigmoid(log_ratio)  # μ/(θ+μ)

        value, row, col, flat = x.value, x.row, x.col, x.flat
        theta_at = theta[col]
        log1p_at = log1p_ratio.flatten(-2)[..., flat]
        share_at = share.flatten(-2)[..., flat]
        log_mu_at = log_mu.flatten(-2)[..., flat]
        c, c_slope = _rising(value, theta_at)
        at_nonzeros = c - torch.lgamma(value + 1) + value * (log_mu_at - log1p_at)

        out = -(log1p_ratio @ theta)
        if logit is not None:
            log_odds_zero = logit + theta * log1p_ratio  # dropout against NB's own zero
            excess = F.softplus(log_odds_zero, threshold=30.0)
            at_nonzeros = at_nonzeros - excess.flatten(-2)[..., flat]
            out = out + excess.sum(-1) - F.softplus(logit).sum()
        out = out.index_add(-1, row, at_nonzeros)

        if grad_enabled and any(ctx.needs_input_grad):
            slope_theta = share - log1p_ratio  # of −θ log1p(μ/θ)
            slope_mu = share * -theta
            if logit is not None:
                kept = torch.sigmoid(-log_odds_zero)
                kept.flatten(-2)[..., flat] = 1.0
                slope_theta.mul_(kept)
                slope_mu.mul_(kept)
                slope_logit = (1 - kept) - torch.sigmoid(logit)
            else:
                slope_logit = None
            slope_mu.flatten(-2)[..., flat] += value * (1 - share_at)
            slope_theta.flatten(-2)[..., flat] += c_slope + value * share_at / theta_at
            ctx.save_for_backward(slope_mu, slope_theta, slope_logit, theta)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope_mu, slope_theta, slope_logit, theta = ctx.saved_tensors
        flat_grad = grad.flatten()
        grad_mu = grad_theta = grad_logit = None
        if ctx.needs_input_grad[0]:
            grad_mu = slope_mu * grad.unsqueeze(-1)
        if ctx.needs_input_grad[1]:
            grad_theta = (flat_grad @ slope_theta.flatten(0, -2)) * theta
        if slope_logit is not None and ctx.needs_input_grad[2]:
            grad_logit = flat_grad @ slope_logit.flatten(0, -2)
        return grad_mu, grad_theta, grad_logit, None, None


def _rising(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ for x > 0, and its derivative in θ.

    lgamma is shifted to θ' = θ + 4 by its recurrence, then taken from Stirling's series S:
    c = −Σ_{i<4} log1p(x/(θ+i)) + (θ'+x−½) log1p(x/θ') − x + S(θ'+x) − S(θ') + x log1p(4/θ).
    """
    upper = theta + _SHIFT
    top = upper + x
    log1p_top = torch.log1p(x / upper)
    s_top, s_top_slope = _stirling(top)
    s_upper, s_upper_slope = _stirling(upper)
    c = (top - 0.5) * log1p_top - x + s_top - s_upper + x * torch.log1p(_SHIFT / theta)
    slope = log1p_top - (top - 0.5) * x / (upper * top) + s_top_slope - s_upper_slope
    slope = slope - x * _SHIFT / (theta * upper)
    for i in range(_SHIFT):
        c = c - torch.log1p(x / (theta + i))
        slope = slope + x / ((theta + i) * (theta + i + x))
    return c, slope


def _stirling(y: Tensor) -> tuple[Tensor, Tensor]:
    """S(y) = 1/(12y) − 1/(360y³) + 1/(1260y⁵) and its derivative."""
    r = y.reciprocal()
    r2 = r * r
    value = r * (1 / 12 - r2 * (1 / 360 - r2 / 1260))
    slope = -r2 * (1 / 12 - r2 * (3 / 360 - r2 * (5 / 1260)))
    return value, slope
