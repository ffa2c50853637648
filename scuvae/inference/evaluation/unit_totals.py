"""What units of cells, such as a donor's of a group, have of each gene; with what variance.

The total y of a unit's cells is a draw three times over: of the cells, of their counts about their
means μ, and the means are known as far as the posteriors q know them. By the law of total variance

    V = Σ_i (E_q Var[x | z] + Var_q μ_i) + Σ_i (E_q μ_i − ℓ_i r)²,    r = Σ_i E_q μ_i / Σ_i ℓ_i,

and κ = (V − Σ μ) / (Σ μ)² is what y varies, relative to its mean, beyond a Poisson's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.sparse_rows import dense
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.model import VAE
from scuvae.model.extended_model import ExtendedModel

_LEAST = 1e-12


@dataclass(frozen=True)
class UnitTotals:
    """Sums over the cells of each unit: (units, genes), or (units,), (units, latent); on the host.

    ``counts`` as they are, ``mean`` as the model has them; ``latent`` of posterior means.
    """

    counts: Tensor
    mean: Tensor
    inner: Tensor
    square: Tensor
    by_size: Tensor
    exposure: Tensor
    size_square: Tensor
    cells: Tensor
    latent: Tensor

    @classmethod
    def zeros(cls, n_units: int, n_genes: int, n_latent: int) -> "UnitTotals":
        def zero(*shape: int) -> Tensor:
            return torch.zeros(n_units, *shape, dtype=torch.float64)

        shapes = [(n_genes,)] * 5 + [()] * 3 + [(n_latent,)]
        return cls(*(zero(*shape) for shape in shapes))

    def merged(self, into: Tensor) -> "UnitTotals":
        """Units of several of these each: ``into``, (new, units), is one where one is part."""
        into = into.double()
        return UnitTotals(*(into @ value for value in vars(self).values()))

    def variance(self) -> Tensor:
        """κ, (units, genes)."""
        rate = self.mean / self.exposure.clamp_min(_LEAST)[:, None]
        between = self.square - 2 * rate * self.by_size
        between = between + rate.square() * self.size_square[:, None]
        extra = self.inner + between - self.mean
        return extra.clamp_min(0) / self.mean.square().clamp_min(_LEAST)


@torch.no_grad()
def add_cells(
    totals: UnitTotals,
    model: VAE | ExtendedModel,
    batch: Batch,
    unit: Tensor,
    q: Gaussian,
    genes: Tensor,
    n_samples: int,
) -> None:
    """A batch's cells, whose units are ``unit`` and whose posteriors are ``q``.

    ``genes`` are numbers among the model's, of observed ones.
    """
    observed = batch.observed
    places = genes if observed is None else (observed.long().cumsum(0) - 1)[genes]
    mean = square = inner = torch.zeros((), device=genes.device)
    likelihood = model.likelihood_of(batch.covariates)
    points = normal_points(n_samples, q.mean)
    for point in points:
        eta = model.decoder(q.draw(point), batch.covariates)
        found = likelihood.moments(eta, model.size_factor(batch, eta), observed)
        value = found.mean[:, places]
        mean = mean + value / len(points)
        square = square + value.square() / len(points)
        inner = inner + found.variance[:, places] / len(points)
    inner = inner + (square - mean.square()).clamp_min(0)
    size = batch.size_factor[:, None]
    cells = (dense(batch.x)[:, genes], mean, inner, mean.square(), mean * size)
    ones = torch.ones_like(batch.size_factor)
    rest = (batch.size_factor, batch.size_factor.square(), ones, q.mean)
    at = unit.cpu()
    for total, value in zip(vars(totals).values(), (*cells, *rest), strict=True):
        total.index_add_(0, at, value.cpu().double())
