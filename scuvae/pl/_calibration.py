"""Whether posterior intervals cover what they should."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri

from .._keys import Keys
from ._common import colours, finish, panels, picture, result

FAMILIES = ("full", "diagonal", "encoder")
LEVELS = np.linspace(0.01, 0.99, 99)


@picture
def calibration(
    adata: AnnData,
    *,
    key: str | None = None,
    ax: Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> list[Axes] | Figure | None:
    """Coverage of central posterior intervals against their nominal level.

    Left the coverage, over cells and dimensions, right how far it is from nominal, in percentage
    points. Points are the levels of :func:`scuvae.tl.calibration`, with two standard errors on the
    right; lines are all other levels. Dashed: what full-covariance posteriors predict of the
    diagonal ones. In the gray band lie 95 % of the coverages of exact posteriors, were all
    intervals independent (binomial, each level by itself).

    Parameters
    ----------
    adata
        Data with ``uns["scuvae_calibration"]`` from :func:`scuvae.tl.calibration`.
    key
        The fit; None for the default.
    ax
        Two axes to draw in; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    save
        A file to write the picture to, such as ``"loss.png"`` or ``"loss.pdf"``; it is then not
        shown unless ``show=True``.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    Both axes, the figure with ``return_fig``, or None if the figure was shown.

    Raises
    ------
    ValueError
        If there is no calibration of that key, or ``ax`` are not two.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.calibration(adata, n_cells=100)
    >>> left, right = scuvae.pl.calibration(adata, show=False)
    >>> left.get_xlabel(), left.get_ylabel()
    ('Nominal level (%)', 'Coverage (%)')
    """
    found = result(adata, key, Keys.of(key).calibration, "calibration", Mapping)
    table, pit = found.get("coverage"), found.get("pit")
    if not isinstance(table, pd.DataFrame) or not isinstance(pit, Mapping) or not pit:
        raise ValueError(
            f"adata.uns[{Keys.of(key).calibration!r}] is no result of tl.calibration: call "
            "scuvae.tl.calibration(adata) again"
        )
    n_cells, n_latent = next(iter(pit.values())).shape
    axes = panels(ax, 2, 2, (3.6, 2.8))
    left, right = axes
    nominal = 100 * LEVELS

    band = 100 * ndtri(0.975) * np.sqrt(LEVELS * (1 - LEVELS) / (n_cells * n_latent))
    gray: dict[str, Any] = {"color": "0.85", "linewidth": 0, "zorder": 0}
    left.fill_between(nominal, nominal - band, nominal + band, **gray)
    right.fill_between(nominal, -band, band, label="exact, 95 %", **gray)
    left.plot([0, 100], [0, 100], color="0.5", linewidth=0.8, zorder=1)
    right.axhline(0, color="0.5", linewidth=0.8, zorder=1)

    points = 100 * table.index.to_numpy(dtype=float)
    for family, colour in zip(FAMILIES, colours(len(FAMILIES)), strict=True):
        if family not in pit:
            continue
        centred = np.sort(np.abs(2 * np.asarray(pit[family], dtype=float) - 1).ravel())
        curve = 100 * np.searchsorted(centred, LEVELS, side="right") / len(centred)
        covered, error = 100 * table[family], 200 * table[f"{family}_se"]
        # Wider where others may lie on top: with moments both families have the same margins.
        line: dict[str, Any] = {"color": colour, "linewidth": 2.6 if family == "full" else 1.2}
        left.plot(nominal, curve, **line)
        left.plot(points, covered, color=colour, marker="o", markersize=4, linestyle="")
        right.plot(nominal, curve - nominal, label=family, **line)
        dots: dict[str, Any] = {"fmt": "o", "markersize": 4, "elinewidth": 1.0}
        right.errorbar(points, covered - points, yerr=error, color=colour, **dots)
        if family == "diagonal" and "scale_ratio" in found:
            expected = _predicted(np.asarray(found["scale_ratio"], dtype=float))
            line["linestyle"] = (0, (3, 1.5))
            left.plot(nominal, expected, **line)
            right.plot(nominal, expected - nominal, label="diagonal, predicted", **line)

    for panel in axes:
        panel.set_xlim(0, 100)
        panel.set_xticks([0, 25, 50, 75, 100])
        panel.set_xlabel("Nominal level (%)")
    left.set_ylim(0, 100)
    left.set_yticks([0, 25, 50, 75, 100])
    left.set_ylabel("Coverage (%)")
    right.set_ylabel("Coverage − nominal (points)")
    right.legend(
        frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), borderpad=0
    )
    return finish(axes, left, own=ax is None, show=show, save=save, return_fig=return_fig)


def _predicted(ratio: np.ndarray) -> np.ndarray:
    """2 Φ(z_c r) − 1 averaged over cells and dimensions, in per cent."""
    values = np.array([np.mean(2 * ndtr(z * ratio) - 1) for z in ndtri(0.5 * (1 + LEVELS))])
    return 100 * values
