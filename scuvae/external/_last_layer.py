"""log p of counts of what enters a decoder's last layer, whose weights are frozen.

What a cell's draws ask for are the slopes in what is hidden, which are few beside the genes. They
are made together with the values, some draws at a time: neither the logits nor their slopes are
ever written out for all draws.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae.batches import SparseRows
from scuvae.kernels.dispatch import compiled
from scuvae.model.likelihoods.negative_binomial import passes

# Numbers in a block of logits, for a processor's caches.
NUMBERS_AT_ONCE = 2**20


class LastLayer(NamedTuple):
    """η = W h + b and, for zero inflation, the logits of a dropout likewise; ln θ of each gene."""

    eta: nn.Linear
    logit: nn.Linear | None
    log_theta: Tensor

    def log_prob(self, x: SparseRows, hidden: Tensor, size: Tensor) -> Tensor:
        """log p of each cell's counts, (..., cells), for ``hidden``, (..., cells, width).

        ``size`` is (cells,). Gradients are in ``hidden`` alone.
        """
        result: Tensor = _OfHidden.apply(hidden, self, x, size, torch.is_grad_enabled())
        return result


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: LastLayer, x: SparseRows, size: Tensor, grad_enabled: bool
    ) -> Tensor:
        keep = grad_enabled and ctx.needs_input_grad[0]
        draws = hidden.view(-1, *hidden.shape[-2:])
        n = len(draws)
        if compiled(hidden):
            n = max(1, NUMBERS_AT_ONCE // max(1, len(size) * layer.eta.out_features))
        found = [_values(part, layer, x, size, keep) for part in draws.split(n)]
        values, slopes = zip(*found, strict=True)
        if keep:
            ctx.save_for_backward(torch.cat(slopes).view_as(hidden))
        return torch.cat(values).view(hidden.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.unsqueeze(-1), None, None, None, None


def _values(
    hidden: Tensor, layer: LastLayer, x: SparseRows, size: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """log p, and with ``keep`` its slopes in ``hidden``."""
    eta, head = layer.eta, layer.logit
    parameters = [layer.log_theta]
    if head is not None:
        parameters.append(F.linear(hidden, head.weight, head.bias))
    value, slopes = passes(
        F.linear(hidden, eta.weight, eta.bias),
        x,
        size,
        None,
        *parameters,
        keep=keep,
        spare=True,
        wanted=(False, False, True)[: len(parameters) + 1],
    )
    if slopes is None:
        return value, None
    out = slopes.eta.flatten(0, -2) @ eta.weight
    if head is not None:
        of_logit = slopes.parameters[1]
        assert of_logit is not None
        out.addmm_(of_logit.flatten(0, -2), head.weight)
    return value, out.view_as(hidden)
