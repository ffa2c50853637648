"""What every picture shares: which fits there are, their colours, and when to show."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from .._adata import check_type
from .._checks import called_right, flags, path, plain
from .._errors import near
from .._keys import DEFAULT, Keys
from .._replacing import checked_target, replacing

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

# Entries read at once: 32 MiB a matrix in float64, whatever the size of the data.
BLOCK = 4_194_304


def picture(function: Callable[P, R]) -> Callable[P, R]:
    """A verb of pl: what all have in common is looked at first, and what fails leaves no figure."""
    parameters = signature(function).parameters

    @wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        called_right(parameters, function.__name__, args, kwargs)
        for name, value in kwargs.items():
            kwargs[name] = plain(value)
        flags(parameters, kwargs)
        check_type(args[0] if args else kwargs.get("adata"))
        if (save := kwargs.get("save")) is not None:
            _kind_of(save)
            checked_target(path("save", save, "a file"))
        if (ax := kwargs.get("ax")) is not None:
            _check_axes(ax, one=parameters["ax"].annotation == Axes | None)
        before = plt.get_fignums()
        try:
            return function(*args, **kwargs)
        except BaseException:
            for number in set(plt.get_fignums()) - set(before):
                plt.close(number)
            raise

    return drawn


def _check_axes(ax: object, *, one: bool) -> None:
    given = [ax] if one or isinstance(ax, Axes) else np.ravel(np.asarray(ax, dtype=object))
    if not all(isinstance(part, Axes) for part in given):
        raise TypeError(
            f"ax={ax!r} is a {type(ax).__name__}, not axes of matplotlib: pass those of "
            "plt.subplots(), or None for a new figure"
        )


def known_fits(adata: AnnData) -> list[str]:
    """The ``uns`` keys of all fits, the default key first."""
    known = [
        k
        for k, v in adata.uns.items()
        if isinstance(v, Mapping) and {"params", "history"} <= set(v)
    ]
    return sorted(known, key=lambda k: k != DEFAULT)


def fits(adata: AnnData, keys: str | Sequence[str] | None) -> list[str]:
    """The ``uns`` keys of the fits asked for; None means all, the default key first."""
    known = known_fits(adata)
    if keys is None:
        if not known:
            raise ValueError("adata.uns holds no fit. Call scuvae.tl.fit(adata) first.")
        for key in known:
            _check_entry(adata.uns[key], key)
        return known
    asked = [keys] if isinstance(keys, str) else list(keys)
    for key in asked:
        if key not in known:
            raise ValueError(f"adata.uns has no fit {key!r}. {near(key, known)}")
        _check_entry(adata.uns[key], key)
    return asked


def _check_entry(fit: Mapping[str, Any], key: str) -> None:
    """What pictures read of a fit is what a fit has: its digests are looked at by tl alone."""
    odd = ""
    history = fit["history"]
    if not isinstance(fit["params"], Mapping):
        odd = f"['params'] is a {type(fit['params']).__name__}"
    elif np.ndim(fit.get("var_names", ())) != 1:
        odd = f"['var_names'] is a {type(fit['var_names']).__name__}"
    elif isinstance(history, pd.DataFrame) and any(d.kind not in "fiu" for d in history.dtypes):
        odd = "['history'] holds what are no numbers"
    if odd:
        raise ValueError(
            f"adata.uns[{key!r}]{odd}, which no fit has: read an undamaged copy, or fit again"
        )


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


# Okabe & Ito's colours but yellow, a violet and a gray; then each as far as can be from all before
# it, for normal sight and for red or green blindness (Machado, Oliveira & Fernandes, IEEE TVCG
# 2009). The least CIE76 difference of the blind's is 14 among 8, 11.5 among 40.
_COLOURS = (
    "0072b2 d55e00 009e73 cc79a7 56b4e9 e69f00 7f3c8d 5b5b5b 0000ff 6969ff 691e00 c3e196 4b0096 "
    "d2d2c3 78f05a 6996ff 69e1f0 d23c3c 1e00c3 780f2d 5a1e4b 78c35a 3c5ac3 1e4bff ff6987 875a87 "
    "5a874b 784b00 2d3cc3 5a2d96 d2e100 e1a5c3 962d2d a587c3 f0873c 3c2d69 c3d2a5 a569d2 a5a596 "
    "b41e5a b4e178 78961e a5a569 a55a78 ff96ff e1c33c 1e4b69 f05aff c3a5d2 5a78a5 a5e1e1 d2b487 "
    "d200e1 c30f1e 7800e1 004b3c 0f1eb4 5a0078 d26969 0fb43c "
)


def colours(n: int) -> list[tuple[float, ...]]:
    """``n`` colours, up to 60 of which can be told apart, also by the colour-blind."""
    known = [to_rgba(f"#{code}") for code in _COLOURS.split()]
    return [known[i % len(known)] for i in range(n)]


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
    drawn: T,
    ax: Axes,
    *,
    own: bool,
    show: bool | None,
    save: str | PathLike[str] | None = None,
    return_fig: bool,
) -> T | Figure | None:
    """Write or show the figure of ``ax`` if that is wanted; what the picture is to return.

    ``show=None`` shows a figure made here (``own``) where it can be seen: in a notebook, an
    interactive session or a window; not one that is written to a file. Without a display,
    ``drawn`` is returned instead.
    """
    figure = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    if save is not None:
        _write(figure, save)
    if show is None:
        seen = plt.isinteractive() or figure.canvas.required_interactive_framework is not None
        show = own and not return_fig and save is None and seen
    if show:
        plt.show()
    if return_fig:
        return figure
    return None if show else drawn


def _kind_of(save: object) -> str:
    """The kind of picture that a file's name asks for."""
    text = path("save", save, "a file")
    kinds, suffix = FigureCanvasBase.get_supported_filetypes(), Path(text).suffix.removeprefix(".")
    if suffix not in kinds:
        raise ValueError(f"save={text!r} names no kind of picture. {near(suffix, kinds)}")
    return suffix


def _write(figure: Figure, save: str | PathLike[str]) -> None:
    """The file is the old picture or the new one, whatever happens meanwhile."""
    suffix = _kind_of(save)
    with replacing(checked_target(save)) as new:
        # SVG and PDF would carry the date.
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(new, dpi=200, bbox_inches="tight", metadata=dated.get(suffix))
