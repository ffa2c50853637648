"""scvi-tools' negative binomial at less cost, for runs of its default epochs.

The same formula, with its gradients in closed form and the gamma functions taken at the counts that
are not zero: elsewhere lgamma(x + θ) − lgamma(θ) − lgamma(x + 1) is zero. A run differs from
scvi-tools' own by the noise of float32; its time is not SCVI's, and is measured apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor


class _LogNB(torch.autograd.Function):
    """Values and closed-form slopes; ``row`` is θ of each gene, (genes,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mu: Tensor, row: Tensor, eps: float) -> Tensor:
        total = row + eps + mu
        log_share = torch.log(row + eps) - torch.log(total)
        flat = torch.from_numpy(np.flatnonzero(x.numpy()))  # a third of torch's time
        gene = flat % x.shape[1]
        count, mean = (v.reshape(-1).index_select(0, flat) for v in (x, mu))
        theta = row.index_select(0, gene)
        # Of each gene or count once, then looked up.
        factorial = torch.lgamma(torch.arange(1, int(x.max()) + 2, device=x.device, dtype=x.dtype))
        there = torch.lgamma(count + theta) - torch.lgamma(row).index_select(0, gene)
        there -= factorial.index_select(0, count.long())
        there += count * torch.log((mean + eps) / total.view(-1).index_select(0, flat))
        out = row * log_share
        out.view(-1).index_add_(0, flat, there)
        ctx.save_for_backward(x, total, log_share, row, flat, gene, count, theta, mean)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        x, total, log_share, row, flat, gene, count, theta, mean = ctx.saved_tensors
        ratio = (row + x).div_(total)
        more = torch.digamma(count + theta) - torch.digamma(row).index_select(0, gene)
        of_theta = log_share.sub_(ratio).add_(row / (row + ctx.eps))
        of_theta.view(-1).index_add_(0, flat, more)
        of_mu = ratio.neg_()
        of_mu.view(-1).index_add_(0, flat, count / (mean + ctx.eps))
        return None, of_mu.mul_(slopes[0]), (of_theta.mul_(slopes[0])).sum(0), None


def log_nb(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8, **unused: Any) -> Tensor:
    """What scvi-tools calls ``log_nb_positive``."""
    if theta.dim() == 2 and theta.stride(0) != 0:
        raise ValueError("one θ a gene, repeated over cells, is what this is written for")
    row = theta[0] if theta.dim() == 2 else theta
    out: Tensor = _LogNB.apply(x.contiguous(), mu, row, eps)
    return out


def check(n_cells: int = 64, n_genes: int = 300) -> None:
    """Hold values and gradients against scvi-tools' own in float64; raises where they differ."""
    from scvi.distributions._negative_binomial import log_nb_positive

    generator = torch.Generator().manual_seed(0)
    mu = torch.rand(n_cells, n_genes, generator=generator).double() * 3 + 1e-4
    log_theta = torch.randn(n_genes, generator=generator).double() * 2
    x = torch.poisson(mu, generator=generator)
    found = []
    for formula in (log_nb_positive, log_nb):
        leaves = mu.clone().requires_grad_(), log_theta.clone().requires_grad_()
        value = formula(x, leaves[0], leaves[1].exp().expand_as(mu))
        weight = torch.linspace(0, 1, n_cells)[:, None]
        found.append((value, *torch.autograd.grad((weight * value).sum(), leaves)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@contextmanager
def fast() -> Iterator[None]:
    """Inside, scvi-tools' negative binomial is this one, Adam is fused, nothing is logged."""
    import scvi.distributions._negative_binomial as module
    from scvi.train import TrainingPlan

    def silent(*args: Any, **kwargs: Any) -> None:
        """Lightning's log takes a third of a step's time, and training does not read it."""

    check()
    with (
        patch.object(module, "log_nb_positive", log_nb),
        patch.object(torch.optim, "Adam", partial(torch.optim.Adam, fused=True)),
        patch.object(TrainingPlan, "log", silent),
        patch.object(TrainingPlan, "compute_and_log_metrics", silent),
    ):
        yield
