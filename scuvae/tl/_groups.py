"""Who is compared with whom: groups, their donors, and the units that both make."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae._adata import groups_of, names_in
from scuvae._errors import near
from scuvae.io.covariates import batch_codes
from scuvae.io.fit_state import Fit

logger = logging.getLogger("scuvae")


@dataclass(frozen=True)
class Comparison:
    """A group against its reference, or the rest.

    ``members`` says which of the design's units make each unit of this comparison, ``sides`` which
    of these are the group's, what stratum they are in and which donor's (−1: of one side alone),
    ``others`` are cells in neither.
    """

    group: str
    members: np.ndarray
    sides: tuple[np.ndarray, np.ndarray, np.ndarray]
    others: np.ndarray


@dataclass(frozen=True)
class Design:
    """Cells' units (−1: in no comparison), units' groups and donors or batches, comparisons."""

    unit: np.ndarray
    units: list[tuple[int, int]]
    donors: bool
    comparisons: list[Comparison]


def design_of(
    adata: AnnData,
    fit: Fit,
    groupby: str,
    groups: str | list[str],
    reference: str,
    donor_key: str | None,
) -> Design:
    """The units of ``adata`` and its comparisons, or an error that says what is wrong with them."""
    if not isinstance(reference, str):
        raise TypeError(
            f"reference={reference!r} is a {type(reference).__name__}: pass the name of a group, "
            "or 'rest'"
        )
    label = _column(adata, "groupby", groupby)
    known = [str(name) for name in label.categories]
    wanted = known if isinstance(groups, str) else list(dict.fromkeys(groups))
    for name in [*wanted, *([] if reference == "rest" else [reference])]:
        if name not in known:
            what = "reference" if name not in wanted else "groups"
            rest = " Or pass reference='rest'." if what == "reference" else ""
            raise ValueError(
                f"{what}: {name!r} is no group of adata.obs[{groupby!r}]. {near(name, known)}{rest}"
            )
    wanted = [name for name in wanted if name != reference]
    if not wanted:
        raise ValueError(
            f"groups={groups!r} holds nothing but the reference {reference!r}: pass another group"
        )
    code = np.asarray(label.codes, np.int64)
    batch, _ = batch_codes(adata, fit.batch_key, fit.batches)
    if donor_key is None:
        donor = np.zeros(adata.n_obs, np.int64) if batch is None else batch
    else:
        owner = _column(adata, "donor_key", donor_key)
        donor = np.asarray(owner.codes, np.int64)
    used = (code >= 0) & (donor >= 0)
    if not used.all():
        logger.info(
            "%d of %d cells have no group or no donor and are left out",
            (~used).sum(),
            len(used),
        )
    table = pd.DataFrame({"group": code, "donor": donor})[used]
    units = sorted(set(zip(table["group"], table["donor"], strict=True)))
    number = {unit: i for i, unit in enumerate(units)}
    unit = np.full(adata.n_obs, -1, np.int64)
    unit[used] = [number[pair] for pair in zip(table["group"], table["donor"], strict=True)]
    stratum = _strata(donor, batch) if donor_key is not None else {}

    comparisons = []
    for name in wanted:
        first = {known.index(name)}
        second = set(range(len(known))) - first
        if reference != "rest":
            second = {known.index(reference)}
        _check_cells(groupby, name, reference, code[used], first, second)
        comparison = _comparison(name, units, first, second, unit, stratum, code)
        if donor_key is not None:
            comparison = _checked(comparison, donor_key, reference)
        elif batch is not None:
            comparison = _shared(comparison, fit, reference)
        comparisons.append(comparison)
    compared = np.any([c.members.any(0) for c in comparisons], axis=0)
    unit = np.where((unit >= 0) & compared[unit], unit, -1)
    return Design(unit, units, donor_key is not None, comparisons)


def _column(adata: AnnData, argument: str, name: Any) -> pd.Categorical:
    """A column of names, without categories that no cell has."""
    values = names_in(adata, argument, name)
    if values.dtype.kind == "f":
        raise ValueError(
            f"adata.obs[{name!r}] is {values.dtype}, a measurement: pass {argument}= a column of "
            "names, or convert it with .astype(str)"
        )
    found = groups_of(values)
    if not len(found.categories):
        raise ValueError(
            f"adata.obs[{name!r}] is missing for all cells: pass {argument}= a column of names"
        )
    return found


def _check_cells(
    groupby: str, name: str, reference: str, code: np.ndarray, first: set[int], second: set[int]
) -> None:
    for what, kinds in ((name, first), (reference, second)):
        n = int(np.isin(code, list(kinds)).sum())
        if n < 2:
            raise ValueError(
                f"group {what!r} of adata.obs[{groupby!r}] has {n} cell{'s' * (n != 1)}: a "
                "comparison takes two on either side. Pass groups= without it, or join it with "
                "another"
            )


def _comparison(
    name: str,
    units: Sequence[tuple[int, int]],
    first: set[int],
    second: set[int],
    unit: np.ndarray,
    stratum: dict[int, int],
    code: np.ndarray,
) -> Comparison:
    """Units by donor of either side, the rest's groups added up."""
    rows, side, level, who = [], [], [], []
    for kinds, in_first in ((first, True), (second, False)):
        for donor in sorted({d for g, d in units if g in kinds}):
            rows.append([g in kinds and d == donor for g, d in units])
            side.append(in_first)
            level.append(stratum.get(donor, 0))
            who.append(donor)
    of, donors = np.array(side), np.array(who)
    both = np.intersect1d(donors[of], donors[~of])
    pair = np.where(np.isin(donors, both), donors, -1)
    neither = np.flatnonzero(~np.isin(code, list(first | second)))
    return Comparison(name, np.array(rows), (of, np.array(level), pair), neither)


def _strata(donor: np.ndarray, batch: np.ndarray | None) -> dict[int, int]:
    """Each donor's batch, where donors are in one each and batches have several; else nothing."""
    if batch is None:
        return {}
    table = pd.DataFrame({"donor": donor, "batch": batch})[donor >= 0].drop_duplicates()
    if table["donor"].duplicated().any() or not table["batch"].duplicated().any():
        return {}
    return dict(zip(table["donor"], table["batch"], strict=True))


def _checked(comparison: Comparison, donor_key: str, reference: str) -> Comparison:
    """Enough donors; and in strata that have both sides, where there are pairs or such strata."""
    first, stratum, pair = comparison.sides
    for what, side in ((comparison.group, first), (reference, ~first)):
        n = int(side.sum())
        if n < 2:
            raise ValueError(
                f"group {what!r} has cells of {n} donor{'s' * (n != 1)} of "
                f"adata.obs[{donor_key!r}]: donors' spread takes two on either side. Pass "
                "groups= without it, or donor_key=None to compare cells"
            )
    alone = pair < 0
    shared = np.intersect1d(stratum[alone & first], stratum[alone & ~first])
    if len(shared) or not alone.any() or (pair >= 0).any():
        return comparison
    warnings.warn(
        f"donors of {comparison.group!r} and {reference!r} share no batch of the fit: what differs "
        "between batches will look like a difference of the groups",
        stacklevel=6,
    )
    sides = (first, np.zeros_like(stratum), pair)
    return Comparison(comparison.group, comparison.members, sides, comparison.others)


def _shared(comparison: Comparison, fit: Fit, reference: str) -> Comparison:
    """The units of batches that have both sides."""
    pair = comparison.sides[2]
    kept = pair >= 0
    if not kept.any():
        raise ValueError(
            f"groups {comparison.group!r} and {reference!r} share no batch of "
            f"adata.obs[{fit.batch_key!r}]: their difference cannot be told from that of batches. "
            "Compare groups within batches, or pass donor_key= if batches are donors"
        )
    sides = tuple(values[kept] for values in comparison.sides)
    return Comparison(comparison.group, comparison.members[kept], sides, comparison.others)  # type: ignore[arg-type]
