"""How well cells are modelled, by how much was counted of them."""

from os import PathLike

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .._keys import Keys
from ._cells import categories, coloured, left_out, legend_width, scores
from ._common import BLOCK, finish, fits, fitted_to, known_fits, picture, point_size


@picture
def elbo_by_size(
    adata: AnnData,
    *,
    key: str | None = None,
    groupby: str | None = None,
    layer: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """ELBO against library size, one point per cell.

    A cell of more counts has a lower ELBO, since more is to be explained; cells far below others of
    their size are those that the model explains badly. The size is the cell's total over the fitted
    genes, in the values that were fitted: counts, on a logarithmic axis. Values that are not counts
    are summed as they are, on a linear axis where a sum is negative.

    Parameters
    ----------
    adata
        Data with ``obs["scuvae_elbo"]`` from :func:`scuvae.tl.score`.
    key
        The fit; None for the default.
    groupby
        A column of ``obs`` with categories to colour by; colours are scanpy's,
        ``uns[f"{groupby}_colors"]``, where there are enough of them. Cells without a category are
        gray, "NA" in the legend. None: one colour.
    layer
        The counts; None takes what the fit was fitted to, ``X`` where ``uns`` holds no such fit.
    ax
        Axes to draw in; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    save
        A file to write the picture to, such as ``"loss.png"`` or ``"loss.pdf"``; it is then not
        shown unless ``show=True``.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    The axes, the figure with ``return_fig``, or None if the figure was shown.

    Raises
    ------
    TypeError
        If ``groupby`` is not a string.
    ValueError
        If the column of the ELBO or of the categories, or the layer, does not exist; if the
        categories are too many.

    Examples
    --------
    >>> import numpy as np, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.obs["scuvae_elbo"] = -np.linspace(300, 900, adata.n_obs)
    >>> ax = scuvae.pl.elbo_by_size(adata, groupby="cell_type", show=False)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('Total counts of 765 genes', 'ELBO (nats per cell)')
    """
    elbo = scores(adata, key, "elbo", "score")
    groups = None if groupby is None else categories(adata, groupby)
    name = Keys.of(key).uns
    # external.scvi writes scores, but is no fit whose genes and layer are known.
    fit = name if name in _known(adata) else None
    totals, n_genes = _totals(adata, fit, layer)
    drawn = np.isfinite(elbo) & np.isfinite(totals)
    if not drawn.any():
        raise ValueError(
            f"No cell has both a finite adata.obs[{Keys.of(key).obs['elbo']!r}] and a finite "
            "total: call scuvae.tl.score again, or pass layer= with the counts"
        )

    own = ax is None
    if ax is None:
        size = (4.2 + legend_width(groups), 3.2)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    colour = np.full((adata.n_obs, 4), (0.0, 0.0, 0.0, 1.0))
    if groups is not None and groupby is not None:
        colour = coloured(ax, adata, groupby, groups, drawn)
    # In a fixed random order: group after group, the last would cover the others. As vectors, many
    # points make a huge file.
    order = np.random.default_rng(0).permutation(np.flatnonzero(drawn))
    ax.scatter(
        totals[order],
        elbo[order],
        s=point_size(len(order)),
        c=colour[order],
        alpha=float(np.clip(1e4 / len(order), 0.1, 0.8)),
        linewidths=0,
        rasterized=True,
    )
    _scale(ax, totals[drawn])
    counts = bool((totals[drawn] >= 0).all() and (totals[drawn] == np.rint(totals[drawn])).all())
    what = "Total counts of" if counts else "Sum of values over"
    said = left_out(int((~drawn).sum()), adata.n_obs, "have no score or total")
    ax.set_xlabel(f"{what} {n_genes:,} genes{said}")
    ax.set_ylabel("ELBO (nats per cell)")

    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _known(adata: AnnData) -> list[str]:
    return fits(adata, None) if known_fits(adata) else []


def _totals(adata: AnnData, fit: str | None, layer: str | None) -> tuple[np.ndarray, int]:
    """Each cell's sum over the fitted genes, a block at a time, and how many genes these are."""
    values, genes = fitted_to(adata, fit, layer)
    totals = np.empty(adata.n_obs)
    size = max(1, BLOCK // max(1, adata.n_vars))
    for start in range(0, adata.n_obs, size):
        block = values[start : start + size]
        if len(genes) < adata.n_vars:
            block = block[:, genes]
        if hasattr(block, "compute"):
            block = block.compute()
        # float32 would lose counts beyond 2^24.
        sums = block.sum(axis=1, dtype=np.float64)
        totals[start : start + size] = np.asarray(sums).ravel()
    return totals, len(genes)


def _scale(ax: Axes, totals: np.ndarray) -> None:
    low, high = float(totals.min()), float(totals.max())
    if low < 0:
        return
    if low == 0:
        # An empty cell has no place on a logarithmic axis, and is not to be dropped.
        ax.set_xscale("symlog", linthresh=1)
        return
    ax.set_xscale("log")
    if high / low >= 100:
        return
    # Powers of ten alone would leave one tick or none.
    few = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 4, 5, 10])
    ax.xaxis.set_major_locator(few if high / low < 10 else LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
