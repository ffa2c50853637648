"""Autograd of a log-likelihood whose passes say how each logit moves it: with the layer before it.

A likelihood's passes give log p of every row of logits, and the slopes of each in η, in ln ℓ and
in the parameters. Where the logits are the outputs of a linear layer, η = W h + b, that layer is
part of the function: slopes take the place of the logits, and what weighs a cell is applied to its
hidden units instead of to all its genes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.model.batch import SparseRows

Passes = Callable[..., tuple[Tensor | None, ...]]
"""``(eta, x, size, *parameters, keep=, wanted=, spare=)`` → log p, (..., cells), and with ``keep``
its slopes: in η, (..., cells, genes), in ln ℓ, (..., cells), and in each parameter, of the shape of
η; or None for parameters that are not ``wanted``. With ``spare`` nobody else needs η, and the
slopes may overwrite it."""


class Linear(NamedTuple):
    """Logits that are not written out yet: η = ``weight`` h + ``bias``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    def of(self, genes: Tensor) -> "Linear":
        """The logits of some genes, a boolean mask."""
        return Linear(self.hidden, self.weight[genes], self.bias[genes])


def log_prob(
    passes: Passes, x: SparseRows, eta: Tensor | Linear, size: Tensor, *parameters: Tensor
) -> Tensor:
    """log p of each cell's counts, (..., cells), with gradients in all that has them.

    ``parameters`` are (genes,), or of the shape of η; ``size`` is (cells,) or (..., cells).
    """
    layer = eta if isinstance(eta, Linear) else (eta, None, None)
    grad_enabled = torch.is_grad_enabled()
    result: Tensor = _LogProb.apply(passes, x, grad_enabled, size, *layer, *parameters)
    return result


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        x: SparseRows,
        grad_enabled: bool,
        size: Tensor,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        keep = grad_enabled and any(ctx.needs_input_grad)
        eta = hidden if weight is None else F.linear(hidden, weight, bias)
        spare = weight is not None
        wanted = ctx.needs_input_grad[7:]
        out, *slopes = passes(
            eta.contiguous(), x, size, *parameters, keep=keep, wanted=wanted, spare=spare
        )
        assert out is not None
        ctx.of_each = [parameter.dim() > 1 for parameter in parameters]
        ctx.save_for_backward(size, None if weight is None else hidden, weight, *slopes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        size, hidden, weight, slope, size_slope, *parameter_slopes = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        cells, weighed, n_genes = grad.flatten(), grad.unsqueeze(-1), slope.shape[-1]
        rows = slope.view(-1, n_genes)
        grad_size = grad_weight = grad_bias = None
        if needed[0]:
            grad_size = (grad * size_slope / size).sum_to_size(size.shape)
        if weight is None:
            grad_hidden = slope * weighed
        else:
            grad_hidden = (slope @ weight).mul_(weighed)
            if needed[2]:
                grad_weight = rows.T @ (hidden * weighed).view(-1, hidden.shape[-1])
            if needed[3]:
                grad_bias = cells @ rows
        grad_parameters: list[Tensor | None] = [None] * len(parameter_slopes)
        for i, (own, need) in enumerate(zip(parameter_slopes, needed[4:], strict=True)):
            if need:
                each = ctx.of_each[i]
                grad_parameters[i] = own * weighed if each else cells @ own.view(-1, n_genes)
        grads = (grad_size, grad_hidden, grad_weight, grad_bias, *grad_parameters)
        return None, None, None, *grads
