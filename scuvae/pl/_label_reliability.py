"""Whether labels are right as often as their probabilities say."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._adata import find_level, level_names, names_in
from .._errors import near
from .._keys import Keys
from .._reliability import expected_calibration_error, reliability
from ._common import colours, finish, picture

# Bars of counts take this part of the axes' height.
_BARS = 0.2
_LEVEL = 1.96


@picture
def label_reliability(
    adata: AnnData,
    *,
    labels: str | None = None,
    key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """A reliability diagram of transferred labels: how often those of a probability are right.

    Points are cells whose label is about as probable, with the 95 % that so many cells leave open
    (Wilson's interval); on the line probabilities are right. Bars at the bottom are the numbers of
    cells, and the legend has the expected calibration error: the mean distance from the line, by
    cells.

    Parameters
    ----------
    adata
        Cells with labels from :func:`scuvae.tl.transfer_labels`.
    labels
        A column of ``obs`` with what the labels should be, where that is known; cells without one
        are left out. None: what was found of the reference's own cells when probabilities were
        made, as they are and thinned.
    key
        The ``key_added`` of :func:`scuvae.tl.transfer_labels`; None for the default.
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
        If there are no labels with probabilities of that key, or no such column, or nothing in it.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:].copy()
    >>> scuvae.tl.fit(old, max_epochs=5)
    >>> scuvae.tl.transfer_labels(new, old)
    >>> ax = scuvae.pl.label_reliability(new, show=False)
    >>> ax.get_ylabel()
    'Share of right labels'
    """
    keys = Keys.of(key)
    found = adata.uns.get(keys.label_calibration)
    if not isinstance(found, Mapping) or "accuracy" not in found:
        argument = "" if key is None else f", key_added={key!r}"
        raise ValueError(
            f"adata.uns has no {keys.label_calibration!r}: call scuvae.tl.transfer_labels(adata, "
            f"reference{argument}) first, with a reference that probabilities can be found from"
        )
    series: dict[str, Mapping[str, Any]] = {}
    if labels is None:
        series["reference's cells"] = found
        if "thinned_accuracy" in found:
            names = ("count", "probability", "accuracy")
            series["… thinned"] = {name: found[f"thinned_{name}"] for name in names}
    else:
        series["cells"] = _judged(adata, labels, keys)

    own = ax is None
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 4.0), layout="constrained")
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    most = max(int(np.max(bins["count"])) for bins in series.values())
    for n, ((name, bins), colour) in enumerate(zip(series.items(), colours(2), strict=False)):
        count, mean, right = (
            np.asarray(bins[part], float) for part in ("count", "probability", "accuracy")
        )
        there = count > 0
        low, high = _wilson(right[there], count[there])
        error = expected_calibration_error({"count": count, "probability": mean, "accuracy": right})
        ax.errorbar(
            mean[there],
            right[there],
            yerr=np.clip([right[there] - low, high - right[there]], 0, None),
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            label=f"{int(count.sum()):,} {name}, ECE {error:.3f}",
            zorder=3,
        )
        width = 1 / len(count) / len(series)
        left = np.arange(len(count)) / len(count) + n * width
        height = _BARS * count / max(most, 1)
        ax.bar(left, height, 0.9 * width, align="edge", color=colour, alpha=0.3, zorder=2)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("Probability of the label")
    ax.set_ylabel("Share of right labels")
    ax.legend(loc="upper left", frameon=False, fontsize="small")
    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _judged(adata: AnnData, labels: str, keys: Keys) -> dict[str, np.ndarray]:
    """Bins of the cells whose labels are known."""
    if labels not in adata.obs:
        raise ValueError(
            f"labels={labels!r} is no column of adata.obs. {near(labels, list(adata.obs))}"
        )
    for slot, held in (
        (keys.obs["label_probability"], adata.obs),
        (keys.label_probabilities, adata.obsm),
    ):
        if slot not in held:
            raise ValueError(f"adata has no {slot!r} any more: call scuvae.tl.transfer_labels")
    truth = names_in(adata, "labels", labels)
    known = truth.notna().to_numpy()
    if not known.any():
        raise ValueError(f"adata.obs[{labels!r}] has no label: pass a column that has them")
    # By the probabilities, which cells that are unassigned have too. Their columns are all labels:
    # of the categories AnnData drops those that a part of the cells lacks. Columns have no slash.
    table = adata.obsm[keys.label_probabilities]
    columns = [str(name) for name in table.columns]
    code, kinds = pd.factorize(truth)
    found = [find_level(name.replace("/", "_"), columns) for name in level_names(kinds)]
    place = np.array([-1 if number is None else number for number in found], int)
    right = np.asarray(table).argmax(1) == place[code]
    sure = adata.obs[keys.obs["label_probability"]].to_numpy(dtype=float)
    return reliability(sure[known], right[known])


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion."""
    z = _LEVEL**2 / n
    middle = (share + z / 2) / (1 + z)
    half = np.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return middle - half, middle + half
