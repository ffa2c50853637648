"""Autograd of a log-likelihood whose passes say how each logit moves it: with the layer before it.

A likelihood's passes give log p of every row of logits, and the slopes of each in η, in ln ℓ and
in the parameters. Where the logits are the outputs of a linear layer, η = W h + b, that layer is
part of the function: slopes take the place of the logits, and what weighs a cell is applied to its
hidden units instead of to all its genes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import SparseRows
from scuvae.kernels.slopes import Slopes

Passes = Callable[..., "tuple[Tensor, Slopes | None]"]
"""``(eta, x, size, weight, *parameters, keep=, spare=, wanted=)`` → log p, (..., cells), and with
``keep`` its slopes. With ``spare`` nobody else needs η, and slopes may overwrite it. ``wanted`` or
not are the sum of the slopes in η and those in each parameter; in sums a row counts by its
``weight``, (..., cells), or as one."""


def rows_of(size: Tensor, weight: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Size factors and weights, one for every row of logits of so many draws and cells."""
    sizes = size.expand(shape).reshape(-1)
    return sizes, torch.ones_like(sizes) if weight is None else weight.reshape(-1)


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


def reverse(
    passes: Passes,
    x: SparseRows,
    layer: Linear,
    size: Tensor,
    factor: float,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """log p as above, and ``factor`` times its slopes in what is hidden, without autograd.

    ``factor`` times those of the sum over all rows in the layer and the parameters, (genes,) each,
    are added to their ``grad``.
    """
    hidden, weight, bias = layer
    eta = F.linear(hidden, weight, bias)
    wanted = [parameter.requires_grad for parameter in (bias, *parameters)]
    out, slopes = passes(eta, x, size, None, *parameters, keep=True, spare=True, wanted=wanted)
    assert slopes is not None
    rows = slopes.eta.flatten(0, -2)
    if weight.requires_grad:
        accumulate(weight, rows.T @ (hidden.flatten(0, -2) * factor))
    of_bias = rows if slopes.eta_sum is None else slopes.eta_sum
    for parameter, part in zip((bias, *parameters), (of_bias, *slopes.parameters), strict=True):
        if part is not None and parameter.requires_grad:
            accumulate(parameter, (part if _is_sum(part) else part.flatten(0, -2).sum(0)) * factor)
    return out, (slopes.eta @ weight).mul_(factor)


def accumulate(parameter: Tensor, slopes: Tensor) -> None:
    """Add to a parameter's gradient, as autograd does."""
    if parameter.requires_grad:
        parameter.grad = slopes if parameter.grad is None else parameter.grad + slopes


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
        spare = weight is not None
        eta = hidden if weight is None else F.linear(hidden, weight, bias)
        ctx.x, wanted = x, ctx.needs_input_grad[6:]
        ctx.passes = partial(passes, keep=True, spare=spare, wanted=wanted)
        out, slopes = ctx.passes(eta.contiguous(), x, size, None, *parameters, keep=keep)
        if slopes is not None:
            ctx.n_slopes = len(slopes.parameters)
            ctx.save_for_backward(
                *(hidden, weight, bias, size, *parameters),
                *(slopes.eta, slopes.size, slopes.eta_sum, *slopes.parameters),
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias, size = saved[:4]
        parameters, own = saved[4 : 4 + ctx.n_slopes], saved[7 + ctx.n_slopes :]
        eta_slope, size_slope, eta_sum = saved[4 + ctx.n_slopes : 7 + ctx.n_slopes]
        _, _, _, need_size, need_hidden, need_weight, need_bias, *need_own = ctx.needs_input_grad
        cells, weighed = grad.flatten(), grad.unsqueeze(-1)
        rows = eta_slope.view(len(cells), -1)

        # Sums are those of rows that weigh alike, as rows do in training.
        factor: Tensor | float = cells[0]
        if any(_is_sum(part) for part in (eta_sum, *own)) and not (cells == factor).all():
            eta = hidden if weight is None else F.linear(hidden, weight, bias)
            _, again = ctx.passes(eta.contiguous(), ctx.x, size, grad, *parameters)
            eta_sum, own, factor = again.eta_sum, again.parameters, 1.0

        def summed(part: Tensor) -> Tensor:
            return part * factor if _is_sum(part) else cells @ part.view(len(cells), -1)

        grad_size = grad_hidden = grad_weight = grad_bias = None
        if need_size:
            grad_size = (grad * size_slope / size).sum_to_size(size.shape)
        if need_hidden:
            product = eta_slope if weight is None else eta_slope @ weight
            grad_hidden = product * weighed
        if need_weight:
            grad_weight = rows.T @ (hidden * weighed).view(len(cells), -1)
        if need_bias:
            grad_bias = summed(rows if eta_sum is None else eta_sum)
        grad_own = [
            (part * weighed if parameter.dim() > 1 else summed(part)) if need else None
            for parameter, part, need in zip(parameters, own, need_own, strict=True)
        ]
        return None, None, None, grad_size, grad_hidden, grad_weight, grad_bias, *grad_own


def _is_sum(slopes: Tensor | None) -> bool:
    return slopes is not None and slopes.dim() == 1


def written(eta: Tensor | Linear) -> Tensor:
    """Logits, written out where they are not yet."""
    return F.linear(*eta) if isinstance(eta, Linear) else eta
