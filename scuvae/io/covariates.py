"""Columns of obs that a model sees: batches and other covariates, size factors."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._adata import column_of, find_level, level_names, names_in
from scuvae._checks import plain
from scuvae.model.covariates import Categorical, Continuous, Covariates, Design

logger = logging.getLogger("scuvae")

# A column of floats with more values than this is a measurement, not a batch.
MOST_FLOAT_LEVELS = 20
# Fewer cells a level than this, and the covariate takes from cells what the model is to explain.
_FEWEST_CELLS = 2
# A continuous covariate that varies by less, relative to its size, is constant but for rounding.
_CONSTANT = 1e-6
# Size factors that differ from totals by such a factor are on another scale.
_OTHER_SCALE = 2.0
# So many of the fit's standard deviations from its mean, values are more likely in another unit.
_FAR = 20.0
# What missing values become where a column is made text.
_ABSENT = {"", "nan", "none", "null", "<na>", "nat"}


# --- of a fit -----------------------------------------------------------------------------------


def read_covariates(
    adata: AnnData,
    batch_key: str | None,
    categorical_keys: Iterable[str] | None,
    continuous_keys: Iterable[str] | None,
    *,
    stacklevel: int = 5,
) -> Covariates | None:
    """The design of a fit, from columns of obs, and the cells' covariates; None without any."""
    labels = [] if batch_key is None else [("batch_key", batch_key)]
    for key in _keys("categorical_covariate_keys", categorical_keys):
        labels.append(("categorical_covariate_keys", key))
    numbers = _keys("continuous_covariate_keys", continuous_keys)
    every = [("continuous_covariate_keys", key) for key in numbers] + labels
    for i, (argument, key) in enumerate(every):
        for other, same in every[:i]:
            if key == same:
                raise ValueError(
                    f"{argument} and {other} both name {key!r}: a covariate enters once. "
                    "Leave out one"
                    if argument != other
                    else f"{argument} names {key!r} twice: leave out one"
                )
    categorical, codes = [], []
    for argument, key in labels:
        code, levels = _levels(adata, argument, key)
        dtype = column_of(adata, argument, key).dtype
        measured = str(dtype) if dtype.kind == "f" else ""
        _warn_of_levels(code, levels, key, measured, stacklevel + 1)
        categorical.append(Categorical(key, tuple(levels)))
        codes.append(code)
    continuous, values = [], []
    for key in numbers:
        value = _numbers(adata, "continuous_covariate_keys", key)
        mean, scale = float(value.mean()), float(value.std())
        if scale <= _CONSTANT * abs(mean) or not scale:
            raise ValueError(
                f"adata.obs[{key!r}] is {value[0]:g} for all {len(value)} cells: a covariate that "
                "does not vary explains nothing. Leave it out of continuous_covariate_keys="
            )
        continuous.append(Continuous(key, mean, scale))
        values.append((value - mean) / scale)
    if not every:
        return None
    design = Design(tuple(categorical), tuple(continuous), batch_key is not None)
    return _covariates(adata, design, codes, values)


def _warn_of_levels(
    code: np.ndarray, levels: list[str], key: str, measured: str, stacklevel: int
) -> None:
    """``measured``: the dtype of a column of floats, else ""."""
    n_cells = np.bincount(code, minlength=len(levels))
    slot = f"adata.obs[{key!r}]"
    if measured and len(levels) > 1:
        warnings.warn(
            f"{slot} has dtype {measured}, and its {len(levels)} values are taken for names: a "
            "measurement goes into continuous_covariate_keys=. Convert names to a category, "
            ".astype('category')",
            stacklevel=stacklevel,
        )
    absent = [level for level in levels if level.lower() in _ABSENT]
    if absent:
        n_absent = int(n_cells[levels.index(absent[0])])
        warnings.warn(
            f"{slot} has a level {absent[0]!r}, of {n_absent} cells: is it a missing value that "
            "has become text? Give these cells their own, or drop them",
            stacklevel=stacklevel,
        )
    if len(levels) > 2 and len(code) < _FEWEST_CELLS * len(levels):
        warnings.warn(
            f"{slot} has {len(levels)} levels for {len(code)} cells, nearly one for every cell: "
            "what it adds in the decoder takes the place of z. Is it a measurement "
            "(continuous_covariate_keys=), or the cells' names?",
            stacklevel=stacklevel,
        )
    elif len(levels) > 1 and n_cells.min() == 1:
        alone = [levels[i] for i in np.flatnonzero(n_cells == 1)]
        listed = ", ".join(map(repr, alone[:5])) + (", ..." if len(alone) > 5 else "")
        warnings.warn(
            f"{slot} has levels with a single cell: {listed}. What such a level adds cannot be "
            "told from what is the cell's own. Join these cells to other levels, or drop them",
            stacklevel=stacklevel,
        )
    elif len(levels) == 1:
        logger.info("%s is %r for every cell: it explains nothing", slot, levels[0])


# --- of cells under a fit -----------------------------------------------------------------------


def match_covariates(adata: AnnData, design: Design, *, extend: bool = False) -> Covariates | None:
    """The covariates of cells under a fit's design.

    ``extend``: levels that the fit has not seen follow its own, sorted; otherwise they are an
    error. The result's design has them.
    """
    if not design.n_columns:
        return None
    found, codes = design, []
    for number, one in enumerate(design.categorical):
        argument = "batch_key" if design.has_batch and not number else "categorical_covariate_keys"
        code, levels = _levels(adata, argument, one.key, one.levels)
        unknown = levels[len(one.levels) :]
        if unknown and not extend:
            kind = "batches" if argument == "batch_key" else "levels"
            raise ValueError(
                f"adata.obs[{one.key!r}] has {kind} that the fit has not seen: "
                f"{', '.join(map(repr, unknown[:5]))}. Known: "
                f"{', '.join(map(repr, one.levels[:10]))}. "
                "tl.project(..., new_batches='estimate') estimates what they add, for itself and "
                "for other calls on the same adata"
            )
        found = found.with_levels(number, unknown)
        codes.append(code)
    values = []
    for amount in design.continuous:
        value = _numbers(adata, "continuous_covariate_keys", amount.key)
        standardised = (value - amount.mean) / amount.scale
        if len(value) and (farthest := np.abs(standardised).max()) > _FAR:
            warnings.warn(
                f"adata.obs[{amount.key!r}] is up to {farthest:.0f} of the fit's standard "
                f"deviations ({amount.scale:.3g}) from its mean ({amount.mean:.3g}): is it in the "
                "same unit?",
                stacklevel=5,
            )
        values.append(standardised)
    return _covariates(adata, found, codes, values)


def batch_codes(
    adata: AnnData, batch_key: str | None, known: Sequence[str] | None = None
) -> tuple[np.ndarray | None, list[str]]:
    """Each cell's batch as a number, and the batches' names: those of a fit, then others."""
    if batch_key is None:
        return None, []
    return _levels(adata, "batch_key", batch_key, known)


# --- columns ------------------------------------------------------------------------------------


def _keys(argument: str, keys: object) -> list[str]:
    if keys is None:
        return []
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise TypeError(
            f"{argument}={keys!r} is a {type(keys).__name__}: pass a list of columns of adata.obs"
        )
    return [plain(key) for key in keys]


def _levels(
    adata: AnnData, argument: str, key: str, known: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Each cell's level as a number, and the levels' names: those known first, then others sorted.

    Levels are what values say, however they are stored: 1, 1.0, True and "1" are one.
    """
    column = names_in(adata, argument, key)
    missing = column.isna().to_numpy()
    what = "batch" if argument == "batch_key" else "level"
    if missing.any():
        first = adata.obs_names[int(np.flatnonzero(missing)[0])]
        raise ValueError(
            f"adata.obs[{key!r}] is missing for {missing.sum()} cells, first {first!r}: "
            f"give these cells a {what}, or drop them"
        )
    if known is None and column.dtype.kind == "f" and column.nunique() > MOST_FLOAT_LEVELS:
        raise ValueError(
            f"adata.obs[{key!r}] is {column.dtype} with {column.nunique()} values: it looks "
            f"like a measurement, not a {what}. Pass it in continuous_covariate_keys=, or convert "
            "it with .astype(str) if it is one"
        )
    code, kinds = pd.factorize(column)
    names = level_names(kinds)
    levels = list(known or ())
    place: dict[str, int] = {}
    for name in sorted(names):
        number = find_level(name, levels) if known is not None or _mixed(column) else None
        if number is None:
            levels.append(name)
            number = len(levels) - 1
        place[name] = number
    return np.array([place[name] for name in names], np.int32)[code], levels


def _mixed(column: pd.Series) -> bool:
    """Whether values of several types stand in one column, where 1 and "1" are one level."""
    kinds = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return kinds.dtype == object and pd.api.types.infer_dtype(kinds).startswith("mixed")


def _numbers(adata: AnnData, argument: str, key: str) -> np.ndarray:
    """A column of finite numbers, float64."""
    column = column_of(adata, argument, key)
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
        raise TypeError(
            f"adata.obs[{key!r}] has dtype {column.dtype}, but {argument} are numbers: convert it "
            "with .astype(float), or pass it in categorical_covariate_keys="
        )
    values = column.to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"adata.obs[{key!r}] is {values[row]:g} for {bad.sum()} cells, first "
            f"{adata.obs_names[row]!r}: give these cells a value, or drop them"
        )
    return values


def _covariates(
    adata: AnnData, design: Design, codes: list[np.ndarray], values: list[np.ndarray]
) -> Covariates:
    def table(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        whole = np.stack(parts, 1) if parts else np.zeros((adata.n_obs, 0))
        return torch.as_tensor(np.ascontiguousarray(whole, dtype=dtype))

    return Covariates(design, table(codes, np.int32), table(values, np.float32))


def size_factors(adata: AnnData, key: str | None) -> np.ndarray | None:
    """A column of obs with positive expected totals, or None for each cell's own total."""
    if key is None:
        return None
    column = column_of(adata, "size_factor_key", key)
    if not pd.api.types.is_numeric_dtype(column) or column.dtype.kind in "bc":
        raise TypeError(
            f"adata.obs[{key!r}] has dtype {column.dtype}, but size factors are numbers, the total "
            "counts expected of each cell: convert it with .astype(float)"
        )
    values = column.to_numpy(dtype=np.float32, na_value=np.nan)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"adata.obs[{key!r}] is {values[row]:g} at cell {adata.obs_names[row]!r}: size factors "
            "must be finite and positive, in counts"
        )
    return values


def warn_of_size_factors(
    key: str | None,
    values: np.ndarray | None,
    totals: np.ndarray,
    every: Callable[[], np.ndarray] | None,
    *,
    stacklevel: int,
) -> None:
    """Warn, with both figures, where size factors are no totals of the modelled genes.

    ``totals``: the cells' over these genes; ``every``: makes those over all genes, where a mask
    leaves some out.
    """
    if values is None or not (totals > 0).any():
        return
    there = totals > 0
    typical, found = float(np.median(values[there])), float(np.median(totals[there]))
    said = (
        f"adata.obs[{key!r}], the size factors, has a median of {typical:.4g}, while the cells' "
        f"totals over the modelled genes have one of {found:.4g}"
    )
    if every is not None and typical > found:
        whole = every()
        # Cells of which both say the same, but for roundings.
        if np.mean(np.abs(values - whole) < 0.01 * whole) > 0.5 and typical > 1.02 * found:
            warnings.warn(
                f"{said}: they are the totals over all genes, also those that mask_var= leaves "
                "out. Leave out size_factor_key=, or sum the modelled genes alone",
                stacklevel=stacklevel,
            )
            return
    if not 1 / _OTHER_SCALE < typical / found < _OTHER_SCALE:
        warnings.warn(
            f"{said}: size factors are expected totals, in counts, neither relative to a mean nor "
            "logarithms. Multiply those of mean one by the mean total, or leave out "
            "size_factor_key=",
            stacklevel=stacklevel,
        )
