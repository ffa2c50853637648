"""Change and probability of each gene."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._checks import real, whole
from .._errors import near
from ._common import colours, finish, picture, point_size

GROUND = "0.75"
# Probabilities closer to one are drawn there.
LEAST = 1e-12
# The height of a label, and what all may take, in parts of the axes.
_LINE = 0.055
_NAMES = 0.9
# What the names take at either side, in parts of the range of changes.
_ROOM = 0.3


@picture
def volcano(
    adata: AnnData,
    *,
    group: str | None = None,
    key: str | None = None,
    fdr: float = 0.05,
    n_genes: int = 10,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """log2 change of each gene against the probability that it is none.

    Upwards is sure: the vertical axis is 1 − ``prob_de``, logarithmic. In colour the list whose
    expected false-discovery rate is ``fdr``; the title says how many genes it has.

    Parameters
    ----------
    adata
        Data with ``uns["rank_genes_groups"]`` from :func:`scuvae.tl.rank_genes`.
    group
        One of its groups; None for the first.
    key
        The slot of ``uns``, ``key_added`` of :func:`scuvae.tl.rank_genes`; None for
        ``"rank_genes_groups"``.
    fdr
        The expected share of false genes in the list.
    n_genes
        Genes of the list to name, those with the highest absolute scores.
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
        If the slot is not there or was written by another function, or has no such group.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.rank_genes(adata, "cell_type", groups=["CD19+ B"])
    >>> ax = scuvae.pl.volcano(adata, show=False)
    >>> ax.get_xlabel()
    'log2 change, CD19+ B against rest'
    """
    fdr = real("fdr", fdr, above=0, below=1)
    n_genes = whole("n_genes", n_genes, at_least=0)
    found = _result(adata, "rank_genes_groups" if key is None else key)
    known = list(found["names"].dtype.names)
    group = known[0] if group is None else group
    if group not in known:
        raise ValueError(f"group={group!r} was not compared. {near(group, known)}")
    change = np.asarray(found["logfoldchanges"][group], dtype=float)
    sure = np.maximum(1 - np.asarray(found["prob_de"][group], dtype=float), LEAST)
    listed = np.asarray(found["expected_fdr"][group], dtype=float) <= fdr

    score = np.abs(np.asarray(found["scores"][group], dtype=float))
    named = np.flatnonzero(listed)
    best = named[np.argsort(-score[named], kind="stable")[:n_genes]]
    sides = {"right": best[change[best] > 0], "left": best[change[best] <= 0]}

    own = ax is None
    line, most = _LINE, int(_NAMES / _LINE)
    if ax is None:
        taller = max(1.0, max(map(len, sides.values())) / most)
        _, ax = plt.subplots(figsize=(4.6, 4.0 * taller), layout="constrained")
        line, most = line / taller, n_genes
    up, down, *_ = colours(3)
    colour = np.where((change > 0)[:, None], up[:3], down[:3])
    size = 4 * point_size(len(change))
    style: dict[str, Any] = {"s": min(size, 16.0), "linewidths": 0, "rasterized": True}
    ax.scatter(change[~listed], sure[~listed], c=GROUND, **style)
    ax.scatter(change[listed], sure[listed], c=colour[listed], **style)
    # In a column at their side, with a line to each: the surest genes lie all at one height. The
    # highest is named first, of several the outermost, so that lines hardly cross; the axis makes
    # room for the names.
    low, high = float(change.min()), float(change.max())
    room = _ROOM * (high - low)
    for side, genes in ((side, genes[:most]) for side, genes in sides.items()):
        if side == "right" and len(genes):
            ax.set_xlim(right=high + room)
        elif len(genes):
            ax.set_xlim(left=low - room)
        for row, gene in enumerate(genes[np.lexsort((-np.abs(change[genes]), sure[genes]))]):
            ax.annotate(
                str(found["names"][group][gene]),
                (change[gene], sure[gene]),
                xytext=(0.98 if side == "right" else 0.02, 0.9 - line * row),
                textcoords="axes fraction",
                ha=side,
                va="top",
                fontsize="small",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "0.7",
                    "linewidth": 0.5,
                    "relpos": (0 if side == "right" else 1, 0.5),
                },
            )
    ax.set_yscale("log")
    ax.set_ylim(2, min(float(sure.min()), 0.1) / 3)
    ax.axvline(0, color="0.5", linewidth=0.8, zorder=0)
    reference = found["params"]["reference"]
    ax.set_xlabel(f"log2 change, {group} against {reference}")
    ax.set_ylabel("1 − probability of a change")
    ax.set_title(f"{listed.sum():,} genes, {fdr:.0%} expected to be false", fontsize="medium")
    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _result(adata: AnnData, slot: str) -> Mapping[str, Any]:
    found = adata.uns.get(slot)
    if isinstance(found, Mapping) and "prob_de" in found:
        return found
    if isinstance(found, Mapping) and "names" in found:
        raise ValueError(
            f"adata.uns[{slot!r}] has no probabilities, another function wrote it: call "
            "scuvae.tl.rank_genes(adata, groupby) first"
        )
    others = [
        name for name, held in adata.uns.items() if isinstance(held, Mapping) and "prob_de" in held
    ]
    known = f" For key=: {near(slot, others)}" if others else ""
    raise ValueError(
        f"adata.uns has no {slot!r}. Call scuvae.tl.rank_genes(adata, groupby) first.{known}"
    )
