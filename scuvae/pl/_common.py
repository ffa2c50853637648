"""What every picture shares: which fits there are, their colours, and when to show."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._errors import near
from .._keys import DEFAULT, Keys

T = TypeVar("T")

# Entries read at once: 32 MiB a matrix in float64, whatever the size of the data.
BLOCK = 4_194_304


def fits(adata: AnnData, keys: str | Sequence[str] | None) -> list[str]:
    """The ``uns`` keys of the fits asked for; None means all, the default key first."""
    known = [
        k
        for k, v in adata.uns.items()
        if isinstance(v, Mapping) and {"params", "history"} <= set(v)
    ]
    known.sort(key=lambda k: k != DEFAULT)
    if keys is None:
        if not known:
            raise ValueError("adata.uns holds no fit. Call scuvae.tl.fit(adata) first.")
        return known
    asked = [keys] if isinstance(keys, str) else list(keys)
    for key in asked:
        if key not in known:
            raise ValueError(f"adata.uns has no fit {key!r}. {near(key, known)}")
    return asked


def matrix(adata: AnnData, layer: str | None) -> Any:
    """``adata.layers[layer]``, or ``adata.X`` for None."""
    if layer is None:
        if adata.X is None:
            raise ValueError("adata.X is None: pass layer= with the observed values.")
        return adata.X
    if layer not in adata.layers:
        raise ValueError(f"adata.layers has no {layer!r}. {near(layer, adata.layers)}")
    return adata.layers[layer]


def fitted_to(adata: AnnData, key: str | None, layer: str | None) -> tuple[Any, np.ndarray]:
    """The matrix that a fit was fitted to, and its genes there as column numbers.

    ``layer`` overrides the fit's own; without a fit (``key=None``), all genes. Genes that a
    projection did without are no part of it.
    """
    fit = {} if key is None else adata.uns[key]
    if fit and not layer:
        layer = fit["params"].get("layer") or None
    genes = np.arange(adata.n_vars)
    if "var_names" in fit:
        known = adata.var_names.isin(np.asarray(fit["var_names"]))
        missing = np.asarray(fit.get("genes", {}).get("missing", ()))
        genes = np.flatnonzero(known & ~adata.var_names.isin(missing))
        if not len(genes):
            raise ValueError(f"adata.var_names has none of the genes of the fit {key!r}.")
    return matrix(adata, layer), genes


def colours(n: int) -> list[tuple[float, ...]]:
    """``n`` colours that can be told apart: Dark2 for up to eight."""
    if n <= 8:
        return [plt.get_cmap("Dark2")(i) for i in range(n)]
    return [plt.get_cmap("turbo")(x) for x in np.linspace(0.05, 0.95, n)]


def panels(
    ax: Axes | Sequence[Axes] | None, n: int, columns: int, size: tuple[float, float], **grid: Any
) -> list[Axes]:
    """``n`` axes: those given, or of a new figure with so many columns and panels of that size."""
    if ax is not None:
        given = [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax, dtype=object)))
        if len(given) != n:
            raise ValueError(f"ax has {len(given)} axes for {n} panels.")
        return given
    columns = min(n, columns)
    rows = -(-n // columns)
    width, height = size[0] * columns, size[1] * rows
    _, made = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **grid
    )
    for spare in made.flat[n:]:
        spare.remove()
    return list(made.flat[:n])


def point_size(n: int) -> float:
    """The area of each of ``n`` points in points²: the more there are, the smaller."""
    return float(np.clip(12_000 / max(n, 1), 1, 12))


def result(adata: AnnData, key: str | None, slot: str, verb: str, kind: type) -> Any:
    """``adata.uns[slot]``, a ``kind`` that ``verb`` of ``scuvae.tl`` wrote for the fit ``key``."""
    found = adata.uns.get(slot)
    if isinstance(found, kind):
        return found
    others = [name.removesuffix(f"_{verb}") for name in adata.uns if name.endswith(f"_{verb}")]
    name = Keys.of(key).uns
    arguments = "" if name == DEFAULT else f", key={name!r}"
    known = f" For key=: {near(name, others)}" if others else ""
    raise ValueError(
        f"adata.uns has no {slot!r}. Call scuvae.tl.{verb}(adata{arguments}) first.{known}"
    )


def finish(
    drawn: T, ax: Axes, *, own: bool, show: bool | None, return_fig: bool
) -> T | Figure | None:
    """Show the figure of ``ax`` if that is wanted; what the plotting function is to return.

    ``show=None`` shows a figure made here (``own``) where it can be seen: in a notebook, an
    interactive session or a window. Without a display, ``drawn`` is returned instead.
    """
    figure = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    if show is None:
        seen = plt.isinteractive() or figure.canvas.required_interactive_framework is not None
        show = own and not return_fig and seen
    if show:
        plt.show()
    if return_fig:
        return figure
    return None if show else drawn
