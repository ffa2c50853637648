"""Which cells, by name, are a reference's own, and whether they are."""

import hashlib
from typing import Any

import numpy as np
from anndata import AnnData

from scuvae._keys import Keys
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import Fit
from scuvae.io.genes import Matched, cells_of, some, spelt_otherwise
from scuvae.io.inputs import slot_name
from scuvae.runtime import logger

# Totals of one cell that were summed in another order.
_SAME = 1e-3


def check_genes(adata: AnnData, fit: Fit) -> None:
    """Raise where ``adata`` lacks some of the genes of the fit that is to get its cells."""
    names = adata.var_names.astype(str)
    lacking = fit.var_names.difference(names, sort=False)
    if not 0 < len(lacking) < len(fit.var_names):  # with none in common match says more
        return
    raise ValueError(
        f"adata.var_names lack {len(lacking)} of the reference's {len(fit.var_names)} genes "
        f"({some(lacking)}), and a fit stands on all. "
        + (spelt_otherwise(names, lacking) + ". " if spelt_otherwise(names, lacking) else "")
        + "anndata.concat(..., join='inner') loses those that one part lacks; "
        "scuvae.tl.project(adata, reference) finds posteriors of new cells from the others"
    )


def rows_in(adata: AnnData, reference: AnnData, key: str | None, fit: Fit) -> np.ndarray:
    """Each cell's row in a reference that has its posterior, -1 where there is none."""
    none = np.full(adata.n_obs, -1)
    if Keys.of(key).mean not in reference.obsm:
        return none
    names, known = adata.obs_names.astype(str), reference.obs_names.astype(str)
    shared = names.isin(known)
    if not shared.any():
        return none
    for owner, index in (("adata", names), ("the reference", known)):
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise ValueError(
                f"{owner}.obs_names has {twice!r} twice: names say which cells are the "
                "reference's. Make them unique"
            )
    if len(fit.missing):
        raise ValueError(
            f"adata has {shared.sum()} of the reference's cells, whose posteriors do without "
            f"{len(fit.missing)} of the fit's genes ({some(fit.missing)}): pass the fit that they "
            "were projected on as reference="
        )
    return np.asarray(known.get_indexer(names))


def check_same_cells(
    adata: AnnData, reference: AnnData, fit: Fit, matched: Matched, old: np.ndarray
) -> None:
    """Raise where a cell of that name has other values, or other covariates, in the reference."""
    here = np.flatnonzero(old >= 0)
    if not len(here) or reference is adata:
        return
    there = old[here]

    def differ(wrong: np.ndarray, slot: str, mine: np.ndarray, theirs: np.ndarray) -> None:
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"{int(wrong.sum())} cells have names that are in the reference, of other cells: "
                f"of {adata.obs_names[here[at]]!r} {slot} {mine[at]} in adata, {theirs[at]} in the "
                "reference. Give new cells names of their own"
            )

    design = fit.design
    keys = [one.key for one in design.categorical] + [one.key for one in design.continuous]
    if matched.covariates is not None and all(key in reference.obs for key in keys):
        told = match_covariates(reference, design, extend=True)
        assert told is not None
        for number, one in enumerate(design.categorical):
            mine, theirs = (
                np.array(covariates.design.categorical[number].levels, object)[
                    covariates.codes[:, number].cpu().numpy()[rows]
                ]
                for covariates, rows in ((matched.covariates, here), (told, there))
            )
            differ(mine != theirs, f"obs[{one.key!r}] is", mine, theirs)
    values = reference.X if fit.layer is None else reference.layers.get(fit.layer)
    if values is None or not fit.var_names.isin(reference.var_names.astype(str)).all():
        logger.info("the reference has no values of its cells: they are known by name alone")
        return
    total = matched.cells.source.totals().cpu().numpy()[here]
    other = cells_of(reference, fit).source.totals().cpu().numpy()[there]
    wrong = np.abs(total - other) > _SAME * (1 + np.abs(other))
    differ(wrong, f"the total over the fit's genes in {slot_name(fit.layer)} is", total, other)


def note_of(entry: dict[str, Any], old: np.ndarray, *, fine_tune: bool) -> dict[str, Any]:
    """What a fit grew from, for ``uns``."""
    text = str(entry.get("manifest", ""))
    return {
        "n_known": int((old >= 0).sum()),
        "n_new": int((old < 0).sum()),
        "fine_tuned": fine_tune,
        "version": str(entry["params"].get("version", "")),
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }
