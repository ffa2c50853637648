"""Each gene's zeros, mean and variance: in the data, and in data that a fit would make."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.special import logit as log_odds

from .._checks import whole
from .._keys import Keys
from ._common import colours, finish, panels, picture, result

NAMES = {"zero_fraction": "zero fraction", "mean": "mean", "variance": "variance"}
# Two-sided 95 % of a normal.
WIDTH = 1.96
OUTSIDE = colours(2)[1]
# The height of a name, and the room of a tick's label for each of its letters, in parts of an axis.
_LINE, _LETTER = 0.07, 0.045


@picture
def predictive_check(
    adata: AnnData,
    *,
    key: str | None = None,
    n_genes: int = 4,
    ax: Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> list[Axes] | Figure | None:
    """Observed against predicted zero fraction, mean and variance, one point per gene.

    Predicted is the expectation over replicates of the data. In colour, and counted in the title:
    genes whose observed value is outside ±1.96 standard deviations of the replicates', by chance
    one in twenty; the farthest have their names. Variances have no such error. The line is
    observed = predicted. Zero fractions are
    on logit axes, which open up both ends; means and variances on logarithmic axes, or linear
    where some are not positive. On both, genes that were never observed lie on the edge.

    Parameters
    ----------
    adata
        Data with ``uns["scuvae_predictive_check"]`` from :func:`scuvae.tl.predictive_check`.
    key
        The fit; None for the default.
    n_genes
        Genes to name on either side of the line, in each panel: of those outside, or where there
        are no errors of all, those farthest from it.
    ax
        Axes to draw in, three, or two for a Gaussian likelihood; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    save
        A file to write the picture to, such as ``"loss.png"`` or ``"loss.pdf"``; it is then not
        shown unless ``show=True``.
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
    n_genes = whole("n_genes", n_genes, at_least=0)
    slot = Keys.of(key).predictive_check
    table = result(adata, key, slot, "predictive_check", pd.DataFrame)
    names = [name for name in NAMES if {name, f"{name}_predicted"} <= set(table)]
    if not names:
        raise ValueError(
            f"adata.uns[{slot!r}] is no table of tl.predictive_check: call "
            "scuvae.tl.predictive_check(adata) again"
        )
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
        for chosen, colour in ((~outside, "black"), (outside, OUTSIDE)):
            x, y = (np.clip(v[chosen], low, high) for v in (predicted, observed))
            panel.scatter(x, y, color=colour, clip_on=False, **dots)
        off = _distance(panel, observed, predicted)
        if f"{name}_predicted_scale" in table:
            off = np.where(outside, off, 0)
        _name(panel, table.index.astype(str), off, predicted, observed, n_genes, (low, high))
        panel.plot([low, high], [low, high], color="0.5", linewidth=0.8, zorder=0)
        panel.set_xlabel(f"Predicted {NAMES[name]}")
        panel.set_ylabel(f"Observed {NAMES[name]}")
    return finish(axes, axes[0], own=ax is None, show=show, save=save, return_fig=return_fig)


def _distance(ax: Axes, observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """How far observed values lie above what was predicted, along the axis as it is drawn."""
    along = ax.yaxis.get_transform()
    with np.errstate(divide="ignore", invalid="ignore"):
        off = along.transform(observed) - along.transform(predicted)
    return np.where(np.isfinite(off), off, 0.0)


def _name(
    ax: Axes,
    names: pd.Index,
    off: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    n_genes: int,
    ends: tuple[float, float],
) -> None:
    """The genes farthest above the line in a column at the left, those below at the right."""
    for sign, across, side in ((1, 0.03, "left"), (-1, 0.97, "right")):
        far = np.argsort(-sign * off, kind="stable")[:n_genes]
        far = far[sign * off[far] > 0]
        # From the top: above the line higher genes come first, and lines do not cross.
        far = far[np.argsort(-y[far], kind="stable")]
        first = 0.97 if sign > 0 else 0.03 + _LINE * len(far)
        for row, gene in enumerate(far):
            ax.annotate(
                names[gene],
                (np.clip(x[gene], *ends), np.clip(y[gene], *ends)),
                xytext=(across, first - _LINE * row),
                textcoords="axes fraction",
                ha=side,
                va="top",
                fontsize="x-small",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "0.7",
                    "linewidth": 0.5,
                    "relpos": (1 if sign > 0 else 0, 0.5),
                },
            )


def _apart(ticks: list[float], low: float, high: float) -> list[float]:
    """Those of some ticks on a logit axis whose labels do not touch, first come first served."""

    def place(value: float) -> float:
        ends, at = log_odds(np.array([low, high])), log_odds(value)
        return float((at - ends[0]) / (ends[1] - ends[0]))

    kept: list[float] = []
    for tick in ticks:
        letters = len(f"{tick:g}")
        if low <= tick <= high and all(
            abs(place(tick) - place(other)) > _LETTER * (letters + len(f"{other:g}")) / 2
            for other in kept
        ):
            kept.append(tick)
    return sorted(kept)


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
        # First those that are to be there, however little room there is.
        ticks = [0.5, 0.01, 0.99, 0.1, 0.9, 0.001, 0.999, 0.0001, 0.9999]
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
            axis.set_major_locator(FixedLocator(_apart(ticks, low, high)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
    ax.set_box_aspect(1)
    return float(low), float(high)
