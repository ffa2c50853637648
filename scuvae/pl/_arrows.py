"""Where refinement moved the cells: from the encoder's means to the refined ones."""

from os import PathLike

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from .._checks import whole
from ._cells import categories, coloured, legend_width
from ._common import finish, picture, point_size
from ._latent import bare, coordinates, latent, slots

GROUND = "0.82"
# Refined cells that a point is placed by on an embedding that is not linear.
NEIGHBOURS = 15


@picture
def refinement_arrows(
    adata: AnnData,
    *,
    key: str | None = None,
    refined_key: str | None = None,
    basis: str | None = None,
    groupby: str | None = None,
    max_arrows: int = 300,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """An arrow for each cell, from the encoder's posterior mean to the refined one.

    By default both are projected onto the first two principal components of the refined means,
    a linear map that shows every move as it is, but for what is perpendicular to the plane; the
    title has the share that is not. Gray points are all refined cells.

    On another embedding a mean between the cells has no place of its own. There an arrow ends at
    its cell, and its length is that between two averages: the places of the 15 refined cells
    nearest to the refined mean, and of those nearest to the encoder's, weighted by a Gaussian of
    their latent distance, the cell itself left out. Such an arrow says among which cells the
    encoder put this one, not how far it moved.

    Parameters
    ----------
    adata
        Data with both means.
    key
        The fit with the encoder; None for the default.
    refined_key
        The fit with the refined posteriors, as ``tl.refine(adata, key_added=...)`` names it. None:
        both are under ``key``, the encoder's means in ``obsm["X_scuvae_encoder"]``, as by
        :func:`scuvae.tl.to_encoder` and :func:`scuvae.external.scvi.refine` (``key="scvi"``).
    basis
        An embedding in ``obsm``, such as ``"umap"``; None for the principal components.
    groupby
        A column of ``obs`` with categories to colour the arrows by; colours are scanpy's,
        ``uns[f"{groupby}_colors"]``, where there are enough of them. None: black.
    max_arrows
        Cells with an arrow: of more a fixed random selection.
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
        If ``groupby`` or ``basis`` is not a string, or ``max_arrows`` not a whole number.
    ValueError
        If one of the means, the embedding or the categories does not exist, or the two means
        differ in their number of latent dimensions.

    Examples
    --------
    >>> import numpy as np, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> rng = np.random.default_rng(0)
    >>> adata.obsm["X_scuvae"] = rng.normal(size=(adata.n_obs, 10))
    >>> adata.obsm["X_scuvae_encoder"] = adata.obsm["X_scuvae"] + 0.3
    >>> ax = scuvae.pl.refinement_arrows(adata, groupby="cell_type", show=False)
    >>> ax.get_xlabel()
    'PC1 of the refined means'
    """
    max_arrows = whole("max_arrows", max_arrows)
    before, after = _means(adata, key, refined_key)
    groups = None if groupby is None else categories(adata, groupby)
    moved = np.flatnonzero(np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1))
    if basis is not None:
        place, label = coordinates(adata, basis)
        moved = moved[np.isfinite(place[moved]).all(axis=1)]
    if len(moved) < 2:
        raise ValueError(
            f"{len(moved)} cells have both means and a place, which are too few to draw: refine "
            "the fit again"
        )
    arrows = np.sort(np.random.default_rng(0).permutation(moved)[:max_arrows])
    share = None
    if basis is None:
        place, start, share = _projected(before, after, moved)
        label = "PC{} of the refined means"
    else:
        start = np.full_like(place, np.nan)
        start[arrows] = _displaced(before, after, place, moved, arrows)

    own = ax is None
    if ax is None:
        size = (4.2 + legend_width(groups), 3.9)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    x, y = place[moved].T
    ax.scatter(x, y, s=point_size(len(moved)), c=GROUND, linewidths=0, rasterized=True)
    colour = np.full((adata.n_obs, 4), (0.0, 0.0, 0.0, 1.0))
    if groups is not None and groupby is not None:
        colour = coloured(ax, adata, groupby, groups, arrows)
    ax.quiver(
        *start[arrows].T,
        *(place - start)[arrows].T,
        color=colour[arrows],
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.003,
        headwidth=4,
        headlength=5,
        headaxislength=4.5,
        minlength=0.5,
    )
    # quiver counts the tails alone among the data.
    ax.update_datalim(np.concatenate([start[arrows], place[arrows]]))
    bare(ax, label)
    ax.autoscale_view()
    which = "all" if len(arrows) == len(moved) else f"{len(arrows):,} of"
    said = "" if share is None else f"\nthe plane shows {share:.0%} of the squared moves"
    ax.set_title(f"Encoder to refined means, {which} {len(moved):,} cells{said}", fontsize="medium")
    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)


def _means(
    adata: AnnData, key: str | None, refined_key: str | None
) -> tuple[np.ndarray, np.ndarray]:
    keys = slots(adata, key)
    if refined_key is None:
        if keys.encoder not in adata.obsm and keys.mean in adata.obsm:
            raise ValueError(
                f"adata.obsm has no {keys.encoder!r}, the encoder's means beside the refined ones. "
                "Pass refined_key= with the key_added of scuvae.tl.refine"
            )
        names = keys.encoder, keys.mean
    else:
        names = keys.mean, slots(adata, refined_key).mean
    before, after = (latent(adata, name) for name in names)
    if before.shape != after.shape:
        raise ValueError(
            f"adata.obsm[{names[0]!r}] has the shape {before.shape}, adata.obsm[{names[1]!r}] "
            f"{after.shape}: pass the key of one fit and that of its own refinement"
        )
    return before, after


def _projected(
    before: np.ndarray, after: np.ndarray, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ends and starts in the plane of the refined means' first two principal components, and the
    share of the squared moves that lies in it."""
    centre = after[cells].mean(axis=0)
    _, _, axes = np.linalg.svd(after[cells] - centre, full_matrices=False)
    plane = np.zeros((after.shape[1], 2))  # with one latent dimension the second is zero
    plane[:, : len(axes[:2])] = axes[:2].T
    move = (after - before)[cells]
    whole = float(np.square(move).sum())
    share = float(np.square(move @ plane).sum()) / whole if whole > 0 else 1.0
    return (after - centre) @ plane, (before - centre) @ plane, share


def _displaced(
    before: np.ndarray, after: np.ndarray, place: np.ndarray, cells: np.ndarray, arrows: np.ndarray
) -> np.ndarray:
    """Where arrows to the places of some cells start, by the neighbours of their two means."""
    tree = cKDTree(after[cells])
    first, last = (
        _placed(tree, means[arrows], place[cells], cells, arrows) for means in (before, after)
    )
    start: np.ndarray = place[arrows] - (last - first)
    return start


def _placed(
    tree: cKDTree, means: np.ndarray, place: np.ndarray, cells: np.ndarray, own: np.ndarray
) -> np.ndarray:
    """The weighted average place of the refined cells nearest to each mean, but for its own."""
    distance, nearest = tree.query(means, k=min(NEIGHBOURS + 1, len(cells)))
    distance = np.where(cells[nearest] == own[:, None], np.inf, distance)
    # The mean distance is the kernel's width.
    finite = np.where(np.isfinite(distance), distance, np.nan)
    width = np.nanmean(finite, axis=1, keepdims=True)
    weight = np.exp(-0.5 * np.square(distance / np.maximum(width, 1e-12)))
    average: np.ndarray = (weight[..., None] * place[nearest]).sum(axis=1)
    return average / weight.sum(axis=1, keepdims=True)
