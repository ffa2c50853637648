"""The AnnData that is handed in, the column of obs that an argument names, and names in it."""

import re
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae._errors import near

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def check_type(adata: object, name: str = "adata") -> AnnData:
    """``adata`` itself, if it is an AnnData."""
    if isinstance(adata, AnnData):
        return adata
    kind = type(adata)
    if kind.__name__ == "MuData":
        modalities = ", ".join(map(repr, adata.mod))  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} is a MuData with modalities {modalities}: pass one of them, mdata[modality]"
        )
    if kind.__name__ == "Raw":
        raise TypeError(f"{name} is an AnnData's raw: pass {name} = adata.raw.to_adata()")
    hint = "anndata.read_h5ad(path)" if isinstance(adata, str | PathLike) else "AnnData(X)"
    raise TypeError(f"{name} is a {kind.__module__}.{kind.__name__}, not an AnnData: pass {hint}")


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """A column of obs, in memory also where ``anndata.experimental.read_lazy`` left it on disk."""
    column = adata.obs[key]
    return column if isinstance(column, pd.Series | pd.DataFrame) else column.to_pandas()


def column_of(adata: AnnData, argument: str, key: object, owner: str = "adata") -> pd.Series:
    """The one column of obs that an argument names."""
    if not isinstance(key, str):
        several = ": several go into categorical_covariate_keys=" if argument == "batch_key" else ""
        raise TypeError(
            f"{argument}={key!r} is a {type(key).__name__}: pass the name of one column of "
            f"{owner}.obs{several}"
        )
    if key not in adata.obs:
        raise ValueError(f"{argument}={key!r} is no column of {owner}.obs. {near(key, adata.obs)}")
    column = obs_column(adata, key)
    if isinstance(column, pd.DataFrame):
        raise ValueError(
            f"{owner}.obs has {column.shape[1]} columns named {key!r}, which {argument} names: "
            "keep one"
        )
    return column


def names_in(adata: AnnData, argument: str, key: object, owner: str = "adata") -> pd.Series:
    """A column whose values can be the names of batches, groups, donors or labels."""
    column = column_of(adata, argument, key, owner)
    dtype = column.dtype
    if isinstance(dtype, np.dtype):  # pandas counts neither half precision nor foreign byte orders
        known = np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")
        column = column.astype(known) if known != dtype or not dtype.isnative else column
    held = column.cat.categories if isinstance(dtype, pd.CategoricalDtype) else column
    if held.dtype == object and pd.api.types.infer_dtype(held, skipna=True) != "string":
        kept = pd.api.types.is_scalar
        odd = next((value for value in held if not kept(value)), None)
        if odd is not None:
            raise TypeError(
                f"{owner}.obs[{key!r}] holds {odd!r}, a {type(odd).__name__}, which is no name: "
                f"pass {argument} a column of text, or convert it with .astype(str)"
            )
    for value in column.dropna().unique():
        if isinstance(value, str) and not _goes_into_files(value):
            raise ValueError(
                f"{owner}.obs[{key!r}] holds {value!r}, which no file takes: rename it"
            )
    return column


def level_names(kinds: Iterable[Any]) -> list[str]:
    """What the values of a column are called."""
    index = pd.Index(kinds)
    if isinstance(index, pd.CategoricalIndex):  # whose dates have hours or none, by pandas' version
        index = index.categories.take(index.codes)
    return [str(name) for name in index.astype(str)]


def groups_of(column: pd.Series) -> pd.Categorical:
    """The names in a column as categories of text, without such as no cell has."""
    found = pd.Categorical(column).remove_unused_categories()
    kinds = level_names(found.categories)
    if len(set(kinds)) < len(kinds):  # 1 and "1" are one group
        return pd.Categorical(pd.Series(kinds, dtype=object).reindex(found.codes))
    return found.rename_categories(kinds)


def find_level(name: object, levels: Sequence[str]) -> int | None:
    """The number of the level with this value: by name, or else by what the name says."""
    text = str(name)
    if text in levels:
        return list(levels).index(text)
    value = _value(text)
    alike = [i for i, level in enumerate(levels) if _value(level) == value]
    return alike[0] if len(alike) == 1 else None


def _value(name: str) -> object:
    """What a level's name says: a number, where it is one written out."""
    if name in ("True", "False"):
        return float(name == "True")
    return float(name) if _NUMBER.fullmatch(name) else name


def _goes_into_files(name: str) -> bool:
    return "\0" not in name and not re.search("[\ud800-\udfff]", name)
