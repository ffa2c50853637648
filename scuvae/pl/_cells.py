"""Columns of ``obs`` for the pictures of cells: scores by fit, categories and their colours."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_rgba
from matplotlib.lines import Line2D

from .._adata import names_in
from .._errors import near
from .._keys import DEFAULT, SCVI, Keys
from ._common import colours

# Above these nobody tells groups apart; floats are more often measurements than labels.
MOST_LEVELS = 60
MOST_FLOAT_LEVELS = 20
UNLABELLED = "lightgray"


def scores(adata: AnnData, key: str | None, name: str, verb: str) -> np.ndarray:
    """The column ``name`` of a fit; ``verb`` of ``scuvae.tl`` or ``scuvae.pp`` writes it."""
    keys = Keys.of(key)
    column = keys.obs[name]
    if column not in adata.obs:
        raise ValueError(_missing(adata, keys.uns, name, column, verb))
    values = adata.obs[column]
    if not pd.api.types.is_numeric_dtype(values):
        raise ValueError(
            f"adata.obs[{column!r}] holds {values.dtype} values, not numbers: call "
            f"{_call(keys.uns, verb)} again"
        )
    return values.to_numpy(dtype=float)


def _call(key: str, verb: str) -> str:
    if key == SCVI:
        return "scuvae.external.scvi.refine(model)"
    part = "pp" if verb == "neighbors" else "tl"
    other = verb in ("novelty", "transfer_labels")  # these take a reference, and name their slots
    argument = f", {'key_added' if other else 'key'}={key!r}" if key != DEFAULT else ""
    return f"scuvae.{part}.{verb}(adata{', reference' if other else ''}{argument})"


def _missing(adata: AnnData, key: str, name: str, column: str, verb: str) -> str:
    what = f"adata.obs has no {column!r}. "
    fit = adata.uns.get(key)
    params = fit.get("params", {}) if isinstance(fit, Mapping) else {}
    if name == "amortization_gap" and not params.get("amortized", True):
        return (
            f"{what}adata.uns[{key!r}] is a fit with amortized=False: it has no encoder to judge. "
            "Fit with amortized=True or 'semi', or call scuvae.tl.to_encoder first"
        )
    others = [str(c) for c in adata.obs if str(c).endswith(f"_{name}")]
    if others and fit is None:
        ends = [c.removesuffix(f"_{name}") for c in others]
        return f"{what}adata.uns has no {key!r} either. For key=: {near(key, ends)}"
    return f"{what}Call {_call(key, verb)} first."


def categories(adata: AnnData, groupby: str) -> pd.Categorical:
    """``obs[groupby]`` as categories, which it must be or resemble: few values, many cells each."""
    if not isinstance(groupby, str):
        raise TypeError(
            f"groupby={groupby!r} is a {type(groupby).__name__}: pass the name of one column of "
            "adata.obs"
        )
    if groupby not in adata.obs:
        raise ValueError(f"adata.obs has no {groupby!r}. {near(groupby, adata.obs)}")
    column = names_in(adata, "groupby", groupby)
    levels = column.dropna().unique()
    floats = pd.api.types.is_float_dtype(column)
    most = MOST_FLOAT_LEVELS if floats else MOST_LEVELS
    if len(levels) > most:
        labels = [c for c in adata.obs if isinstance(adata.obs[c].dtype, pd.CategoricalDtype)]
        known = f" Categorical columns: {near(groupby, labels)}" if labels else ""
        raise ValueError(
            f"adata.obs[{groupby!r}] holds {len(levels):,} different values ({column.dtype}), more "
            f"than the {most} that can be told apart: pass a column of labels, or cut this one "
            f"with pandas.cut.{known}"
        )
    if not len(levels):
        raise ValueError(
            f"adata.obs[{groupby!r}] has no value in any of the {adata.n_obs} cells: pass another "
            "column"
        )
    return pd.Categorical(column)


def category_colours(
    adata: AnnData, groupby: str, groups: pd.Categorical
) -> dict[object, tuple[float, ...]]:
    """Each category's colour: scanpy's in ``uns`` where there are enough, else colours of ours."""
    names = list(groups.categories)
    stored = adata.uns.get(f"{groupby}_colors")
    # scanpy, too, takes the first ones where there are too many.
    known = [] if stored is None else list(np.ravel(stored))[: len(names)]
    if len(known) == len(names) and all(is_color_like(c) for c in known):
        return dict(zip(names, map(to_rgba, known), strict=True))
    return dict(zip(names, colours(len(names)), strict=True))


def shown(names: Iterable[object], most: int) -> list[str]:
    """The names, long ones without their middle, where all can still be told apart."""
    full = [str(name) for name in names]
    end = (most - 1) // 2
    cut = [n if len(n) <= most else f"{n[: most - 1 - end]}…{n[-end:]}" for n in full]
    return cut if len(set(cut)) == len(set(full)) else full


# A legend's longest name, its lines a column, and inches that a column takes beside its longest
# name, per letter.
_LONGEST, _ROWS, _MARK, _LETTER = 36, 15, 0.45, 0.075


def legend_width(groups: pd.Categorical | None) -> float:
    """Inches that a legend of the categories takes beside the axes."""
    if groups is None:
        return 0.0
    names = shown(groups.categories, _LONGEST)
    columns = 1 + (len(names) - 1) // _ROWS
    return columns * (_MARK + _LETTER * max(map(len, names), default=0))


def coloured(
    ax: Axes, adata: AnnData, groupby: str, groups: pd.Categorical, drawn: np.ndarray
) -> np.ndarray:
    """Each cell's colour, after a legend beside the axes of the categories that have cells."""
    found = category_colours(adata, groupby, groups)
    palette = np.array([*found.values(), to_rgba(UNLABELLED)])
    present = np.unique(groups.codes[drawn])
    names = dict(enumerate(shown(groups.categories, _LONGEST))) | {-1: "NA"}
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5, "markeredgewidth": 0}
    handles = [
        Line2D([], [], color=palette[code], label=names[code], **dot)
        # Cells without a category come last, as code -1 of the palette.
        for code in sorted(present, key=lambda code: (code < 0, code))
    ]
    ax.legend(
        handles=handles,
        title=groupby,
        frameon=False,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=1 + (len(handles) - 1) // _ROWS,
        columnspacing=1.0,
    )
    colours_of_cells: np.ndarray = palette[groups.codes]
    return colours_of_cells


def left_out(n: int, of: int, why: str) -> str:
    """A line below an axis label that says how many cells are not drawn; empty for none."""
    return f"\n({n:,} of {of:,} cells {why}, not drawn)" if n else ""
