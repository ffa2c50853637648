"""Slots of ``obsm`` for the pictures: embeddings, and the moments of posteriors."""

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes

from .._errors import near
from .._keys import SCVI, Keys


def slots(adata: AnnData, key: str | None) -> Keys:
    """The names of a fit's slots, also of one by ``external.scvi`` under its default name."""
    keys = Keys.of(key)
    if key == SCVI and keys.mean not in adata.obsm:
        return Keys.of(key, SCVI)
    return keys


def latent(adata: AnnData, slot: str) -> np.ndarray:
    """``obsm[slot]`` in float64, (cells, latent dimensions)."""
    if slot not in adata.obsm:
        raise ValueError(
            f"adata.obsm has no {slot!r}. {near(slot, adata.obsm)} scuvae.tl.fit(adata) and "
            "scuvae.external.scvi.refine(model) write posteriors"
        )
    return np.asarray(adata.obsm[slot], dtype=float)


def coordinates(adata: AnnData, basis: str) -> tuple[np.ndarray, str]:
    """The first two columns of an embedding, (cells, 2), and their names, to be numbered."""
    if not isinstance(basis, str):
        raise TypeError(
            f"basis={basis!r} is a {type(basis).__name__}: pass the name of an embedding in "
            "adata.obsm"
        )
    for slot in (f"X_{basis}", basis):
        if slot in adata.obsm:
            values = np.asarray(adata.obsm[slot], dtype=float)
            if values.ndim != 2 or values.shape[1] < 2:
                raise ValueError(
                    f"adata.obsm[{slot!r}] has the shape {values.shape}: an embedding has two "
                    "columns at least"
                )
            name = slot.removeprefix("X_")
            names = {"umap": "UMAP", "pca": "PC", "tsne": "tSNE"}
            known = "Map " if name.endswith("_embed") else f"{name} "
            return values[:, :2], names.get(name, known) + "{}"
    advice = ""
    if basis in ("umap", "X_umap"):
        slot = Keys.of(None).embed
        advice = (
            f" Call scanpy.pp.neighbors(adata, use_rep={slot!r}) and scanpy.tl.umap(adata) first."
        )
    raise ValueError(f"adata.obsm has no embedding {basis!r}. {near(basis, adata.obsm)}{advice}")


def bare(ax: Axes, label: str) -> None:
    """The axes of an embedding, whose values mean nothing: no ticks, one unit for both."""
    ax.set_xlabel(label.format(1))
    ax.set_ylabel(label.format(2))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_aspect("equal", adjustable="datalim")
    ax.spines[["top", "right"]].set_visible(False)
