"""The Poisson log-likelihood of a softmax mean over sparse counts, gradients closed-form.

Σ_g μ_g is ℓ whatever η, so that beyond the softmax only the nonzeros have terms of their own:
log p = Σ_{x>0} (x ln μ − lgamma(x+1)) − ℓ.
"""

from typing import Any

import torch
from torch import Tensor

from scuvae.model.batch import SparseRows
from scuvae.model.negative_binomial import add_rows, at, softmax, through_softmax


def log_prob(x: SparseRows, eta: Tensor, size_factor: Tensor) -> Tensor:
    """log Poisson of each cell's counts in nats, (..., cells), summed over genes.

    ``eta`` is (..., cells, genes); ``size_factor`` ℓ > 0 is (cells,) or (..., cells).
    """
    result: Tensor = _LogProb.apply(eta, size_factor, x)
    return result


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eta: Tensor, size: Tensor, x: SparseRows) -> Tensor:
        eta = eta.contiguous()
        pi, log_total = softmax(eta)
        log_mu_at = at(eta, x.flat) + (size.log() - log_total).index_select(-1, x.row)
        terms = log_mu_at.mul_(x.value).sub_(torch.lgamma(x.value + 1))
        ctx.save_for_backward(pi, size)
        ctx.x = x
        return add_rows((-size).expand_as(log_total), x.row, terms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pi, size = ctx.saved_tensors
        slope_at = grad.index_select(-1, ctx.x.row) * ctx.x.value
        grad_eta, total = through_softmax(torch.zeros_like(pi), pi, ctx.x, slope_at)
        grad_size = None
        if ctx.needs_input_grad[1]:
            grad_size = (total / size - grad).sum_to_size(size.shape)
        return grad_eta, grad_size, None
