"""The Poisson log-likelihood of a softmax mean over sparse counts, gradients closed-form.

Σ_g μ_g is ℓ whatever η, so that beyond the softmax only the nonzeros have terms of their own:
log p = Σ_{x>0} (x ln μ − lgamma(x+1)) − ℓ.
"""

from typing import Any

import torch
from torch import Tensor

from scuvae.model.batch import SparseRows
from scuvae.model.negative_binomial import add_rows, at, softmax, through_softmax
from scuvae.model.rising import compiled


def log_prob(x: SparseRows, eta: Tensor, size_factor: Tensor) -> Tensor:
    """log Poisson of each cell's counts in nats, (..., cells), summed over genes.

    ``eta`` is (..., cells, genes); ``size_factor`` ℓ > 0 is (cells,) or (..., cells).
    """
    result: Tensor = _LogProb.apply(eta, size_factor, x)
    return result


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eta: Tensor, size: Tensor, x: SparseRows) -> Tensor:
        keep = any(ctx.needs_input_grad)
        passes = _compiled if compiled(eta) else _dense_passes
        out, *slopes = passes(eta.contiguous(), x, size, keep)
        ctx.save_for_backward(size, *slopes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        size, slope, size_slope = ctx.saved_tensors
        grad_size = None
        if ctx.needs_input_grad[1]:
            grad_size = (grad * size_slope / size).sum_to_size(size.shape)
        return slope * grad.unsqueeze(-1), grad_size, None


def _compiled(eta: Tensor, x: SparseRows, size: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """log p, (..., cells), and with ``keep`` its slopes in η and in ln ℓ: a row at a time."""
    from scuvae.model.kernels import poisson

    constant = torch.lgamma(x.value + 1)
    rows, shape = eta.view(-1, eta.shape[-1]), eta.shape[:-1]
    sizes = size.expand(shape).reshape(-1)
    out, *slopes = poisson(rows, x.starts, x.col, x.value, constant, sizes, keep=keep)
    return out.view(shape), *(slope.view(*shape, *slope.shape[1:]) for slope in slopes)


def _dense_passes(eta: Tensor, x: SparseRows, size: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """The same by torch's operators: on a GPU, or in another precision."""
    pi, log_total = softmax(eta)
    log_mu_at = at(eta, x.flat) + (size.log() - log_total).index_select(-1, x.row)
    terms = log_mu_at.mul_(x.value).sub_(torch.lgamma(x.value + 1))
    out = add_rows((-size).expand_as(log_total), x.row, terms)
    if not keep:
        return (out,)
    slope_at = x.value.expand_as(log_mu_at)
    slope, total = through_softmax(torch.zeros_like(pi), pi, x.flat, slope_at)
    return out, slope, total - size
