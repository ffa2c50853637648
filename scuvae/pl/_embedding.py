"""Per-cell scores of a fit on a two-dimensional embedding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .._errors import near
from .._keys import OBS_NAMES
from ._cells import scores
from ._common import finish, panels, point_size
from ._latent import bare, coordinates, latent, slots

COLUMNS = 3
# Colours end where one cell in a hundred lies beyond them.
ROBUST = 1.0
MISSING = "lightgray"
# What is drawn unless asked otherwise, where there is such a column.
DEFAULTS = ("amortization_gap", "scale", "neighbor_stability", "elbo", "novelty")


def embedding_scores(
    adata: AnnData,
    *,
    basis: str = "umap",
    key: str | None = None,
    color: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
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
    key
        The fit; None for the default.
    color
        None: those of ``"amortization_gap"``, ``"scale"``, ``"neighbor_stability"``, ``"elbo"`` and
        ``"novelty"`` that there are. Or one or several of: ``"scale"``, the geometric
        mean of a cell's posterior standard deviations over the latent dimensions (1
        for the prior, small where the counts say much);
        ``"amortization_gap"``; any other per-cell score of the fit, such as ``"elbo"`` or
        ``"pareto_k"`` from :func:`scuvae.tl.score`.
    ax
        Axes to draw in, one per panel; None makes a figure.
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
        If the embedding, the posterior or a score does not exist, or a score has no value at all.

    Examples
    --------
    >>> import numpy as np, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    >>> adata.obsm["X_scuvae_scale"] = np.full((adata.n_obs, 10), 0.3)
    >>> adata.obs["scuvae_amortization_gap"] = np.linspace(0, 9, adata.n_obs)
    >>> axes = scuvae.pl.embedding_scores(adata, show=False)
    >>> [ax.get_title() for ax in axes]
    ['Amortization gap', 'Posterior scale']
    """
    if color is None:
        color = _present(adata, key)
    names = [color] if isinstance(color, str) else list(color)
    if not names:
        raise ValueError("color is empty: pass one or several scores, such as 'amortization_gap'")
    place, label = coordinates(adata, basis)
    values = [_values(adata, key, name) for name in names]

    own = ax is None
    axes = panels(ax, len(names), COLUMNS, (3.7, 2.9))
    for panel, name, value in zip(axes, names, values, strict=True):
        _draw(panel, place, name, value)
        bare(panel, label)
    return finish(axes, axes[0], own=own, show=show, return_fig=return_fig)


def _present(adata: AnnData, key: str | None) -> list[str]:
    """Those of the default's scores that can be drawn; else the scale, to be missed."""
    found = slots(adata, key)
    there = {"scale"} if found.scale in adata.obsm else set()
    for name in DEFAULTS:
        values = adata.obs.get(found.obs[name])
        if values is not None and np.isfinite(values.to_numpy(dtype=float)).any():
            there.add(name)
    return [name for name in DEFAULTS if name in there] or ["scale"]


def _values(adata: AnnData, key: str | None, name: str) -> np.ndarray:
    if name == "scale":
        scale = latent(adata, slots(adata, key).scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            values: np.ndarray = np.exp(np.log(scale).mean(axis=1))
    else:
        known = [n for n in OBS_NAMES if n not in ("split", "label", "scale")]
        if name not in known:
            raise ValueError(
                f"color={name!r} is no score of a fit. {near(name, ['scale', *known])}"
            )
        values = scores(adata, key, name, "amortization_gap" if "gap" in name else "score")
    if not np.isfinite(values).any():
        raise ValueError(f"color={name!r} has no finite value in any of the {adata.n_obs} cells")
    return values


def _draw(ax: Axes, place: np.ndarray, name: str, values: np.ndarray) -> None:
    seen = np.isfinite(place).all(axis=1)
    known = seen & np.isfinite(values)
    missing = np.flatnonzero(seen & ~known)
    dots: dict[str, Any] = {"s": point_size(int(seen.sum())), "linewidths": 0, "rasterized": True}
    ax.scatter(place[missing, 0], place[missing, 1], c=MISSING, **dots)
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
    if name == "effective_sample_size":
        return title, "draws"
    if name in ("neighbor_stability", "pareto_k") or name.startswith("novelty"):
        return title, ""
    return (f"{title}, standard error" if name.endswith("_se") else title), "nats per cell"
