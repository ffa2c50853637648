"""tl.predictive_check: does the model make data like those that it was fitted to?"""

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scuvae._checks import whole
from scuvae._keys import Keys
from scuvae.batches import Batch, SparseRows
from scuvae.batches.sparse_rows import select
from scuvae.distributions.quasi_random import normal_points
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.runtime import CHUNK, isolated, logger, resolve_device


@isolated
def predictive_check(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 16,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Zero fraction, mean and variance of each gene, observed and in replicated data.

    Replicates are posterior predictive: for each cell z ~ q, then x ~ p(x | z) at its size factor.
    Nothing is simulated but z: given z, likelihoods say what a gene's mean, variance and share of
    zeros are. A replicate's statistic varies about its expectation; where the observed one lies
    many of its standard deviations away, the model does not capture it. Cells that were fitted
    flatter the model a little: project held-out ones for a stricter check.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    n_samples
        Fixed draws of z per cell; 0 takes the posterior mean alone.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``uns["scuvae_predictive_check"]``, a float64
    DataFrame indexed by ``gene``: those genes of ``adata`` that were modelled and observed, in its
    order.

    ``total``, ``total_predicted``, ``total_ratio``
        Of counts, and of zeros and ones: sums over cells, observed and expected, and
        (predicted + 1) / (observed + 1). The genes whose ratio is farthest from one, either way,
        are logged, the worst first.
    ``mean``, ``variance``, ``zero_fraction``
        Observed, over cells; the variance's divisor is the number of cells.
    ``mean_predicted``, ``variance_predicted``, ``zero_fraction_predicted``
        Expectations of the same over replicates.
    ``mean_predicted_scale``, ``zero_fraction_predicted_scale``
        Standard deviations over replicates. (A variance's would need fourth moments; see
        :func:`scuvae.tl.sample` for it.)

    A Gaussian likelihood has no zeros, hence no zero fractions.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.predictive_check(adata)
    >>> table = adata.uns["scuvae_predictive_check"]
    >>> bool(table["mean"].corr(table["mean_predicted"]) > 0.9)
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_samples = whole("n_samples", n_samples, at_least=0)
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    stored = stored.to(where)
    mean = stored.mean
    points = normal_points(n_samples, mean) if n_samples else mean.new_zeros(1, 1, mean.shape[1])

    n_genes = fit.model.n_vars if cells.observed is None else int(cells.observed.sum())
    observed, predicted = _Sums(n_genes), _Sums(n_genes)
    with torch.no_grad():
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            x = batch.x if batch.observed is None else select(batch.x, batch.observed)
            observed.add_values(x)
            z = stored[batch.index].draw(points)
            predicted.add_moments(*_predictive(model, batch, z))

    discrete = model.likelihood.support != "real"
    table = _table(observed, predicted, len(cells), discrete)
    names = fit.var_names if cells.observed is None else fit.var_names[cells.observed.cpu().numpy()]
    table.index = pd.Index(names, name="gene")
    out = target(adata, copy)
    order = adata.var_names[adata.var_names.isin(names)]
    if discrete:
        _log_worst(table)
    out.uns[Keys.of(key).predictive_check] = table.loc[order].rename_axis("gene")
    return out if copy else None


def worst_first(table: pd.DataFrame) -> pd.DataFrame:
    """Genes by how far their total is predicted off, either way: the worst ratio first."""
    off = np.log(table["total_ratio"]).abs()
    return table.loc[off.sort_values(ascending=False, kind="stable").index]


def _log_worst(table: pd.DataFrame, n: int = 5) -> None:
    worst = worst_first(table).head(n)
    genes = ", ".join(
        f"{name} {row.total_predicted:.0f} for {row.total:.0f}" for name, row in worst.iterrows()
    )
    logger.info("totals that are off the most, predicted for observed: %s", genes)


def _predictive(model: VAE, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[x], Var[x] and P(x = 0) of each value under q, from draws z; (cells, genes) each."""
    mean = within = between = zero = torch.zeros(())
    likelihood = model.likelihood_of(batch.covariates)
    for n, point in enumerate(z):
        eta = model.decoder(point, batch.covariates)
        m = likelihood.moments(eta, model.size_factor(batch, eta), batch.observed)
        step = m.mean - mean.to(m.mean)
        mean = m.mean - step * n / (n + 1)
        between = between.to(step) + step.square() * n / (n + 1)
        within, zero = within.to(step) + m.variance, zero.to(step) + m.zero
    return mean, (within + between) / len(z), zero / len(z)


class _Sums:
    """Sums over cells for each gene, in float64 on the CPU."""

    def __init__(self, n_genes: int) -> None:
        # Of x, x² and [x = 0], and of the variances of x and [x = 0].
        self.first, self.second, self.zero, self.variance, self.zero_variance = np.zeros(
            (5, n_genes)
        )

    def add_values(self, x: Tensor | SparseRows) -> None:
        """Observed values."""
        if isinstance(x, SparseRows):
            n_cells, n_genes = x.shape
            col, value = x.col.cpu().numpy(), x.value.double().cpu().numpy()
        else:
            n_cells, n_genes = x.shape
            row, at = x.nonzero(as_tuple=True)
            col, value = at.cpu().numpy(), x[row, at].double().cpu().numpy()
        self.first += np.bincount(col, value, n_genes)
        self.second += np.bincount(col, value**2, n_genes)
        self.zero += n_cells - np.bincount(col, minlength=n_genes)

    def add_moments(self, mean: Tensor, variance: Tensor, zero: Tensor) -> None:
        """Expectations of independent cells."""
        m, v, p = (part.cpu().numpy().astype(np.float64) for part in (mean, variance, zero))
        self.first += m.sum(0)
        self.second += (v + m**2).sum(0)
        self.zero += p.sum(0)
        self.variance += v.sum(0)
        self.zero_variance += (p * (1 - p)).sum(0)


def _table(observed: _Sums, predicted: _Sums, n: int, discrete: bool) -> pd.DataFrame:
    columns = {}
    if discrete:
        columns["total"], columns["total_predicted"] = observed.first, predicted.first
        # One count more on both sides: what has a handful of counts is off by chance.
        columns["total_ratio"] = (predicted.first + 1) / (observed.first + 1)
        columns["zero_fraction"] = observed.zero / n
        columns["zero_fraction_predicted"] = predicted.zero / n
        columns["zero_fraction_predicted_scale"] = np.sqrt(predicted.zero_variance) / n
    columns["mean"] = observed.first / n
    columns["mean_predicted"] = predicted.first / n
    columns["mean_predicted_scale"] = np.sqrt(predicted.variance) / n
    columns["variance"] = np.maximum(observed.second / n - (observed.first / n) ** 2, 0)
    # E[Σ x²/n − x̄²]: the mean of a replicate has a variance of its own.
    spread = predicted.second / n - (predicted.first / n) ** 2 - predicted.variance / n**2
    columns["variance_predicted"] = np.maximum(spread, 0)
    return pd.DataFrame(columns)
