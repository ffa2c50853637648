"""p(x | η): how the decoder's p outputs η and a cell's size factor explain its values.

A likelihood answers for itself what others ask of it: how η becomes means, which values it
explains, how these enter an encoder and a PCA.

Count likelihoods share one mean: log μ_g = log ℓ + η_g − logsumexp(η), where ℓ is the size factor
and both run over the observed genes: to leave genes out is to condition on the others, exactly
where ℓ is the expected total over these. (A cell's own total, the default, makes a negative
binomial of fewer genes another model's.) Elsewhere a gene's mean is a function of its own η. A
likelihood is six short methods of x, η and these means μ.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae.batches import SparseRows
from scuvae.batches.sparse_rows import dense, select, sparse
from scuvae.model.likelihoods.autograd import Linear, Passes
from scuvae.model.likelihoods.autograd import reverse as reverse_rows
from scuvae.model.likelihoods.link import TINY, Genes, log_mean, widen
from scuvae.model.likelihoods.variance_stabilising import stabilised


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
    link: ClassVar[str]
    """How η becomes means: μ = ℓ softmax(η) (``"softmax"``, where alone there is a size factor), η
    (``"identity"``, in the values' own units) or 1 / (1 + exp(−η)) (``"logit"``)."""
    support: ClassVar[str]
    """Which values it explains: ``"counts"``, ``"real"`` or ``"binary"``, a key of
    :data:`scuvae.model.likelihoods.support.SUPPORTS`."""
    passes: ClassVar[Passes | None] = None
    """log p and its slopes in closed form, those in its parameters in their order; None where
    autograd is asked."""
    by_level: ClassVar[bool] = False
    """Whether each batch has parameters of its own: then cells are asked for one by one, and steps
    have no fixed shapes."""

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.n_vars = n_vars

    @classmethod
    def encoder_input(cls) -> str:
        """How values enter an encoder: one of :data:`scuvae.model.encoder.INPUTS`."""
        return "profile" if cls.support == "counts" else "values"

    @classmethod
    def pca_input(cls) -> str:
        """How they enter the PCA that cells start from: ``"profile"`` or ``"values"``."""
        return "profile" if cls.support == "counts" else "values"

    def given(self, rows: Tensor) -> "Likelihood":
        """The likelihood of some cells, by their batches' columns of covariates, (cells, batches):
        itself, where batches are alike to it."""
        return self

    def each(self, change: Callable[["Likelihood"], "Likelihood"]) -> "Likelihood":
        """``change`` of it; where batches have their own, of every one's."""
        return change(self)

    def with_levels(self, n_levels: int) -> "Likelihood":
        """The same for so many batches, further ones the mean of those known."""
        return self

    def add_slopes_of_prior(self) -> None:
        """Add to its parameters' ``grad`` what a prior of theirs says, in nats of all cells."""

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
        """As :func:`scuvae.model.likelihoods.autograd.reverse`, where there are :attr:`passes`.

        All genes are seen.
        """
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
        """Fisher weights w, and the π that centres the Jacobian of a softmax, else None.

        −∇²_z log p ≈ J_cᵀ diag(w) J_c with J_c = J − 1 (πᵀJ) and J = ∂η/∂z. Both have the shape
        of ``eta`` and are zero at genes that are not observed.
        """
        x, size_factor, genes = self._seen(x, size_factor, observed)
        seen = eta[..., genes]
        if self.link != "softmax":
            return widen(self._weight(x, self._of_each(seen), genes), eta, genes), None
        pi = F.softmax(seen, -1)
        weight = self._weight(x, pi * size_factor.unsqueeze(-1), genes)
        return widen(weight, eta, genes), widen(pi, eta, genes)

    def mean(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        """E[x | η], of the shape of ``eta``.

        Zero at genes that are not observed where these have no part in a softmax; else a gene's
        mean is its own affair.
        """
        if self.link != "softmax":
            observed = None
        mu, genes = self._means(eta, size_factor, observed, "mean")
        return widen(self._mean(mu, genes), eta, genes)

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
        return widen(self._draw(mu, genes), eta, genes)

    def stabilised(self, eta: Tensor, size_factor: Tensor | None = None) -> Tensor:
        """Each gene's variance-stabilising coordinate v, dv = dE[x] / √Var[x], as ``eta``."""
        mu, genes = self._means(eta, size_factor, None, "stabilised")
        return self._stabilised(mu, genes)

    def _means(
        self, eta: Tensor, size_factor: Tensor | None, observed: Tensor | None, caller: str
    ) -> tuple[Tensor, Genes]:
        """μ at the observed genes: the mean before any dropout."""
        genes: Genes = slice(None) if observed is None else observed
        if self.link != "softmax":
            return self._of_each(eta[..., genes]), genes
        if size_factor is None:
            raise TypeError(
                f"{caller}() of a count likelihood needs size_factor, each cell's total"
            )
        return log_mean(eta[..., genes], size_factor).exp(), genes

    def _of_each(self, eta: Tensor) -> Tensor:
        """μ of each η by itself; the same tensor under an identity link."""
        return eta if self.link == "identity" else eta.sigmoid()

    def _seen(
        self, x: Tensor | SparseRows, size_factor: Tensor | None, observed: Tensor | None
    ) -> tuple[SparseRows | Tensor, Tensor, Genes]:
        """Values at the observed genes, a size factor that is no zero, and these genes."""
        x = dense(x) if self.support == "real" else sparse(x)
        genes: Genes = slice(None)
        if observed is not None:
            genes = observed
            x = select(x, observed)
        if size_factor is None:
            size_factor = x.sum() if isinstance(x, SparseRows) else x.sum(-1)
        return x, size_factor.clamp_min(TINY), genes

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
