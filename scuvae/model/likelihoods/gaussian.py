"""The Gaussian, and |(x − W h − b) / σ|² of several draws of h without their p outputs.

With a cell's mean h̄ over its draws, r = (x − W h̄ − b) / σ and V = W / σ, the draw h̄ + δ has

    |r − V δ|² = |r|² − 2 δᵀ Vᵀ r + δᵀ VᵀV δ:

one residual a cell, and for each draw a product of the hidden layer's width. Around the mean
nothing large cancels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae._random import normal_like
from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import dense
from scuvae.model.likelihoods.autograd import Linear, written
from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.link import Genes


def squared_residuals(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> Tensor:
    """Σ_g (x − W h − b)²_g / σ_g², (..., cells).

    Parameters
    ----------
    x
        Values, (cells, genes).
    hidden
        Draws of h, (..., cells, width), with at least one leading dimension.
    weight, bias, scale
        W, (genes, width), b and σ, (genes,).
    """
    result: Tensor = _Squares.apply(hidden, weight, bias, scale, x)
    return result


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, x: Tensor
    ) -> Tensor:
        draws = hidden.flatten(0, -3)
        centre = draws.mean(0)
        residual = torch.addmm(bias, centre, weight.T).neg_().add_(x).div_(scale)  # r
        scaled = weight / scale.unsqueeze(1)  # V
        along = residual @ scaled  # Vᵀr
        delta = draws - centre
        half = (delta @ (scaled.T @ scaled)).sub_(along)  # of the gradient in δ
        out = residual.square().sum(-1) + ((half - along).mul_(delta)).sum(-1)
        ctx.save_for_backward(centre, residual, scaled, delta, half, scale)
        return out.view(hidden.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centre, residual, scaled, delta, half, scale = ctx.saved_tensors
        n_draws, width = len(delta), delta.shape[-1]
        each = grad.reshape(n_draws, -1, 1)
        weighted = delta * each
        gram = weighted.view(-1, width).T @ delta.view(-1, width)
        along = -2 * weighted.sum(0)
        to_residual = (residual * (2 * each.sum(0))).addmm_(along, scaled.T)
        to_scaled = (scaled @ (gram + gram.T)).addmm_(residual.T, along)
        to_mean = to_residual / scale  # less the gradient in W h̄ + b
        to_hidden = half * (2 * each)
        # δ is what h has beyond its mean; the mean moves r.
        to_hidden += (to_residual @ scaled + to_hidden.sum(0)).div_(-n_draws)
        to_weight = (to_scaled / scale.unsqueeze(1)).addmm_(to_mean.T, centre, alpha=-1)
        to_scale = -((to_mean * residual).sum(0) + (to_scaled * scaled).sum(1) / scale)
        shape = (*grad.shape, width)
        return to_hidden.view(shape), to_weight, -to_mean.sum(0), to_scale, None


class Gaussian(Likelihood):
    """N(η, σ²), with one σ for all genes as in probabilistic PCA, or one a gene."""

    name = "gaussian"
    link = "identity"
    support = "real"

    def __init__(self, n_vars: int, *, per_gene: bool = False) -> None:
        super().__init__(n_vars)
        self.scale_raw = nn.Parameter(torch.zeros(n_vars if per_gene else 1))

    @property
    def scale(self) -> Tensor:
        """σ of every gene, (genes,)."""
        return F.softplus(self.scale_raw).expand(self.n_vars)

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        scale = self.scale[genes]
        if isinstance(eta, Linear) and eta.hidden.dim() > 2:
            # Several draws, whose outputs need not be written out.
            squares = squared_residuals(dense(x), *eta, scale)
        else:
            squares = ((dense(x) - written(eta)) / scale).square().sum(-1)
        return -0.5 * squares - _log_normaliser(scale)

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return self.scale[genes].square().reciprocal().expand_as(mu)

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return self.scale[genes].square().expand_as(mu)

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu / self.scale[genes]

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return torch.zeros_like(mu)

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu + self.scale[genes] * normal_like(mu)


def _log_normaliser(scale: Tensor) -> Tensor:
    return scale.log().sum() + 0.5 * len(scale) * math.log(2 * math.pi)
