"""How the loss fell while fitting."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from ._common import colours, finish, fits, picture

# Letters of a name that a legend has room for among the lines.
_LONGEST = 24


@picture
def loss(
    adata: AnnData,
    *,
    keys: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Loss against epoch, one line per fit.

    Solid: the training loss. Dashed, where it was measured: minus the ELBO of held-out cells. Both
    are in nats per cell, lower is better; a dot marks the best held-out cells. The loss axis is
    logarithmic when every value is positive, and holds what comes after the first tenth of the
    epochs: where lines begin far above, they enter from there.

    Parameters
    ----------
    adata
        Data with fits by :func:`scuvae.tl.fit`.
    keys
        The fits' ``key_added``, one or several; None draws every fit.
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
    ValueError
        If there is no fit, or none of that key.

    Notes
    -----
    Losses of two fits show how each fit went, not which inference is better: their decoders
    differ, and the dashed line equals the solid one's definition only for ``kl_weight=1``.

    Examples
    --------
    >>> import pandas as pd, scuvae
    >>> adata = scuvae.datasets.linear_factor()
    >>> history = pd.DataFrame({"loss": [300.0, 200.0, 150.0]}, index=[1, 2, 3])
    >>> adata.uns["scuvae"] = {"params": {}, "history": history}
    >>> ax = scuvae.pl.loss(adata, show=False)
    >>> ax.get_yscale()
    'log'
    """
    chosen = fits(adata, keys)
    histories = {key: _history(adata, key) for key in chosen}
    own = ax is None
    long = max(map(len, chosen)) > _LONGEST
    if ax is None:
        many = len(chosen) > 5 or long
        size = (6.5, max(2.8, 0.2 * len(chosen))) if many else (4.5, 2.8)
        _, ax = plt.subplots(figsize=size, layout="constrained")

    drawn = []
    held_out = False
    for i, (key, colour) in enumerate(zip(chosen, colours(len(chosen)), strict=True)):
        history = histories[key]
        # A refined fit has the history of the one that it came from: both are to be seen.
        hidden = any(history.equals(histories[later]) for later in chosen[i + 1 :])
        width = 3.0 if hidden else 1.0
        drawn.append(_line(ax, history["loss"], color=colour, linewidth=width, label=key))
        if "validation_elbo" in history and history["validation_elbo"].notna().any():
            held_out = True
            lost = -history["validation_elbo"]
            drawn.append(_line(ax, lost, color=colour, linewidth=width, linestyle="--"))
            ax.scatter(lost.idxmin(), lost.min(), s=14, color=colour, zorder=3)

    _scale(ax, drawn)
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Loss (nats per cell)")
    handles = [line for line in drawn if not str(line.get_label()).startswith("_")]
    if held_out:
        style: dict[str, Any] = {"color": "0.4", "linewidth": 1.0, "linestyle": "--"}
        handles.append(Line2D([], [], label="−ELBO, held-out cells", **style))
    # Many fits, or long names, would cover the lines: beside the axes then.
    where: dict[str, Any] = {}
    if len(handles) > 6 or long:
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    ax.legend(handles=handles, frameon=False, fontsize="small", **where)

    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _history(adata: AnnData, key: str) -> pd.DataFrame:
    history = adata.uns[key]["history"]
    if not isinstance(history, pd.DataFrame) or "loss" not in history:
        raise ValueError(f"adata.uns[{key!r}]['history'] is not a table with a column 'loss'.")
    return history


def _line(ax: Axes, values: pd.Series, **style: Any) -> Line2D:
    # Held-out cells are not measured at every epoch; a line would break at each gap.
    values = values.dropna()
    marker = "o" if len(values) == 1 else None
    (line,) = ax.plot(values.index.to_numpy(), values.to_numpy(), marker=marker, ms=3, **style)
    return line


def _scale(ax: Axes, drawn: list[Line2D]) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in drawn])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    if values.min() > 0:
        ax.set_yscale("log")
    low, high = float(values.min()), float(values.max())
    late = [_late(line) for line in drawn]
    top = max((float(part.max()) for part in late if len(part)), default=high)
    # A start that takes more than half of the height hides how the fits end.
    if top > low and high - top > top - low:
        high = top
        margin = 0.06 * (high - low)
        ax.set_ylim(low - margin if low > margin or low <= 0 else low, high + margin)
    if values.min() > 0 and high / low < 10:
        # Within one decade a log axis would have one tick or none; round numbers read better.
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_locator(NullLocator())


def _late(line: Line2D) -> np.ndarray:
    """A line's finite values after the first tenth of its epochs."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    seen = np.isfinite(y)
    if not seen.any():
        return y[seen]
    first, last = x[seen].min(), x[seen].max()
    found: np.ndarray = y[seen & (x >= first + 0.1 * (last - first))]
    return found
