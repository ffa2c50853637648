"""p(x | η): how the decoder's p outputs η and a cell's size factor explain its values.

Count likelihoods share one mean: log μ_g = log ℓ + η_g − logsumexp(η), where ℓ is the size factor
and both run over the observed genes: to leave genes out is to condition on the others, exactly
where ℓ is the expected total over these. (A cell's own total, the default, makes a negative
binomial of fewer genes another model's.) A likelihood is six short methods of η, or of μ for
counts; ``LIKELIHOODS`` at the end names them all.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae.model.batch import SparseRows, dense, select, sparse
from scuvae.model.least_squares import squared_residuals
from scuvae.model.negative_binomial import inverse_theta, keep_counts
from scuvae.model.negative_binomial import log_prob as negative_binomial_log_prob
from scuvae.model.negative_binomial import passes as negative_binomial_passes
from scuvae.model.poisson import log_prob as poisson_log_prob
from scuvae.model.poisson import passes as poisson_passes
from scuvae.model.rows import Linear, Passes
from scuvae.model.rows import reverse as reverse_rows
from scuvae.model.stabilise import stabilised

Genes = Tensor | slice
"""The observed genes: a boolean mask, or slice(None) for all."""

# An empty cell has a size factor of 0; a mean this small has no effect and stays finite.
_TINY = 1e-30


class Moments(NamedTuple):
    """What p(x | η) says of every value: E[x], Var[x] and P(x = 0), (..., cells, genes) each."""

    mean: Tensor
    variance: Tensor
    zero: Tensor


class Likelihood(nn.Module, ABC):
    """A distribution of a cell's values given the decoder's output.

    ``x`` is (cells, genes), a tensor or :class:`SparseRows`; ``eta`` is (..., cells, genes) with
    any leading dimensions of draws; ``size_factor`` is (cells,) or (..., cells), in counts, by
    default each cell's total over the observed genes; ``observed`` is a boolean mask over genes,
    by default all of them.
    """

    name: ClassVar[str]
    counts: ClassVar[bool]
    """Whether values must be whole and non-negative; means are then ℓ softmax(η), else η."""
    passes: ClassVar[Passes | None] = None
    """log p and its slopes in closed form, those in its parameters in their order; None where
    autograd is asked."""

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.n_vars = n_vars

    def log_prob(
        self,
        x: Tensor | SparseRows,
        eta: Tensor | Linear,
        size_factor: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> Tensor:
        """log p(x | η) in nats, summed over observed genes: (..., cells).

        ``eta`` may also be a :class:`Linear`, the layer that makes it.
        """
        if observed is not None:
            eta = eta.of(observed) if isinstance(eta, Linear) else eta[..., observed]
        x, size_factor, genes = self._seen(x, size_factor, observed)
        return self._log_prob(x, eta, size_factor, genes)

    def reverse(
        self, x: Tensor | SparseRows, layer: Linear, size_factor: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """As :func:`scuvae.model.rows.reverse`, where there are :attr:`passes`; all genes seen."""
        assert self.passes is not None
        x, size_factor, _ = self._seen(x, size_factor, None)
        own = list(self.parameters())
        return reverse_rows(self.passes, sparse(x), layer, size_factor, factor, own)

    @torch.no_grad()
    def fisher(
        self,
        x: Tensor | SparseRows,
        eta: Tensor,
        size_factor: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fisher weights w, and the softmax π that centres the Jacobian (None for a Gaussian).

        −∇²_z log p ≈ J_cᵀ diag(w) J_c with J_c = J − 1 (πᵀJ) and J = ∂η/∂z. Both have the shape
        of ``eta`` and are zero at genes that are not observed.
        """
        x, size_factor, genes = self._seen(x, size_factor, observed)
        seen = eta[..., genes]
        if not self.counts:
            return _widen(self._weight(x, seen, genes), eta, genes), None
        pi = F.softmax(seen, -1)
        weight = self._weight(x, pi * size_factor.unsqueeze(-1), genes)
        return _widen(weight, eta, genes), _widen(pi, eta, genes)

    def mean(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        """E[x | η], of the shape of ``eta``; zero at counts that are not observed."""
        if not self.counts:
            return eta
        mu, genes = self._means(eta, size_factor, observed, "mean")
        return _widen(self._mean(mu, genes), eta, genes)

    def moments(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Moments:
        """E[x | η], Var[x | η] and P(x = 0 | η), a density's being zero; of observed genes only."""
        mu, genes = self._means(eta, size_factor, observed, "moments")
        return Moments(self._mean(mu, genes), self._variance(mu, genes), self._zero(mu, genes))

    def sample(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        """Draws of x, of the shape of ``eta``, from torch's current random state.

        Zero at genes that are not observed.
        """
        mu, genes = self._means(eta, size_factor, observed, "sample")
        return _widen(self._draw(mu, genes), eta, genes)

    def stabilised(self, eta: Tensor, size_factor: Tensor | None = None) -> Tensor:
        """Each gene's variance-stabilising coordinate v, dv = dE[x] / √Var[x], as ``eta``."""
        mu, genes = self._means(eta, size_factor, None, "stabilised")
        return self._stabilised(mu, genes)

    def _means(
        self, eta: Tensor, size_factor: Tensor | None, observed: Tensor | None, caller: str
    ) -> tuple[Tensor, Genes]:
        """μ at the observed genes: the mean before any dropout."""
        genes: Genes = slice(None) if observed is None else observed
        if not self.counts:
            return eta[..., genes], genes
        if size_factor is None:
            raise TypeError(
                f"{caller}() of a count likelihood needs size_factor, each cell's total"
            )
        return log_mean(eta[..., genes], size_factor).exp(), genes

    def _seen(
        self, x: Tensor | SparseRows, size_factor: Tensor | None, observed: Tensor | None
    ) -> tuple[SparseRows | Tensor, Tensor, Genes]:
        """Values at the observed genes, a size factor that is no zero, and these genes."""
        x = sparse(x) if self.counts else dense(x)
        genes: Genes = slice(None)
        if observed is not None:
            genes = observed
            x = select(x, observed)
        if size_factor is None:
            size_factor = x.sum() if isinstance(x, SparseRows) else x.sum(-1)
        return x, size_factor.clamp_min(_TINY), genes

    @abstractmethod
    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor: ...

    @abstractmethod
    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        """Fisher weights at the means μ; it may overwrite them."""

    @abstractmethod
    def _mean(self, mu: Tensor, genes: Genes) -> Tensor: ...

    @abstractmethod
    def _variance(self, mu: Tensor, genes: Genes) -> Tensor: ...

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        """v at the means μ; from mean and variance where a likelihood has no closed form."""
        return stabilised(
            mu, lambda at: self._mean(at, genes), lambda at: self._variance(at, genes)
        )

    @abstractmethod
    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        """P(x = 0)."""

    @abstractmethod
    def _draw(self, mu: Tensor, genes: Genes) -> Tensor: ...


def log_mean(eta: Tensor, size_factor: Tensor) -> Tensor:
    """log μ = log ℓ + log softmax(η), the mean that all count likelihoods share."""
    return F.log_softmax(eta, -1) + size_factor.clamp_min(_TINY).log().unsqueeze(-1)


def _widen(values: Tensor, like: Tensor, genes: Genes) -> Tensor:
    """``values`` of the observed genes, among zeros at the others."""
    if isinstance(genes, slice):
        return values
    out = torch.zeros_like(like)
    out[..., genes] = values
    return out


class Gaussian(Likelihood):
    """N(η, σ²), with one σ for all genes as in probabilistic PCA, or one a gene."""

    name = "gaussian"
    counts = False

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
        return mu + self.scale[genes] * torch.randn_like(mu)


def written(eta: Tensor | Linear) -> Tensor:
    """Logits, written out where they are not yet."""
    return F.linear(*eta) if isinstance(eta, Linear) else eta


def _log_normaliser(scale: Tensor) -> Tensor:
    return scale.log().sum() + 0.5 * len(scale) * math.log(2 * math.pi)


class Poisson(Likelihood):
    """Poisson(μ). Σ_g μ_g is ℓ whatever η, so only the nonzeros have a gradient of their own."""

    name = "poisson"
    counts = True
    passes = staticmethod(poisson_passes)

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return poisson_log_prob(sparse(x), eta, size_factor)

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
        return torch.poisson(mu)


class NegativeBinomial(Likelihood):
    """NB with mean μ and variance μ + μ²/θ, θ a gene's inverse dispersion.

    log p = lgamma(x+θ) − lgamma(θ) − lgamma(x+1) + θ ln(θ/(θ+μ)) + x ln(μ/(θ+μ)).
    """

    name = "negative_binomial"
    counts = True
    passes = staticmethod(negative_binomial_passes)

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        self.log_theta = nn.Parameter(torch.zeros(n_vars))

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return negative_binomial_log_prob(sparse(x), eta, size_factor, self.log_theta[genes])

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return mu.div_(1 + mu * inverse_theta(self.log_theta[genes]))

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu * (1 + mu * inverse_theta(self.log_theta[genes]))

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return _asinh(mu, inverse_theta(self.log_theta[genes]))

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return _log_zero(mu, self.log_theta[genes]).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return torch.poisson(_gamma(mu, self.log_theta[genes]))


class ZeroInflatedNegativeBinomial(Likelihood):
    """NB, but zero with a gene's probability π whatever μ.

    x = 0: ln(π + (1−π) NB(0)); else ln(1−π) + ln NB(x).
    """

    name = "zero_inflated_negative_binomial"
    counts = True
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
        return (1 - dropout).sqrt() * _asinh(mu, excess)

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        return dropout + (1 - dropout) * _log_zero(mu, self.log_theta[genes]).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        kept = torch.rand_like(mu) < torch.sigmoid(-self.logit_dropout[genes])
        return kept * torch.poisson(_gamma(mu, self.log_theta[genes]))


def _asinh(mu: Tensor, excess: Tensor) -> Tensor:
    """∫ dμ / √(μ (1 + a μ)) = 2 asinh(√(a μ)) / √a for a > 0."""
    root = excess.clamp_min(1e-12).sqrt()  # below, a Poisson's 2 √μ
    return 2 * (mu.sqrt() * root).asinh() / root


def _log_zero(mu: Tensor, log_theta: Tensor) -> Tensor:
    """ln NB(0) = −θ ln(1 + μ/θ)."""
    return -log_theta.exp() * (mu * inverse_theta(log_theta)).log1p()


def _gamma(mu: Tensor, log_theta: Tensor) -> Tensor:
    """Draws of the rate of a negative binomial: gamma with mean μ and shape θ."""
    # Above 1e6 the rate's relative spread is under .001, which counts do not show.
    theta = log_theta.exp().clamp_max(1e6)
    return mu * torch.distributions.Gamma(theta.expand_as(mu), theta.expand_as(mu)).sample()


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "nb": NegativeBinomial,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "zinb": ZeroInflatedNegativeBinomial,
}
