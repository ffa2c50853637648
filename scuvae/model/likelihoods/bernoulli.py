"""The Bernoulli of zeros and ones: whether a gene, or a peak, was seen in a cell."""

from torch import Tensor
from torch.nn import functional as F

from scuvae._random import uniform_like
from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.model.likelihoods.autograd import Linear, written
from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.link import Genes, add_rows, at


class Bernoulli(Likelihood):
    """1 with probability p = 1 / (1 + exp(−η)), else 0; there is no size factor.

    log p = x η − ln(1 + exp(η)), whose first term is needed at the nonzeros alone.
    """

    name = "bernoulli"
    link = "logit"
    support = "binary"

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        rows, eta = sparse(x), written(eta)
        return add_rows(
            -F.softplus(eta, threshold=30.0).sum(-1), rows.row, at(eta, rows.flat) * rows.value
        )

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return mu * (1 - mu)

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu * (1 - mu)

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return 2 * mu.sqrt().asin()

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return 1 - mu

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return (uniform_like(mu) < mu).to(mu)
