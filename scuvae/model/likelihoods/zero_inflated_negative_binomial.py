"""The negative binomial with more zeros than it explains."""

import torch
from torch import Tensor, nn

from scuvae._random import poisson, uniform_like
from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.model.likelihoods.autograd import Linear
from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.link import Genes, keep_counts
from scuvae.model.likelihoods.negative_binomial import (
    gamma_means,
    inverse_theta,
    log_zero_probability,
    stabilised_counts,
)
from scuvae.model.likelihoods.negative_binomial import log_prob as negative_binomial_log_prob
from scuvae.model.likelihoods.negative_binomial import passes as negative_binomial_passes


class ZeroInflatedNegativeBinomial(Likelihood):
    """NB, but zero with a gene's probability π whatever μ.

    x = 0: ln(π + (1−π) NB(0)); else ln(1−π) + ln NB(x).
    """

    name = "zero_inflated_negative_binomial"
    link = "softmax"
    support = "counts"
    passes = staticmethod(negative_binomial_passes)

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        self.log_theta = nn.Parameter(torch.zeros(n_vars))
        # π starts at .05: droplet counts show little inflation, and .5 takes long to unlearn.
        self.logit_dropout = nn.Parameter(torch.full((n_vars,), -3.0))

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return negative_binomial_log_prob(
            sparse(x), eta, size_factor, self.log_theta[genes], self.logit_dropout[genes]
        )

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        log_theta = self.log_theta[genes]
        ratio = mu * inverse_theta(log_theta)
        # r = P(not dropped out | x), which is 1 wherever x > 0
        log_zero = -log_theta.exp() * ratio.log1p()
        kept = keep_counts(torch.sigmoid(log_zero - self.logit_dropout[genes]), sparse(x))
        return mu.mul_(kept).div_(ratio.add_(1))

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu * torch.sigmoid(-self.logit_dropout[genes])

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        ratio = mu * (inverse_theta(self.log_theta[genes]) + dropout)
        return (1 - dropout) * mu * (1 + ratio)

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        excess = inverse_theta(self.log_theta[genes]) + dropout
        return (1 - dropout).sqrt() * stabilised_counts(mu, excess)

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        return dropout + (1 - dropout) * log_zero_probability(mu, self.log_theta[genes]).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        kept = uniform_like(mu) < torch.sigmoid(-self.logit_dropout[genes])
        return kept * poisson(gamma_means(mu, self.log_theta[genes]))
