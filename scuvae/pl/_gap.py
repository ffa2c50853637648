"""What the encoder costs the cells of each category."""

from os import PathLike
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ._cells import categories, category_colours, left_out, scores, shown
from ._common import finish, picture

# Of the names beside the boxes.
_LONGEST = 48


@picture
def amortization_gap(
    adata: AnnData,
    *,
    groupby: str,
    key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Amortization gap per cell by category, as box plots; the largest median is at the top.

    The gap is in nats per cell, zero (dashed) for a perfect encoder. A box holds the middle half of
    its cells, the line in it is their median; whiskers reach the last cell within 1.5 widths of the
    box, points are the cells beyond. In brackets: the number of cells. Colours are scanpy's,
    ``uns[f"{groupby}_colors"]``, where there are enough of them. Where few cells lie so far out
    that the boxes would be slivers, the axis is logarithmic beyond the whiskers, in the shade.

    Parameters
    ----------
    adata
        Data with ``obs["scuvae_amortization_gap"]`` from :func:`scuvae.tl.amortization_gap`.
    groupby
        The column of ``obs`` with the categories. Cells without one are left out, and the axis
        label says how many.
    key
        The fit; None for the default.
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
        If the column of the gap or of the categories does not exist, or the latter holds too many
        different values to be categories.

    Notes
    -----
    A gap is measured over draws of z, so that a cell's own may fall below zero by as much as its
    ``obs["scuvae_amortization_gap_se"]`` allows.

    Examples
    --------
    >>> import numpy as np, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.obs["scuvae_amortization_gap"] = np.linspace(0, 9, adata.n_obs)
    >>> ax = scuvae.pl.amortization_gap(adata, groupby="cell_type", show=False)
    >>> ax.get_xlabel()
    'Amortization gap (nats per cell)'
    """
    gap = scores(adata, key, "amortization_gap", "amortization_gap")
    groups = categories(adata, groupby)
    colour = category_colours(adata, groupby, groups)
    measured = np.isfinite(gap)
    labelled = np.asarray(groups.codes) >= 0
    boxes = {
        name: gap[(groups.codes == code) & measured] for code, name in enumerate(groups.categories)
    }
    boxes = {name: values for name, values in boxes.items() if len(values)}
    if not boxes:
        raise ValueError(
            f"No cell has both an amortization gap and a value in adata.obs[{groupby!r}]: call "
            "scuvae.tl.amortization_gap again, or pass another groupby="
        )
    names = sorted(boxes, key=lambda name: float(np.median(boxes[name])))
    written = zip(shown(names, _LONGEST), names, strict=True)
    labels = [f"{short} ({len(boxes[name]):,})" for short, name in written]

    own = ax is None
    if ax is None:
        longest = min(_LONGEST + 10, max(len(label) for label in labels))
        size = (3.8 + 0.08 * longest, 1.0 + 0.26 * len(names))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    # Lying boxes, so that long names of cell types can be read; matplotlib 3.10 renamed this.
    newer = mpl.__version_info__ >= (3, 10)
    lying: dict[str, Any] = {"orientation": "horizontal"} if newer else {"vert": False}
    drawn = ax.boxplot(
        [boxes[name] for name in names],
        positions=range(1, len(names) + 1),
        widths=0.65,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"linewidth": 0.6},
        whiskerprops={"linewidth": 0.6},
        capprops={"linewidth": 0.6},
        medianprops={"color": "black", "linewidth": 1.4},
        flierprops={"marker": ".", "markersize": 4, "markeredgewidth": 0, "rasterized": True},
        **lying,
    )
    for box, fliers, name in zip(drawn["boxes"], drawn["fliers"], names, strict=True):
        box.set_facecolor(colour[name])
        fliers.set_markerfacecolor(colour[name])
    ax.axvline(0, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_yticks(range(1, len(names) + 1), labels)
    ax.set_ylim(0.4, len(names) + 0.6)
    ax.set_ylabel(groupby)
    ends = np.concatenate([line.get_xdata() for line in drawn["whiskers"]])
    shaded = _scale(ax, float(np.abs(ends).max()), np.concatenate(list(boxes.values())))
    said = "\n(shaded: logarithmic)" if shaded else ""
    said += left_out(int((~labelled).sum()), adata.n_obs, f"have no {groupby}")
    said += left_out(int((labelled & ~measured).sum()), adata.n_obs, "have no gap")
    ax.set_xlabel(f"Amortization gap (nats per cell){said}")

    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _scale(ax: Axes, whiskers: float, values: np.ndarray) -> bool:
    """Make the axis logarithmic beyond the whiskers, and shade it there, if cells lie far out."""
    low, high = min(float(values.min()), 0.0), float(values.max())
    far = max(high, -low)
    if whiskers <= 0 or far < 4 * whiskers:
        return False
    power = 10.0 ** float(np.floor(np.log10(whiskers)))
    end = float(power * next(step for step in (1, 2, 3, 5, 10) if step * power >= whiskers))
    # Three times the room of a decade for what is linear: the boxes.
    ax.set_xscale("symlog", linthresh=end, linscale=3)
    inner = np.asarray(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(0, end))
    steps = (1, 3) if far < 30 * end else (1,)
    outer: np.ndarray = np.outer(power * 10.0 ** np.arange(12), steps).ravel()
    # Without a tick out there nobody would see how far out it is.
    outer = outer[outer >= 2 * end]
    left = min(1.15 * low, -outer[0]) if low < -end else low - 0.04 * end
    right = max(1.15 * high, outer[0]) if high > end else end
    ticks = np.concatenate([inner[inner <= end], outer])
    ticks = np.unique(np.concatenate([-ticks, ticks]) + 0.0)  # not -0
    ax.set_xlim(left, right)
    ax.set_xticks(ticks[(ticks >= left) & (ticks <= right)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    for start, stop in ((left, -end), (end, right)):
        if start < stop:
            ax.axvspan(start, stop, color="0.94", linewidth=0, zorder=0)
    return True
