"""Cells lined up with a fit's genes, by name."""

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae.batches import Cells
from scuvae.batches.sources.registry import source_of
from scuvae.batches.stored.matrix import StoredMatrix
from scuvae.io import inputs
from scuvae.io.covariates import match_covariates, size_factors
from scuvae.io.fit_state import Fit
from scuvae.model.covariates import Covariates

logger = logging.getLogger("scuvae")

# The version of an Ensembl id, or the number that anndata gives to a name that is there twice.
_VERSION = re.compile(r"\.\d+$")
# Of so many of the genes that are lacking another spelling is worth a word.
_MANY_ALIKE = 0.2


@dataclass(frozen=True)
class Matched:
    """Cells as a fit's model sees them, and what of the two was matched by name.

    ``found`` is a boolean mask over the fit's genes, ``n_unused`` the number of other genes that
    the cells have, ``covariates`` the cells' under the fit's design, or one with further levels.
    """

    cells: Cells
    found: np.ndarray
    n_unused: int
    covariates: Covariates | None


def cells_of(adata: AnnData, fit: Fit, device: torch.device | None = None) -> Cells:
    """The cells of an AnnData that holds the fit, over the genes that their posteriors stand on."""
    return match(adata, fit, device=device, genes=fit.var_names.difference(fit.missing)).cells


def match(
    adata: AnnData,
    fit: Fit,
    layer: str | None = None,
    device: torch.device | None = None,
    *,
    genes: pd.Index | None = None,
    extend: bool = False,
) -> Matched:
    """The cells of ``adata`` as the fit's model sees them: its genes, by name and in its order.

    Genes that ``adata`` lacks, or that are not among ``genes`` where these are given, are left out
    of the likelihood (``observed``); genes that the fit does not know are dropped. All are logged.
    ``extend``: levels of covariates that the fit has not seen follow its own.
    """
    device = device or torch.device("cpu")
    layer = fit.layer if layer is None else layer
    inputs.check_unique_genes(adata)
    position = adata.var_names.astype(str).get_indexer(fit.var_names)
    common = position >= 0
    if not common.any():
        raise ValueError(
            f"adata.var_names share no gene with the fit's {len(fit.var_names)}: the fit has "
            f"{some(fit.var_names)}, adata has {some(adata.var_names)}. "
            + (spelt_otherwise(adata.var_names, fit.var_names) or "Are both symbols, or both ids?")
        )
    found = common if genes is None else common & fit.var_names.isin(genes)
    if genes is not None and not found.any():
        raise ValueError(
            f"genes: none of the {len(genes)} to condition on ({some(genes)}) is among the "
            f"{common.sum()} that adata and the fit have in common "
            f"({some(fit.var_names[common])}). Are both symbols, or both ids?"
        )
    same = found.all() and np.array_equal(position, np.arange(adata.n_vars))
    columns = None if same else position[found]
    if not found.all():
        logger.info(
            "%d of the fit's %d genes are observed; the others are left out of the likelihood",
            found.sum(),
            len(found),
        )
    unknown, chosen_out = adata.n_vars - int(common.sum()), int((common & ~found).sum())
    if unknown:
        logger.info("%d genes unknown to the fit are not used", unknown)
    if chosen_out:
        logger.info("%d genes that the fit knows are not used by choice", chosen_out)

    matrix = inputs.read_matrix(adata, layer, columns, in_memory=False)
    check_values(matrix, adata, fit, layer, columns)
    covariates = match_covariates(adata, fit.design, extend=extend)
    if covariates is not None:
        covariates = covariates.to(device)
    size_factor = size_factors(adata, fit.size_factor_key)
    observed = None
    if not found.all():
        if size_factor is not None and fit.model.likelihood.link == "softmax":
            logger.info(
                "adata.obs[%r] is taken for each cell's total over all of the fit's genes",
                fit.size_factor_key,
            )
        matrix = spread(matrix, np.flatnonzero(found), len(found))
        observed = torch.as_tensor(found, device=device)
    cells = Cells(
        source_of(matrix, device),
        size_factor=None if size_factor is None else torch.tensor(size_factor, device=device),
        covariates=covariates,
        observed=observed,
    )
    return Matched(cells, found, unknown + chosen_out, covariates)


def warn_of_empty(fit: Fit, cells: Cells, so: str, *, stacklevel: int = 4) -> None:
    """Warn of cells without counts to go by, at the line that called the verb."""
    if fit.model.likelihood.support == "counts":
        empty = int((cells.source.totals() == 0).sum())
        if empty:
            text = f"{empty} cells have no counts in the observed genes: {so}"
            warnings.warn(text, stacklevel=stacklevel)


def places(adata: AnnData, fit: Fit, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Columns of ``adata`` with genes that are observed, ascending, and these genes' in the fit."""
    position = fit.var_names.get_indexer(adata.var_names.astype(str))
    use = position >= 0
    if cells.observed is not None:
        use &= cells.observed.cpu().numpy()[position]
    columns = np.flatnonzero(use)
    return columns, position[columns]


def check_values(
    x: Any, adata: AnnData, fit: Fit, layer: str | None, columns: Any, *, stacklevel: int = 6
) -> None:
    """Raise where values of some columns are none that the fit's likelihood can have."""
    likelihood = fit.model.likelihood
    inputs.check_values(
        x,
        adata,
        layer,
        columns,
        likelihood=likelihood.name,
        support=likelihood.support,
        fractions=not fit.params.get("check_values", True),
        fitting=False,
        stacklevel=stacklevel,
    )


def spelt_otherwise(names: pd.Index, lacking: pd.Index) -> str:
    """How a good part of the genes that are lacking would be found among the names; or ""."""
    if not len(lacking):
        return ""
    names, lacking = names.astype(str), lacking.astype(str)
    names = names.difference(lacking)
    best = max(SPELLINGS, key=lambda how: lacking.map(how).isin(names.map(how)).sum())
    n_found = int(lacking.map(best).isin(names.map(best)).sum())
    if n_found < max(1, _MANY_ALIKE * len(lacking)):
        return ""
    return (
        f"{n_found} of the genes that are lacking differ in {SPELLINGS[best]}: spell them alike, "
        "before fitting or in adata.var_names"
    )


def _without_version(name: str) -> str:
    return _VERSION.sub("", name)


# What names of one gene may differ in, and how to look past it.
SPELLINGS: dict[Callable[[str], str], str] = {
    _without_version: (
        "a version's suffix (adata.var_names.str.replace(r'\\.\\d+$', '', regex=True))"
    ),
    str.casefold: "upper and lower case (adata.var_names.str.upper())",
    str.strip: "spaces around them (adata.var_names.str.strip())",
    lambda name: _without_version(name.strip()).casefold(): "case, spaces and version suffixes",
}


def some(names: pd.Index) -> str:
    """The first few names, for a message."""
    return ", ".join([*map(repr, names[:3]), "..."])


def spread(matrix: Any, columns: np.ndarray, n_vars: int) -> Any:
    """``matrix`` with its columns at the places ``columns`` among ``n_vars``; the others unused."""
    if isinstance(matrix, StoredMatrix):
        return matrix.spread(columns, n_vars)
    if isinstance(matrix, np.ndarray):
        wide = np.zeros((matrix.shape[0], n_vars), np.float32)
        wide[:, columns] = matrix
        return wide
    return type(matrix)(
        (matrix.data, columns[matrix.indices], matrix.indptr), shape=(matrix.shape[0], n_vars)
    )
