"""The Poisson log-likelihood of a softmax mean over sparse counts, gradients closed-form.

Σ_g μ_g is ℓ whatever η, so that beyond the softmax only the nonzeros have terms of their own:
log p = Σ_{x>0} (x ln μ − lgamma(x+1)) − ℓ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scuvae._random import poisson
from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.kernels.dispatch import compiled
from scuvae.kernels.slopes import Slopes
from scuvae.model.likelihoods.autograd import Linear, rows_of
from scuvae.model.likelihoods.autograd import log_prob as row_log_prob
from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.link import Genes, add_rows, at, softmax, through_softmax


def log_prob(x: SparseRows, eta: Tensor | Linear, size_factor: Tensor) -> Tensor:
    """log Poisson of each cell's counts in nats, (..., cells), summed over genes.

    ``eta`` is (..., cells, genes); ``size_factor`` ℓ > 0 is (cells,) or (..., cells).
    """
    return row_log_prob(passes, x, eta, size_factor)


def passes(
    eta: Tensor,
    x: SparseRows,
    size: Tensor,
    weight: Tensor | None,
    *,
    keep: bool,
    spare: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Slopes | None]:
    if not compiled(eta):
        return _dense_passes(eta, x, size, keep)
    from scuvae.kernels.count_likelihoods import poisson

    shape = eta.shape[:-1]
    out, slopes = poisson(
        eta.view(-1, eta.shape[-1]),
        *(x.starts, x.col, x.value, torch.lgamma(x.value + 1)),
        *rows_of(size, weight, shape),
        keep=keep,
        spare=spare,
        wanted=wanted,
    )
    return out.view(shape), slopes and slopes.view(shape)


def _dense_passes(
    eta: Tensor, x: SparseRows, size: Tensor, keep: bool
) -> tuple[Tensor, Slopes | None]:
    """By torch's operators: on a GPU, or in another precision."""
    pi, log_total = softmax(eta)
    log_mu_at = at(eta, x.flat) + (size.log() - log_total).index_select(-1, x.row)
    terms = log_mu_at.mul_(x.value).sub_(torch.lgamma(x.value + 1))
    out = add_rows((-size).expand_as(log_total), x.row, terms)
    if not keep:
        return out, None
    slope_at = x.value.expand_as(log_mu_at)
    slope, total = through_softmax(torch.zeros_like(pi), pi, x.flat, slope_at)
    return out, Slopes(slope, total - size)


class Poisson(Likelihood):
    """Poisson(μ). Σ_g μ_g is ℓ whatever η, so only the nonzeros have a gradient of their own."""

    name = "poisson"
    link = "softmax"
    support = "counts"
    passes = staticmethod(passes)

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return log_prob(sparse(x), eta, size_factor)

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return 2 * mu.sqrt()

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return (-mu).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return poisson(mu)
