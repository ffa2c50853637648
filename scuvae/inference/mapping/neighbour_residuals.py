"""Whether what a model misses in a cell it misses in the cell's neighbours as well.

What is missed of one cell is noise for the most part; what a model does not know of a population it
misses in all of its cells. With residuals r = x − E[x | m] and variances v = Var[x | m] at the
posterior means m, and the sums over a cell's neighbours j,

    w_g = Σ_j r_jg / (c + Σ_j v_jg)        s = Σ_g r_g w_g / √(Σ_g v_g w_g²).

w is what the neighbours say that each gene is off by, in units of its mean where that is Poisson's;
s is how far the cell lies in that direction. Under the model s has mean 0 and variance 1 given the
neighbours, whatever they are and however deeply any of them was sequenced. c is one count, or one
cell with a gene, so that genes with hardly any in a neighbourhood do not decide, and 0 where values
are real.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.sparse_rows import dense, select
from scuvae.model import VAE

# Of a gene's total, observed and expected: what a factor of genes is drawn to 1 by.
_FACTOR_COUNTS = 5.0


@dataclass(frozen=True)
class Residuals:
    """Of some cells: posterior means, (cells, latent), and at the observed genes values,
    expectations and variances, (cells, genes)."""

    mean: Tensor
    value: Tensor
    expected: Tensor
    variance: Tensor

    @property
    def residual(self) -> Tensor:
        return self.value - self.expected

    def times(self, factor: Tensor) -> "Residuals":
        """With expectations times a factor for each gene; what a variance has beyond Poisson's goes
        with the square of the mean."""
        over = self.variance - self.expected
        expected = self.expected * factor
        return Residuals(self.mean, self.value, expected, expected + over * factor.square())

    def plus(self, shift: Tensor) -> "Residuals":
        """With expectations plus a shift of each gene."""
        return Residuals(self.mean, self.value, self.expected + shift, self.variance)


@torch.no_grad()
def residuals(model: VAE, batch: Batch, mean: Tensor) -> Residuals:
    """Of a batch's cells, at posterior means."""
    eta = model.decoder(mean, batch.covariates)
    likelihood = model.likelihood_of(batch.covariates)
    moments = likelihood.moments(eta, model.size_factor(batch, eta), batch.observed)
    x = batch.x if batch.observed is None else select(batch.x, batch.observed)
    return Residuals(mean, dense(x), moments.mean, moments.variance)


class Neighbours:
    """Cells among which others have neighbours.

    Parameters
    ----------
    cells
        Their residuals.
    n
        Neighbours of each cell, fewer than these cells.
    support
        Of the likelihood: which values there are.
    adjust_by
        A mask of some of these cells: what every gene is off by over them is taken out of all, a
        factor for each gene of counts, a shift for other values. For cells of another experiment.
    """

    def __init__(
        self, cells: Residuals, n: int, *, support: str, adjust_by: Tensor | None = None
    ) -> None:
        self.n, self.support = n, support
        self.correction: Tensor | None = None
        if adjust_by is not None and support == "counts":
            observed, expected = (
                part[adjust_by].sum(0) + _FACTOR_COUNTS for part in (cells.value, cells.expected)
            )
            self.correction = observed / expected
        elif adjust_by is not None:
            self.correction = cells.residual[adjust_by].mean(0)
        cells = self._corrected(cells)
        self.mean, self.residual, self.variance = cells.mean, cells.residual, cells.variance

    def residual_score(self, cells: Residuals) -> Tensor:
        """s of each cell, (cells,), float64; one of the neighbours' is not compared with itself."""
        cells = self._corrected(cells)
        apart = torch.cdist(cells.mean, self.mean)
        itself = (cells.mean.unsqueeze(1) == self.mean).all(-1)
        nearest = apart.masked_fill(itself, torch.inf).topk(self.n, largest=False)
        # Of cells at one place there may be fewer others than are asked for.
        others = nearest.values.isfinite().to(apart)
        chosen = torch.zeros_like(apart).scatter_(1, nearest.indices, others)
        weight = (chosen @ self.residual) / (float(self.support != "real") + chosen @ self.variance)
        along = (cells.residual * weight).sum(1).double()
        variance = (cells.variance * weight.square()).sum(1).double()
        # Cells without counts expect none: they agree with nobody.
        return torch.where(variance > 0, along / variance.sqrt(), 0.0)

    def _corrected(self, cells: Residuals) -> Residuals:
        if self.correction is None:
            return cells
        if self.support == "counts":
            return cells.times(self.correction)
        return cells.plus(self.correction)


def joined(parts: Iterable[Residuals]) -> Residuals:
    """Residuals of several batches as those of one."""
    columns = zip(*((p.mean, p.value, p.expected, p.variance) for p in parts), strict=True)
    return Residuals(*(torch.cat(column) for column in columns))
