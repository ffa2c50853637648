"""How the loss fell while fitting."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from ._common import colours, finish, fits


def loss(
    adata: AnnData,
    *,
    keys: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Loss against epoch, one line per fit.

    Solid: the training loss. Dashed, where it was measured: minus the ELBO of held-out cells. Both
    are in nats per cell, lower is better. The loss axis is logarithmic when every value is
    positive.

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
    if ax is None:
        many = len(chosen) > 5
        size = (6.5, max(2.8, 0.2 * len(chosen))) if many else (4.5, 2.8)
        _, ax = plt.subplots(figsize=size, layout="constrained")

    drawn = []
    held_out = False
    for key, colour in zip(chosen, colours(len(chosen)), strict=True):
        history = histories[key]
        drawn.append(_line(ax, history["loss"], color=colour, linewidth=1.0, label=key))
        if "validation_elbo" in history and history["validation_elbo"].notna().any():
            held_out = True
            drawn.append(
                _line(ax, -history["validation_elbo"], color=colour, linewidth=1.0, linestyle="--")
            )

    _scale(ax, np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in drawn]))
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Loss (nats per cell)")
    handles = [line for line in drawn if not str(line.get_label()).startswith("_")]
    if held_out:
        style: dict[str, Any] = {"color": "0.4", "linewidth": 1.0, "linestyle": "--"}
        handles.append(Line2D([], [], label="−ELBO, held-out cells", **style))
    # Many fits would cover the lines: beside the axes then.
    where: dict[str, Any] = {}
    if len(handles) > 6:
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    ax.legend(handles=handles, frameon=False, fontsize="small", **where)

    return finish(ax, ax, own=own, show=show, return_fig=return_fig)


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


def _scale(ax: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return
    ax.set_yscale("log")
    if values.max() / values.min() < 10:
        # Within one decade a log axis would have one tick or none; round numbers read better.
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_locator(NullLocator())
