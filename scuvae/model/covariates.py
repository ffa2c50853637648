"""The design: what a decoder is told of a cell beside z, and the columns that it is told by.

A categorical covariate has a column of zeros and ones for each of its levels, a continuous one its
standardised values. The batch comes first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Categorical:
    """A column of labels, and its levels in their order."""

    key: str
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Continuous:
    """A column of numbers, of which the decoder sees (x − mean) / scale."""

    key: str
    mean: float
    scale: float

    def standardise(self, value: float) -> float:
        return (value - self.mean) / self.scale


@dataclass(frozen=True)
class Design:
    """The covariates of a fit.

    ``has_batch``: whether the first categorical one is the batch.
    """

    categorical: tuple[Categorical, ...] = ()
    continuous: tuple[Continuous, ...] = ()
    has_batch: bool = False

    @property
    def batch(self) -> Categorical | None:
        return self.categorical[0] if self.has_batch else None

    @property
    def batches(self) -> list[str]:
        return list(self.batch.levels) if self.batch else []

    @property
    def n_levels(self) -> tuple[int, ...]:
        """Levels of each categorical covariate."""
        return tuple(len(one.levels) for one in self.categorical)

    @property
    def n_columns(self) -> int:
        return sum(self.n_levels) + len(self.continuous)

    def columns_of(self, number: int) -> slice:
        """The columns of a categorical covariate, by its number."""
        first = sum(self.n_levels[:number])
        return slice(first, first + self.n_levels[number])

    def columns_of_each(self) -> list[slice]:
        """The columns of every covariate: categorical ones, then each continuous one's."""
        first = sum(self.n_levels)
        numbers = range(first, first + len(self.continuous))
        categorical = [self.columns_of(number) for number in range(len(self.categorical))]
        return [*categorical, *(slice(number, number + 1) for number in numbers)]

    def columns(self, codes: Tensor, values: Tensor) -> Tensor:
        """What the decoder is told, (cells, columns).

        Parameters
        ----------
        codes
            Numbers of the levels, (cells, categorical covariates).
        values
            Standardised values, (cells, continuous covariates).
        """
        parts = [
            torch.eye(n, device=values.device, dtype=values.dtype).index_select(0, codes[:, k])
            for k, n in enumerate(self.n_levels)
        ]
        return torch.cat([*parts, values], 1)

    def settings(self, n_levels: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Rows of columns that averages over all covariates are taken over, and what each weighs.

        Each level of each categorical covariate in turn, the others at the mean of theirs, and all
        continuous ones at their mean. Every covariate has the same weight, and every level of one:
        a covariate that is alone is averaged as if each cell came from every level.
        (All combinations would be as many as the product of the numbers of levels.)

        Parameters
        ----------
        n_levels
            Levels of each covariate that take part, from the first; None for all.
        """
        counts = self.n_levels if n_levels is None else tuple(n_levels)
        mean = torch.zeros(self.n_columns)
        for k, n in enumerate(counts):
            mean[self.columns_of(k)][:n] = 1 / n
        if not counts:
            return mean.unsqueeze(0), torch.ones(1)
        rows, weights = [], []
        for k, n in enumerate(counts):
            for level in range(n):
                row = mean.clone()
                row[self.columns_of(k)] = 0.0
                row[self.columns_of(k)][level] = 1.0
                rows.append(row)
                weights.append(max(counts) / n)
        return torch.stack(rows), torch.tensor(weights)

    def given(self, chosen: Mapping[str, Sequence[int] | float]) -> tuple[Tensor, Tensor]:
        """Which columns speak of some covariates, (columns,), and rows of what they say, one for
        each combination of the chosen levels, (combinations, columns).

        Parameters
        ----------
        chosen
            Numbers of levels of a categorical covariate, the value of a continuous one, by key.
        """
        which = torch.zeros(self.n_columns, dtype=torch.bool)
        options: list[list[tuple[int, float]]] = []
        for number, one in enumerate(self.categorical):
            if one.key in chosen:
                columns = self.columns_of(number)
                which[columns] = True
                options.append([(columns.start + level, 1.0) for level in chosen[one.key]])  # type: ignore[union-attr]
        for number, amount in enumerate(self.continuous, self.n_columns - len(self.continuous)):
            if amount.key in chosen:
                which[number] = True
                options.append([(number, amount.standardise(float(chosen[amount.key])))])  # type: ignore[arg-type]
        rows = []
        for combination in product(*options):
            row = torch.zeros(self.n_columns)
            for column, value in combination:
                row[column] = value
            rows.append(row)
        return which, torch.stack(rows)

    def with_levels(self, number: int, names: Sequence[str]) -> "Design":
        """The design with further levels of a categorical covariate, behind its own."""
        if not names:
            return self
        every = list(self.categorical)
        every[number] = replace(every[number], levels=(*every[number].levels, *names))
        return replace(self, categorical=tuple(every))

    def extends(self, other: "Design") -> bool:
        """Whether it is another design, but for further levels."""
        same = (self.has_batch, self.continuous) == (other.has_batch, other.continuous)
        return (
            same
            and len(self.categorical) == len(other.categorical)
            and all(
                own.key == few.key and own.levels[: len(few.levels)] == few.levels
                for own, few in zip(self.categorical, other.categorical, strict=True)
            )
        )

    def to_params(self) -> dict[str, Any]:
        """As plain arrays by the names of ``tl.fit``'s arguments; nothing for what there is not."""
        found: dict[str, Any] = {}
        others = self.categorical
        if self.batch:
            found["batch_key"] = self.batch.key
            found["batches"] = _names(self.batch.levels)
            others = others[1:]
        if others:
            found["categorical_covariate_keys"] = _names(one.key for one in others)
            # One after another: a name of a column may be none of a slot.
            found["categorical_covariate_levels"] = _names(
                level for one in others for level in one.levels
            )
            found["categorical_covariate_sizes"] = np.array([len(one.levels) for one in others])
        if self.continuous:
            found["continuous_covariate_keys"] = _names(one.key for one in self.continuous)
            for name in ("mean", "scale"):
                values = [getattr(one, name) for one in self.continuous]
                found[f"continuous_covariate_{name}s"] = np.array(values, float)
        return found

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> "Design":
        """The inverse of :meth:`to_params`; other entries are not looked at."""
        categorical = []
        has_batch = params.get("batch_key") is not None
        if has_batch:
            levels = tuple(str(name) for name in params.get("batches", ()))
            categorical.append(Categorical(str(params["batch_key"]), levels))
        levels = tuple(str(name) for name in params.get("categorical_covariate_levels", ()))
        for key, n in zip(
            params.get("categorical_covariate_keys", ()),
            params.get("categorical_covariate_sizes", ()),
            strict=True,
        ):
            categorical.append(Categorical(str(key), levels[: int(n)]))
            levels = levels[int(n) :]
        continuous = [
            Continuous(str(key), float(mean), float(scale))
            for key, mean, scale in zip(
                params.get("continuous_covariate_keys", ()),
                params.get("continuous_covariate_means", ()),
                params.get("continuous_covariate_scales", ()),
                strict=True,
            )
        ]
        return cls(tuple(categorical), tuple(continuous), has_batch)


@dataclass(frozen=True)
class Covariates:
    """The covariates of cells: numbers of levels, (cells, categorical), and standardised values,
    (cells, continuous)."""

    design: Design
    codes: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> Tensor:
        """What the decoder is told of some cells, (cells, columns)."""
        return self.design.columns(
            self.codes.index_select(0, index), self.values.index_select(0, index)
        )

    def part(self, rows: slice | Tensor) -> "Covariates":
        """Those of some cells."""
        return replace(self, codes=self.codes[rows], values=self.values[rows])

    def to(self, device: torch.device) -> "Covariates":
        return replace(self, codes=self.codes.to(device), values=self.values.to(device))


def _names(values: Any) -> np.ndarray:
    return np.array([str(value) for value in values], dtype=object)
