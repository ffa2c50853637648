"""What a likelihood has of each gene, such as its dispersion, for each batch by itself.

A likelihood of a gene-wise parameter p (ln θ, ln σ, dropout's log odds) is copied for each batch b.
The few counts that one batch has of a gene say little of p_gb by themselves: the batches' have a
normal prior about what they have in common, the penalty

    ½ τ Σ_b (p_gb − p̄_g)²,        p̄_g the mean over batches.

A cell whose row of the covariates is no level but a mean of levels, as averages over batches have
it, has that mean of p: what a decoder makes of such rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scuvae.batches import SparseRows
from scuvae.model.likelihoods.autograd import Linear
from scuvae.model.likelihoods.base import Likelihood, Moments
from scuvae.model.likelihoods.link import Genes

# What dispersions may be of, in scvi-tools' words.
DISPERSIONS = ("gene", "gene-batch")
# τ: batches' θ or σ are within a factor of about exp(1/√τ) of the gene's. Chosen by held-out ELBO
# on two sets and held against two others: tests/benchmarks/dispersion.py.
PRECISION = 4.0


class _Of(Likelihood):
    """Answers what is asked of a class as another likelihood does."""

    def __init__(self, like: Likelihood) -> None:
        super().__init__(like.n_vars)
        own: Any = vars(self)
        own.update(name=like.name, link=like.link, support=like.support, passes=like.passes)
        own.update(encoder_input=like.encoder_input, pca_input=like.pca_input)

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        return self._nothing()

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _stabilised(self, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return self._nothing()

    def _nothing(self) -> Tensor:
        raise TypeError(
            f"this {self.name} likelihood has a dispersion for each batch: ask that of some cells, "
            "vae.likelihood_of(covariates), with their rows of covariates"
        )


class ByLevel(_Of):
    """A likelihood whose parameters each batch has by itself; :meth:`given` is that of some cells.

    Parameters
    ----------
    levels
        One likelihood for each batch, all of one class.
    """

    by_level = True

    def __init__(self, levels: list[Likelihood]) -> None:
        super().__init__(levels[0])
        self.levels = nn.ModuleList(levels)

    @classmethod
    def of(cls, likelihood: Likelihood, n_levels: int) -> "ByLevel":
        """With the same parameters in all batches."""
        return cls([copy.deepcopy(likelihood) for _ in range(n_levels)])

    def given(self, rows: Tensor) -> Likelihood:
        most, code = rows.max(1)
        if bool((most == 1).all()):
            present = code.unique().tolist()
            likelihoods = [self._level(number) for number in present]
        else:
            mixed, code = rows.unique(dim=0, return_inverse=True)
            present = list(range(len(mixed)))
            likelihoods = [self._mean_of(weights) for weights in mixed]
        if len(present) == 1:
            return likelihoods[0]
        return _Parted(
            [
                (likelihood, (code == number).nonzero()[:, 0])
                for number, likelihood in zip(present, likelihoods, strict=True)
            ]
        )

    def each(self, change: Callable[[Likelihood], Likelihood]) -> Likelihood:
        return ByLevel([change(self._level(number)) for number in range(len(self.levels))])

    def with_levels(self, n_levels: int) -> Likelihood:
        n_known = len(self.levels)
        known = [self._level(number) for number in range(n_known)]
        if n_levels == n_known:
            return self
        mean = self._mean_of(torch.ones(n_known))
        return ByLevel([*known, *(copy.deepcopy(mean) for _ in range(n_levels - n_known))])

    @torch.no_grad()
    def add_slopes_of_prior(self) -> None:
        for own in zip(*(level.parameters() for level in self.levels), strict=True):
            mean = torch.stack(own).mean(0)
            for parameter in own:
                if not parameter.requires_grad:
                    continue
                slope = (parameter - mean).mul_(PRECISION)
                parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)

    def _level(self, number: int) -> Likelihood:
        level = self.levels[number]
        assert isinstance(level, Likelihood)
        return level

    @torch.no_grad()
    def _mean_of(self, weights: Tensor) -> Likelihood:
        """The likelihood with parameters in between; of a row of zeros, the mean of all."""
        if not bool(weights.any()):
            weights = torch.ones_like(weights)
        weights = weights / weights.sum()
        found = copy.deepcopy(self._level(0))
        own = zip(*(level.parameters() for level in self.levels), strict=True)
        for parameter, of_each in zip(found.parameters(), own, strict=True):
            parameter.copy_(torch.tensordot(weights.to(parameter), torch.stack(of_each), 1))
            parameter.grad = None
        return found


class _Parted(_Of):
    """The likelihood of cells of several levels: each asked for its own, the answers put together.

    Parameters
    ----------
    parts
        Likelihoods, and the numbers of the cells that have them.
    """

    parts: list[tuple[Likelihood, Tensor]]

    def __init__(self, parts: list[tuple[Likelihood, Tensor]]) -> None:
        super().__init__(parts[0][0])
        vars(self)["parts"] = parts  # not as submodules: they are another's
        self.order = torch.cat([index for _, index in parts]).argsort()

    def log_prob(
        self,
        x: Tensor | SparseRows,
        eta: Tensor | Linear,
        size_factor: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> Tensor:
        return self._together(
            -1,
            [
                one.log_prob(_rows(x, i), _eta(eta, i), _size(size_factor, i), observed)
                for one, i in self.parts
            ],
        )

    def reverse(
        self, x: Tensor | SparseRows, layer: Linear, size_factor: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        values, slopes = zip(
            *(
                one.reverse(
                    _rows(x, i),
                    layer._replace(hidden=layer.hidden.index_select(-2, i)),
                    size_factor.index_select(-1, i),
                    factor,
                )
                for one, i in self.parts
            ),
            strict=True,
        )
        return self._together(-1, values), self._together(-2, slopes)

    @torch.no_grad()
    def fisher(
        self,
        x: Tensor | SparseRows,
        eta: Tensor,
        size_factor: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        weights, centres = zip(
            *(
                one.fisher(_rows(x, i), eta.index_select(-2, i), _size(size_factor, i), observed)
                for one, i in self.parts
            ),
            strict=True,
        )
        centre = None if centres[0] is None else self._together(-2, centres)
        return self._together(-2, weights), centre

    def mean(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        return self._together(-2, self._each("mean", eta, size_factor, observed))

    def moments(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Moments:
        found = self._each("moments", eta, size_factor, observed)
        return Moments(*(self._together(-2, values) for values in zip(*found, strict=True)))

    def sample(
        self, eta: Tensor, size_factor: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        return self._together(-2, self._each("sample", eta, size_factor, observed))

    def stabilised(self, eta: Tensor, size_factor: Tensor | None = None) -> Tensor:
        return self._together(-2, self._each("stabilised", eta, size_factor))

    def _each(
        self, method: str, eta: Tensor, size_factor: Tensor | None, *observed: Tensor | None
    ) -> list[Any]:
        """What each part says of its cells' η."""
        return [
            getattr(one, method)(eta.index_select(-2, i), _size(size_factor, i), *observed)
            for one, i in self.parts
        ]

    def _together(self, dim: int, found: Any) -> Tensor:
        """What each part's cells have, in the order of the cells."""
        return torch.cat(list(found), dim).index_select(dim, self.order)


def _rows(x: Tensor | SparseRows, rows: Tensor) -> Tensor | SparseRows:
    return x.take(rows) if isinstance(x, SparseRows) else x.index_select(0, rows)


def _eta(eta: Tensor | Linear, cells: Tensor) -> Tensor | Linear:
    if isinstance(eta, Linear):
        return eta._replace(hidden=eta.hidden.index_select(-2, cells))
    return eta.index_select(-2, cells)


def _size(size_factor: Tensor | None, cells: Tensor) -> Tensor | None:
    return None if size_factor is None else size_factor.index_select(-1, cells)
