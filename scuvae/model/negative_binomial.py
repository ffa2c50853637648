"""The negative binomial log-likelihood of a softmax mean over sparse counts, gradients closed-form.

log NB(x; μ, θ) = c(x, θ) − lgamma(x+1) + x ln μ − (θ + x) log1p(μ/θ),
c(x, θ) = lgamma(x+θ) − lgamma(θ) − x ln θ,      μ = ℓ softmax(η).

Most counts are zero, where only −θ log1p(μ/θ) is left: the other terms are computed at the
nonzeros alone. Dense passes are what a step pays for: the softmax is part of the function, one
softmax and one log1p give values and gradients, all else is multiplied and added in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.model.batch import SparseRows
from scuvae.model.rising import rising

# Dispersions below e^-60 act as this one: their dense terms are zero, but must not overflow.
_LEAST_LOG_THETA = -60.0


def log_prob(
    x: SparseRows,
    eta: Tensor,
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
        Logits of the means' shares, (..., cells, genes).
    size_factor
        Expected totals ℓ > 0, (cells,) or (..., cells).
    log_theta
        Log inverse dispersions, (genes,).
    logit_dropout
        Log odds of a zero that is no count, (genes,).

    Returns
    -------
    (..., cells), summed over genes.
    """
    result: Tensor = _LogProb.apply(
        eta, log_theta, logit_dropout, size_factor, x, torch.is_grad_enabled()
    )
    return result


class _LogProb(torch.autograd.Function):
    """Values, and in the same pass what gradients need: training always needs both."""

    @staticmethod
    def forward(
        ctx: Any,
        eta: Tensor,
        log_theta: Tensor,
        logit: Tensor | None,
        size: Tensor,
        x: SparseRows,
        grad_enabled: bool,
    ) -> Tensor:
        eta = eta.contiguous()  # results take its layout, and are written to when flattened
        theta = log_theta.exp()
        inverse = inverse_theta(log_theta)
        pi, log_total = softmax(eta)
        ratio = (pi * size.unsqueeze(-1)).mul_(inverse)  # μ/θ
        log1p_ratio = ratio.log1p()

        # At the nonzeros from logarithms, which survive where π and 1/θ do not.
        value, row, col, flat = x.value, x.row, x.col, x.flat
        log_mu_at = at(eta, flat) + (size.log() - log_total).index_select(-1, row)
        log_ratio_at = log_mu_at - log_theta.index_select(0, col)
        log1p_at = F.softplus(log_ratio_at, threshold=30.0)
        constant, theta_slope = rising(value, col, theta, inverse)
        at_nonzeros = (log_mu_at - log1p_at).mul_(value).add_(constant)

        out = -(log1p_ratio @ theta)
        kept = None
        if logit is not None:
            log_odds_zero = (log1p_ratio * theta).add_(logit)  # dropout against NB's own zero
            excess = F.softplus(log_odds_zero, threshold=30.0)
            at_nonzeros -= at(excess, flat)
            out = out + excess.sum(-1) - F.softplus(logit).sum()
        out = add_rows(out, row, at_nonzeros)

        if grad_enabled and any(ctx.needs_input_grad):
            if logit is not None:
                kept = torch.sigmoid(log_odds_zero.neg_())
                kept.flatten(-2)[..., flat] = 1.0
            share_at = torch.sigmoid(log_ratio_at)  # μ/(θ+μ)
            scores_at = value * (1 - share_at)
            theta_slope = theta_slope + value * share_at
            rest = ratio.add_(1.0).reciprocal_()  # θ/(θ+μ)
            ctx.save_for_backward(
                pi, rest, log1p_ratio, kept, scores_at, theta_slope, theta, logit, size
            )
            ctx.x = x
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pi, rest, log1p_ratio, kept, scores_at, theta_slope, theta, logit, size = ctx.saved_tensors
        x, n_genes = ctx.x, len(theta)
        grad_at = grad.index_select(-1, x.row)
        slope = (pi * rest).mul_((grad * -size).unsqueeze(-1))  # of −θ log1p(μ/θ) in ln μ
        if kept is not None:
            slope.mul_(kept)
        grad_theta = grad_logit = None
        if ctx.needs_input_grad[1]:
            cells = grad.flatten()
            dense = log1p_ratio if kept is None else log1p_ratio * kept
            per_gene = slope.view(-1, n_genes).sum(0) + theta * (cells @ dense.view(-1, n_genes))
            at_genes = (grad_at * theta_slope).sum_to_size(len(x.col))
            grad_theta = at_genes.new_zeros(n_genes).scatter_add_(0, x.col, at_genes) - per_gene
        if kept is not None and ctx.needs_input_grad[2]:
            grad_logit = grad.sum() * torch.sigmoid(-logit) - grad.flatten() @ kept.view(
                -1, n_genes
            )
        grad_eta, grad_log_size = through_softmax(slope, pi, x, grad_at * scores_at)
        grad_size = None
        if ctx.needs_input_grad[3]:
            grad_size = (grad_log_size / size).sum_to_size(size.shape)
        return grad_eta, grad_theta, grad_logit, grad_size, None, None


def inverse_theta(log_theta: Tensor) -> Tensor:
    """1/θ, (genes,), that times any mean stays finite."""
    return (-log_theta).clamp_max(-_LEAST_LOG_THETA).exp()


def softmax(eta: Tensor) -> tuple[Tensor, Tensor]:
    """π = softmax(η) and logsumexp(η), (..., cells), from one dense exponential."""
    pi = F.softmax(eta, -1)
    return pi, eta.amax(-1) - pi.amax(-1).log()


def at(values: Tensor, flat: Tensor) -> Tensor:
    """``values``, (..., cells, genes), at positions in the flattened block: (..., nonzeros)."""
    return values.flatten(-2).index_select(-1, flat)


def add_rows(out: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """``out``, (..., cells), and the sums of ``values``, (..., nonzeros), of each cell."""
    return out.scatter_add(-1, row.expand_as(values), values)


def through_softmax(
    slope: Tensor, pi: Tensor, x: SparseRows, slope_at: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients in η, (..., cells, genes), and in ln ℓ, (..., cells), of those in ln μ.

    They are given dense and at the nonzeros; ``slope`` is overwritten.
    """
    slope.flatten(-2).scatter_add_(-1, x.flat.expand_as(slope_at), slope_at)
    total = slope.sum(-1, keepdim=True)
    return slope.addcmul_(pi, total, value=-1), total.squeeze(-1)
