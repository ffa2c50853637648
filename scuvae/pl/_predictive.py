"""Each gene's zeros, mean and variance: in the data, and in data that a fit would make."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .._keys import Keys
from ._common import finish, panels, result

NAMES = {"zero_fraction": "zero fraction", "mean": "mean", "variance": "variance"}
# Two-sided 95 % of a normal.
WIDTH = 1.96


def predictive_check(
    adata: AnnData,
    *,
    key: str | None = None,
    ax: Sequence[Axes] | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> list[Axes] | Figure | None:
    """Observed against predicted zero fraction, mean and variance, one point per gene.

    Predicted is the expectation over replicates of the data. Red, and counted in the title: genes
    whose observed value is outside ±1.96 standard deviations of the replicates', by chance one
    in twenty. Variances have no such error. The line is observed = predicted. Zero fractions are
    on logit axes, which open up both ends; means and variances on logarithmic axes, or linear
    where some are not positive. On both, genes that were never observed lie on the edge.

    Parameters
    ----------
    adata
        Data with ``uns["scuvae_predictive_check"]`` from :func:`scuvae.tl.predictive_check`.
    key
        The fit; None for the default.
    ax
        Axes to draw in, three, or two for a Gaussian likelihood; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    The panels' axes, the figure with ``return_fig``, or None if the figure was shown.

    Raises
    ------
    ValueError
        If there is no predictive check of that key, or ``ax`` are too many or too few.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.predictive_check(adata)
    >>> zeros, mean, variance = scuvae.pl.predictive_check(adata, show=False)
    >>> mean.get_xlabel(), mean.get_ylabel()
    ('Predicted mean', 'Observed mean')
    """
    slot = Keys.of(key).predictive_check
    table = result(adata, key, slot, "predictive_check", pd.DataFrame)
    names = [name for name in NAMES if name in table]
    axes = panels(ax, len(names), len(names), (2.8, 2.8))
    for panel, name in zip(axes, names, strict=True):
        observed, predicted = (
            table[name].to_numpy(float),
            table[f"{name}_predicted"].to_numpy(float),
        )
        outside = np.zeros(len(observed), bool)
        title = NAMES[name].capitalize()
        if f"{name}_predicted_scale" in table:
            spread = table[f"{name}_predicted_scale"].to_numpy(float)
            outside = np.abs(observed - predicted) > WIDTH * spread
            title += f"\n{outside.sum():,} of {len(outside):,} genes outside 95 %"
        panel.set_title(title, fontsize="medium")
        low, high = _scale(panel, observed, predicted, logit=name == "zero_fraction")
        dots: dict[str, Any] = {
            "s": float(np.clip(6_000 / len(observed), 3, 12)),
            "alpha": float(np.clip(1_000 / len(observed), 0.3, 0.8)),
            "linewidths": 0,
            "rasterized": True,
        }
        for chosen, colour in ((~outside, "black"), (outside, "tab:red")):
            x, y = (np.clip(v[chosen], low, high) for v in (predicted, observed))
            panel.scatter(x, y, color=colour, clip_on=False, **dots)
        panel.plot([low, high], [low, high], color="0.5", linewidth=0.8, zorder=0)
        panel.set_xlabel(f"Predicted {NAMES[name]}")
        panel.set_ylabel(f"Observed {NAMES[name]}")
    return finish(axes, axes[0], own=ax is None, show=show, return_fig=return_fig)


def _scale(
    ax: Axes, observed: np.ndarray, predicted: np.ndarray, *, logit: bool
) -> tuple[float, float]:
    """Set both axes alike; their ends, at which values beyond them are drawn."""
    values = np.concatenate([observed, predicted])
    values = values[np.isfinite(values)]
    if logit:
        inside = values[(values > 0) & (values < 1)]
        least = min(inside.min(initial=0.5), 1 - inside.max(initial=0.5)) / 1.5
        low = least if values.min() < 0.3 else min(0.3, values.min())
        high = 1 - least if values.max() > 0.7 else max(0.7, values.max())
        scale = "logit"
        ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]
    elif observed.min() >= 0 and (predicted > 0).all():
        positive = values[values > 0]
        low, high = positive.min() / 1.5, positive.max() * 1.5
        scale, ticks = "log", []
    else:
        margin = 0.05 * (values.max() - values.min() or 1.0)
        low, high = values.min() - margin, values.max() + margin
        scale, ticks = "linear", []
    for axis, name, limits in ((ax.xaxis, "x", ax.set_xlim), (ax.yaxis, "y", ax.set_ylim)):
        getattr(ax, f"set_{name}scale")(scale)
        limits(low, high)
        if ticks:
            axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
    ax.set_box_aspect(1)
    return float(low), float(high)
