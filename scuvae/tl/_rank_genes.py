"""tl.rank_genes: genes that differ between groups, donors or cells being the replicates."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scuvae._checks import names, real, whole
from scuvae._keys import check_holds_no_fit, check_name
from scuvae.inference.evaluation import change_from_others as others
from scuvae.inference.evaluation.adaptive_shrinkage import clearness, expected_false, shrink
from scuvae.inference.evaluation.differential_expression import (
    Evidence,
    Units,
    compare,
    composition,
    normal_quantile,
)
from scuvae.inference.evaluation.group_contrast import contrast
from scuvae.inference.evaluation.unit_totals import UnitTotals, add_cells
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_fit
from scuvae.io.further_genes import read_further
from scuvae.io.genes import cells_of, places
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.model.extended_model import ExtendedModel
from scuvae.runtime import CHUNK, isolated, resolve_device
from scuvae.tl._groups import Comparison, Design, design_of

SLOT = "rank_genes_groups"
# Other cells are asked where counts make at least this part of an estimate's variance: where donors
# do, the others have the same donors.
_BY_COUNTS = 0.35


@isolated
def rank_genes(
    adata: AnnData,
    groupby: str,
    *,
    groups: str | Iterable[str] = "all",
    reference: str = "rest",
    donor_key: str | None = None,
    key: str | None = None,
    key_added: str | None = None,
    threshold: float = 0.0,
    min_counts: int = 10,
    n_samples: int = 4,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Differential expression between groups of cells, with probabilities; in scanpy's own slot.

    Pass ``donor_key`` where cells come from several donors (patients, animals, cultures) and the
    question is of donors. Then donors are the replicates: a gene has to change by more than donors
    of one group differ. Their spread, a gene's own, is weighed against that of all genes, so that
    three donors a group can do; on top of it count the finite number of a donor's cells and of
    their counts, and what the posteriors leave open. A donor with cells in both groups is compared
    with itself. Without ``donor_key`` cells are the replicates: what is found holds for these
    donors' cells, not for other donors, and among many cells the smallest change is found.

    Compared are the counts of whole groups (a donor's, added up) at one total, corrected for the
    composition of each: most genes do not change. The model says how much such sums vary
    (:mod:`scuvae.inference.evaluation.unit_totals`). With donors, where cells of ``adata`` are in
    neither group, it also says which genes go with the shift that the groups show in latent space,
    as those cells tell: that makes some changes likelier before the counts of few cells are looked
    at.
    So pass all cells, with a column such as ``"B_stimulated"``, rather than those of one type.

    Genes are those of the fit; to test others too, call :func:`scuvae.tl.extend_genes` first.

    Parameters
    ----------
    adata
        Fitted to counts by :func:`scuvae.tl.fit`, or projected.
    groupby
        A column of ``obs`` with names of groups. Cells without one are in none, not in the rest.
    groups
        Those to compare, in the order to write them; ``"all"`` of the column's.
    reference
        The group to compare with, or ``"rest"`` for all other cells.
    donor_key
        A column of ``obs`` that says whose a cell is. Each side needs two donors.
    key
        The fit; None for the default.
    key_added
        The slot of ``uns`` to write; None for ``"rank_genes_groups"``, scanpy's default.
    threshold
        The smallest change that matters, in log2: ``prob_de`` and ``expected_fdr`` are of changes
        beyond it. 0: of any.
    min_counts
        Genes with fewer counts in both groups together are not tested: their p is 1, ``prob_de`` 0.
    n_samples
        Fixed draws of z a cell, of which variances are made.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``uns["rank_genes_groups"]``, read by
    ``sc.get.rank_genes_groups_df`` and ``sc.pl.rank_genes_groups*``: of the genes that were
    modelled and observed, sorted by ``scores`` with the highest first, a structured array each with
    a field a group.

    ``names``, ``scores``
        Genes, and with donors the z whose two-sided p is ``pvals``, with the sign of the change.
        Without donors, for markers: log2 of the group's rate over the geometric mean of the other
        groups' (each counts for itself, by the root of its number of cells), shrunk by how clear
        the counts leave it; half at 16 standard errors
        (:mod:`scuvae.inference.evaluation.group_contrast`). So a gene that a few cells of the rest
        have too is still a marker. Genes that are not tested have one as well.
    ``logfoldchanges``
        log2 of the ratio of means, group over reference, by the counts alone; bounded where one is
        zero.
    ``pvals``, ``pvals_adj``
        Of no change: from the likelihood ratio of the counts, averaged over the donors' spread as
        far as it is known (a moderated test; without donors that of cells). No other cells enter.
        Adjusted by Benjamini & Hochberg over genes that were tested.
    ``prob_de``
        The posterior probability of a change beyond ``threshold``.
    ``lfsr``
        The probability that the change is zero or of the other sign.
    ``expected_fdr``
        Of the list of all genes no less sure than this one, the share expected to be false: not
        beyond ``threshold`` in the direction seen. Genes below .05 are a list with 5 % false ones.
    ``params``
        The arguments, as scanpy has them.

    The last three use the distribution of changes over all genes (adaptive shrinkage), and other
    cells as above; they find more than ``pvals_adj`` where types are rare and respond as others do.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or one to values that are no counts; an unknown column
        or group; a side with fewer than two cells or donors; without donors, groups that share no
        batch of the fit.

    Warns
    -----
    UserWarning
        Donors of two groups share no batch: the batches' differences are then the groups'.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.rank_genes(adata, "cell_type", groups=["CD19+ B"])
    >>> "CD79A" in adata.uns["rank_genes_groups"]["names"]["CD19+ B"][:10]
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    if fit.model.likelihood.support != "counts":
        raise ValueError(
            f"likelihood={fit.model.likelihood.name!r} is of no counts, which rank_genes compares: "
            "fit raw counts, or use scanpy.tl.rank_genes_groups"
        )
    slot = SLOT if key_added is None else check_name("key_added", key_added)
    check_holds_no_fit(adata, "key_added", slot)
    change = real("threshold", threshold, low=0) * math.log(2)
    min_counts = whole("min_counts", min_counts, at_least=1)
    n_samples = whole("n_samples", n_samples)
    wanted = groups if isinstance(groups, str) and groups == "all" else names("groups", groups)
    design = design_of(adata, fit, groupby, wanted, reference, donor_key)
    ranking = Ranking(adata, fit, key, design, resolve_device(device), n_samples)

    found: dict[str, dict[str, np.ndarray]] = {}
    for comparison in design.comparisons:
        found[comparison.group] = ranking.table(comparison, change, min_counts)
    out = target(adata, copy)
    out.uns[slot] = {
        "params": {
            "groupby": groupby,
            "reference": reference,
            "method": "scuvae",
            "use_raw": False,
            "layer": fit.layer,
            "corr_method": "benjamini-hochberg",
            "donor_key": donor_key,
            "key": key,
            "threshold": threshold,
            "min_counts": min_counts,
            "n_samples": n_samples,
        },
        **_records(found),
    }
    return out if copy else None


class Ranking:
    """Totals of all units, and the comparisons made of them."""

    def __init__(
        self,
        adata: AnnData,
        fit: Fit,
        key: str | None,
        design: Design,
        where: torch.device,
        n_samples: int,
    ) -> None:
        stored = read_posterior(adata, key).to(where)
        self.cells = cells_of(adata, fit, device=where)
        columns, positions = places(adata, fit, self.cells)
        model: VAE | ExtendedModel = fit.model.to(where)
        extended = read_further(adata, key, fit)
        if extended is not None:
            self.cells, model = extended.cells(adata, self.cells, where), extended.model.to(where)
            others_, more = extended.places(adata, self.cells)
            columns, positions = (
                np.concatenate(p) for p in ((columns, others_), (positions, more))
            )
            order = np.argsort(columns)
            columns, positions = columns[order], positions[order]
        self.names, self.design = adata.var_names[columns].to_numpy(), design
        self.genes = torch.as_tensor(positions, device=where)
        self.z = stored.mean
        unit = torch.as_tensor(design.unit, device=where)
        used = (unit >= 0).nonzero()[:, 0]
        self.totals = UnitTotals.zeros(len(design.units), len(self.genes), model.n_latent)
        for batch in self.cells.loader(used, CHUNK):
            q, of = stored[batch.index], unit[batch.index]
            add_cells(self.totals, model, batch, of, q, self.genes, n_samples)

    def table(
        self, comparison: Comparison, threshold: float, min_counts: int
    ) -> dict[str, np.ndarray]:
        """All fields of a group, genes in the order of ``adata``."""
        totals = self.totals.merged(torch.as_tensor(comparison.members))
        units = Units(
            totals.counts,
            totals.exposure.clamp_min(1e-6),
            totals.variance(),
            *(torch.as_tensor(values) for values in comparison.sides),
        )
        tested = totals.counts.sum(0) >= min_counts
        units = units.of(tested)
        units = units.scaled(composition(units).exp())
        evidence = compare(units, donors=self.design.donors)
        predicted = self._predicted(comparison, totals, evidence, tested)
        changes = shrink(evidence.change, evidence.scale, *predicted, threshold=threshold)
        values = {
            "logfoldchanges": (evidence.change / math.log(2), 0.0),
            "pvals": (evidence.log_p.exp(), 1.0),
            "pvals_adj": (_benjamini_hochberg(evidence.log_p.exp()), 1.0),
            "prob_de": (changes.beyond, 0.0),
            "lfsr": (changes.false_sign, 1.0),
            "expected_fdr": (expected_false(changes.error), 1.0),
        }
        if self.design.donors:
            z = normal_quantile(evidence.log_p)
            values["scores"] = (z * evidence.change.sign(), 0.0)
        out = {"names": self.names}
        if not self.design.donors:
            out["scores"] = self._contrast(comparison).numpy()
        for name, (value, otherwise) in values.items():
            wide = torch.full((len(tested),), otherwise, dtype=torch.float64)
            wide[tested] = value
            out[name] = wide.numpy()
        return out

    def _contrast(self, comparison: Comparison) -> Tensor:
        """The group against each other group of the comparison, in log2; also of untested genes."""
        used = np.flatnonzero(comparison.members.any(0))
        own = comparison.members[comparison.sides[0]].any(0)[used]
        group, batch = torch.as_tensor(np.array(self.design.units)[used]).T
        totals, rows = self.totals, torch.as_tensor(used)
        parts = (totals.counts[rows], totals.exposure[rows].clamp_min(1e-6), totals.cells[rows])
        return contrast(*parts, group, batch, int(group[own.argmax()])) / math.log(2)

    def _predicted(
        self, comparison: Comparison, totals: UnitTotals, evidence: Evidence, tested: Tensor
    ) -> tuple[Tensor, ...]:
        """Changes that the other cells predict, and how clearly; nothing where there are none."""
        rows = comparison.others
        if not self.design.donors or len(rows) < others.FEWEST:
            return ()
        if len(rows) > others.MOST:
            rows = rows[np.linspace(0, len(rows) - 1, others.MOST).astype(np.int64)]
        slopes = others.regress(
            self.cells,
            torch.as_tensor(rows, device=self.z.device),
            self.z,
            self.genes[tested.to(self.genes.device)],
        )
        direction, spread = _latent_change(totals, comparison)
        predicted, variance = slopes.change(direction)
        of_donors = torch.einsum("ig,ij,jg->g", slopes.beta, spread, slopes.beta)
        clear = clearness(predicted, (variance + of_donors).clamp_min(1e-12).sqrt())
        return predicted, torch.where(evidence.by_counts > _BY_COUNTS, clear, 0.0)


def _latent_change(totals: UnitTotals, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """z̄_A − z̄_B, donors' means averaged, and its covariance by the donors' spread."""
    mean = totals.latent / totals.cells.clamp_min(1)[:, None]
    first, _, pair = (torch.as_tensor(values) for values in comparison.sides)
    a, b = mean[first], mean[~first]
    both = pair[first & (pair >= 0)]
    if len(both) >= 2:
        at = {
            side: {int(p): i for i, p in enumerate(pair[first == side])} for side in (True, False)
        }
        difference = torch.stack([a[at[True][int(p)]] - b[at[False][int(p)]] for p in both])
        return difference.mean(0), difference.T.cov() / len(difference)
    return a.mean(0) - b.mean(0), a.T.cov() / len(a) + b.T.cov() / len(b)


def _benjamini_hochberg(p: Tensor) -> Tensor:
    n = len(p)
    order = p.argsort(descending=True)
    rank = torch.arange(n, 0, -1, dtype=p.dtype)
    out = torch.empty_like(p)
    out[order] = (p[order] * n / rank).cummin(0).values.clamp_max(1) if n else p
    return out


def _records(found: dict[str, dict[str, np.ndarray]]) -> dict[str, np.recarray]:
    """As scanpy has them: an array a field, a column a group, each in the order of its scores."""
    order = {group: np.argsort(-t["scores"], kind="stable") for group, t in found.items()}
    kinds = {"names": "O", "pvals": "float64", "pvals_adj": "float64"}
    fields = next(iter(found.values()))
    return {
        field: pd.DataFrame(
            {group: t[field][order[group]] for group, t in found.items()}
        ).to_records(index=False, column_dtypes=kinds.get(field, "float32"))
        for field in fields
    }
