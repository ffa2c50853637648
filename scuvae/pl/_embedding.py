"""Per-cell scores of a fit on a two-dimensional embedding."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .._errors import near
from .._keys import OBS_NAMES
from ._cells import scores
from ._common import finish, panels, picture, point_size
from ._latent import bare, coordinates, latent, slots

COLUMNS = 3
# Colours end where one cell in a hundred lies beyond them.
ROBUST = 1.0
MISSING = "lightgray"
# What is drawn by default, if the fit has it.
USUAL = ("scale", "neighbor_stability", "elbo", "novelty", "amortization_gap")


@picture
def embedding_scores(
    adata: AnnData,
    *,
    basis: str | None = None,
    key: str | None = None,
    color: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> list[Axes] | Figure | None:
    """Cells on an embedding, coloured by how well their posterior was found and how wide it is.

    One panel a score. Points are drawn in order of value, so that high ones are not hidden, and
    colours end at the 1st and 99th percentile, where the bar has a tip if cells lie beyond; the
    amortization gap begins at zero. Cells without a value are gray.

    Parameters
    ----------
    adata
        Data with an embedding and a fit by :func:`scuvae.tl.fit` or
        :func:`scuvae.external.scvi.refine`.
    basis
        The embedding, ``obsm["X_umap"]`` or ``obsm["umap"]`` for ``"umap"``; its first two columns.
        None: the UMAP where there is one, else the fit's own map (:func:`scuvae.tl.embed`).
    key
        The fit; None for the default.
    color
        One or several of: ``"scale"``, the geometric mean of a cell's posterior standard deviations
        over the latent dimensions (1 for the prior, small where the counts say much);
        ``"neighbor_stability"`` from :func:`scuvae.pp.neighbors`; ``"elbo"`` from
        :func:`scuvae.tl.score`; ``"novelty"``; ``"amortization_gap"``; any other per-cell score of
        the fit, such as ``"pareto_k"``. None for those of the five named first that the fit has:
        after :func:`scuvae.tl.fit` alone, the scale.
    ax
        Axes to draw in, one per panel; None makes a figure.
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
        If the embedding, the posterior or a score does not exist, a score has no value at all, or
        with ``color=None`` the fit has no score.

    Examples
    --------
    >>> import numpy as np, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    >>> adata.obsm["X_scuvae_scale"] = np.full((adata.n_obs, 10), 0.3)
    >>> adata.obs["scuvae_amortization_gap"] = np.linspace(0, 9, adata.n_obs)
    >>> axes = scuvae.pl.embedding_scores(adata, show=False)
    >>> [ax.get_title() for ax in axes]
    ['Posterior scale', 'Amortization gap']
    """
    if color is None:
        names = _usual(adata, key)
    else:
        names = [color] if isinstance(color, str) else list(color)
    if not names:
        raise ValueError("color is empty: pass one or several scores, such as 'amortization_gap'")
    place, label = coordinates(adata, basis or _basis(adata, key))
    values = [_values(adata, key, name) for name in names]

    own = ax is None
    axes = panels(ax, len(names), COLUMNS, (3.7, 2.9))
    for panel, name, value in zip(axes, names, values, strict=True):
        _draw(panel, place, name, value)
        bare(panel, label)
    return finish(axes, axes[0], own=own, show=show, save=save, return_fig=return_fig)


def _usual(adata: AnnData, key: str | None) -> list[str]:
    """Those of :data:`USUAL` that the fit has a value of, in some cell."""
    keys = slots(adata, key)
    found = []
    for name in USUAL:
        there = keys.obs[name] in adata.obs or (name == "scale" and keys.scale in adata.obsm)
        if there and np.isfinite(_column(adata, key, name)).any():
            found.append(name)
    if not found:
        columns = ", ".join(repr(keys.obs[name]) for name in USUAL)
        raise ValueError(
            f"nothing to draw: adata.obsm has no {keys.scale!r}, and adata.obs none of {columns} "
            "with a value. scuvae.tl.fit(adata) and scuvae.external.scvi.refine(model) write "
            f"posteriors. {near(keys.scale, adata.obsm)}"
        )
    return found


def _basis(adata: AnnData, key: str | None) -> str:
    """The UMAP, or the fit's map where there is none."""
    own = slots(adata, key).embed
    return own if own in adata.obsm and not {"X_umap", "umap"} & set(adata.obsm) else "umap"


def _values(adata: AnnData, key: str | None, name: str) -> np.ndarray:
    known = [n for n in OBS_NAMES if n not in ("split", "label")]
    if name not in known:
        raise ValueError(
            f"color={name!r} is no score of a fit. {near(name, known)} Genes and other columns of "
            "obs are for scanpy.pl.embedding."
        )
    values = _column(adata, key, name)
    if not np.isfinite(values).any():
        raise ValueError(f"color={name!r} has no finite value in any of the {adata.n_obs} cells")
    return values


def _column(adata: AnnData, key: str | None, name: str) -> np.ndarray:
    keys = slots(adata, key)
    if name != "scale" or (keys.scale not in adata.obsm and keys.obs[name] in adata.obs):
        return scores(adata, key, name, _verb(name))
    scale = latent(adata, keys.scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        values: np.ndarray = np.exp(np.log(scale).mean(axis=1))
    return values


def _verb(name: str) -> str:
    """The function that writes a score."""
    if name.startswith("novelty"):
        return "novelty"
    writers = {"neighbor_stability": "neighbors", "label_share": "transfer_labels"}
    return writers.get(name, "amortization_gap" if "gap" in name else "score")


def _draw(ax: Axes, place: np.ndarray, name: str, values: np.ndarray) -> None:
    seen = np.isfinite(place).all(axis=1)
    known = seen & np.isfinite(values)
    missing = np.flatnonzero(seen & ~known)
    dots: dict[str, Any] = {"s": point_size(int(seen.sum())), "linewidths": 0, "rasterized": True}
    ax.scatter(place[missing, 0], place[missing, 1], c=MISSING, **dots)
    if not known.any():
        raise ValueError(
            f"no cell has both a place in the embedding and a finite {name!r}: make them anew, or "
            "pass another basis= or color="
        )
    order = np.flatnonzero(known)
    order = order[np.argsort(values[order], kind="stable")]
    low, high = np.percentile(values[order], (ROBUST, 100 - ROBUST))
    if name.startswith("amortization_gap"):
        low = min(0.0, high)  # a perfect encoder's; what is below is noise
    x, y = place[order].T
    drawn = ax.scatter(x, y, c=values[order], vmin=low, vmax=high, cmap="viridis", **dots)
    below, above = bool(values[order[0]] < low), bool(values[order[-1]] > high)
    tips = {(True, True): "both", (True, False): "min", (False, True): "max"}
    title, unit = _names(name)
    bar = ax.figure.colorbar(
        drawn, ax=ax, extend=tips.get((below, above), "neither"), extendfrac=0.03, aspect=25
    )
    bar.outline.set_visible(False)
    bar.set_label(unit)
    bar.locator = MaxNLocator(nbins=5)
    bar.update_ticks()
    ax.set_title(title, fontsize="medium")


def _names(name: str) -> tuple[str, str]:
    """The title of a score's panel, and its unit."""
    title = name.removesuffix("_se").replace("_", " ")
    title = title[0].upper() + title[1:]
    title = {"Elbo": "ELBO", "Kl": "KL to the prior", "Pareto k": "Pareto k"}.get(title, title)
    if name == "scale":
        return "Posterior scale", "prior standard deviations"
    units = {
        "effective_sample_size": "draws",
        "pareto_k": "",
        "neighbor_stability": "share of neighbours that stay",
        "label_share": "share of votes",
        "label_probability": "",
        "novelty": "−log10 share of reference cells",
        "novelty_counts": "standard deviations",
        "novelty_latent": "standard deviations",
        "novelty_distance": "standard deviations",
        "novelty_shared": "standard deviations",
    }
    if name in units:
        return title, units[name]
    return (f"{title}, standard error" if name.endswith("_se") else title), "nats per cell"
