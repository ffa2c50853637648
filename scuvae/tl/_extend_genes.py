"""tl.extend_genes: a fit's decoder for genes that it was not fitted to."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse as sp

from scuvae._checks import names, whole
from scuvae._errors import near
from scuvae._keys import Keys
from scuvae.inference.mapping.gene_regressions import (
    GENES_AT_ONCE,
    FurtherGenes,
    Seen,
    predicted_totals,
    seen,
)
from scuvae.inference.training.gene_totals import DENOISING_DRAWS
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_entry, read_fit, sealed
from scuvae.io.further_genes import SLOT, extended_of, further_entry, likelihood_of
from scuvae.io.genes import cells_of, check_values
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import CHUNK, isolated, resolve_device
from scuvae.tl._whole_fit import whole_fit

logger = logging.getLogger("scuvae")

# Training cells at most that genes are fitted to, evenly spaced.
_MOST_CELLS = 20_000


@isolated
def extend_genes(
    adata: AnnData,
    *,
    genes: Iterable[str] | None = None,
    mask_var: str | np.ndarray | None = None,
    layer: str | None = None,
    key: str | None = None,
    key_added: str | None = None,
    min_counts: int = 10,
    n_samples: int = 2,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Fit the decoder's last layer for further genes, all else frozen.

    After a fit to some 2,000 variable genes: for denoising and differential expression of a whole
    transcriptome. Posteriors, and all that is said of the fitted genes, stay as they are, to the
    bit. A further gene's counts are regressed on what the last layer sees, with the fit's
    likelihood (its dispersion the gene's own) and the fit's prior of weights, over fixed draws of
    the posteriors and the training cells. Its rate is relative to a cell's total over the *fitted*
    genes, ln μ_j = ln ℓ + η_j − ln Σ_g exp(η_g) with g fitted: shares of fitted genes add up to
    one without it. Its intercept gives back the gene's total over all cells.

    :func:`scuvae.tl.denoise`, :func:`scuvae.tl.decode`, :func:`scuvae.tl.sample` and
    :func:`scuvae.tl.rank_genes` then know these genes too, of this AnnData and of projections onto
    it (but those with estimated batches). Nothing else asks them: posteriors, scores, maps, labels
    and novelty stand on the fitted genes.

    What further genes alone tell of a cell is lost that way. With ``key_added`` they are made a fit
    of its own instead, to all these genes alike, with one total over all: its decoder is the same,
    a wider last layer, but posteriors take natural steps with the counts of all genes. It has no
    encoder, and whatever reads a fit reads it.

    Parameters
    ----------
    adata
        Fitted to counts by :func:`scuvae.tl.fit`, with the further genes' counts beside.
    genes
        Names of genes to add; with ``mask_var=None`` too, None is all that were not fitted and
        have ``min_counts``.
    mask_var
        The same as a boolean column of ``var`` or a boolean array; fitted genes in it are no
        matter.
    layer
        Where the counts are; None: where the fit's were.
    key
        The fit; None for the default.
    key_added
        Name of a fit to all these genes, of which posteriors hear of further genes; None: the fit
        itself gets them, its posteriors as they are.
    min_counts
        Of a gene in all training cells; genes with fewer are left out, and logged.
    n_samples
        Fixed draws of z a cell.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, in place of an earlier call's,
    ``uns["scuvae"]["further"]``: ``var_names``, the last layer (``output``) and the parameters of
    the likelihood for these genes, float32. Files and model files have it with the fit. With
    ``key_added`` that is left alone, and the slots of a fit under this name are set, as
    :func:`scuvae.tl.fit` has them (its ``history`` is that of the fit of ``key``).

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or one to values that are no counts; a gene that
        ``adata`` does not have, or that was fitted; both ``genes`` and ``mask_var``; no gene left;
        values that are no counts; ``key_added`` with the name of ``key``, with another ``layer``
        than the fit's, or of a fit whose cells' totals were given (``size_factor_key``).

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.var["fitted"] = ~adata.var_names.isin(["CD3D", "LYZ"])
    >>> scuvae.tl.fit(adata, mask_var="fitted", max_epochs=5)
    >>> scuvae.tl.extend_genes(adata)
    >>> scuvae.tl.denoise(adata, genes=["CD3D", "LYZ"]).shape
    (700, 2)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    if fit.model.likelihood.link != "softmax":
        raise ValueError(
            f"likelihood={fit.model.likelihood.name!r} is of no counts, whose rates extend_genes "
            "fits: fit raw counts"
        )
    keys = None if key_added is None else _own_keys(adata, fit, key, key_added, layer)
    min_counts = whole("min_counts", min_counts)
    n_samples = whole("n_samples", n_samples)
    where = resolve_device(device)
    inputs.check_unique_genes(adata)
    columns = _columns(adata, fit, genes, mask_var)
    layer = fit.layer if layer is None else layer
    matrix = inputs.read_matrix(adata, layer, columns)
    check_values(matrix, adata, fit, layer, columns, stacklevel=5)
    rows = _training(adata, key)
    counts = sp.csc_matrix(matrix)
    total = np.asarray(counts[rows].sum(0)).ravel()
    kept = total >= min_counts
    if not kept.any():
        raise ValueError(
            f"none of the {len(kept)} genes has {min_counts} counts in the fit's training cells: "
            "pass others, or a lower min_counts"
        )
    if not kept.all():
        logger.info("%d genes have fewer than %d counts, left out", (~kept).sum(), min_counts)
    counts, columns = counts[:, kept], columns[kept]
    stored = read_posterior(adata, key).to(where)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where).requires_grad_(False)

    n_training = len(rows)
    if n_training > _MOST_CELLS:
        rows = rows[np.linspace(0, n_training - 1, _MOST_CELLS).astype(np.int64)]
    at = torch.as_tensor(rows, device=where)
    parts = [part for _, part in seen(model, cells, stored, at, n_samples, CHUNK)]
    fitter = FurtherGenes(model, parts, n_training)
    of_training = counts[rows]
    layers, likelihoods = [], []
    for first in range(0, len(columns), GENES_AT_ONCE):
        some = of_training[:, first : first + GENES_AT_ONCE].tocsr()
        own = likelihood_of(fit, some.shape[1])
        layers.append(fitter.fit(some, own))
        likelihoods.append(own)
    everyone = torch.arange(len(cells), device=where)

    def all_cells() -> Iterator[tuple[torch.Tensor, Seen]]:
        return seen(model, cells, stored, everyone, DENOISING_DRAWS, CHUNK)

    observed = torch.as_tensor(np.asarray(counts.sum(0), np.float64).ravel())
    predicted = predicted_totals(layers, likelihoods, all_cells)
    shift = (observed.clamp_min(1e-8) / predicted.clamp_min(1e-8)).log()
    for layer_, part in zip(layers, shift.split(GENES_AT_ONCE), strict=True):
        layer_.bias.data.add_(part.to(layer_.bias))

    entry = dict(read_entry(adata, key))
    entry[SLOT] = further_entry(adata.var_names[columns].astype(str), layers, likelihoods)
    if keys is not None:
        extended = extended_of(entry[SLOT], fit)
        split = adata.obs.get(Keys.of(key).obs["split"])
        slots = whole_fit(adata, fit, entry, extended, stored, split)
        out = target(adata, copy)
        slots.write(out, key_added)
        return out if copy else None
    out = target(adata, copy)
    out.uns[Keys.of(key).uns] = sealed(entry)
    return out if copy else None


def _own_keys(adata: AnnData, fit: Fit, key: str | None, key_added: str, layer: str | None) -> Keys:
    """The slots of a fit of its own, or an error that says why there can be none."""
    keys = Keys.of(key_added)
    if keys.uns == Keys.of(key).uns:
        raise ValueError(f"key_added={key_added!r} is the fit itself: pass another name, or None")
    keys.check_free(adata)
    if fit.size_factor_key is not None:
        raise ValueError(
            f"key_added={key_added!r}: the fit's totals are obs[{fit.size_factor_key!r}], which do "
            "not say what further genes add: leave key_added out, or fit all genes"
        )
    if layer is not None and layer != fit.layer:
        raise ValueError(
            f"layer={layer!r}, but the fit's counts are in {inputs.slot_name(fit.layer)}: a fit "
            "of its own has one: leave out layer= or key_added="
        )
    return keys


def _columns(adata: AnnData, fit: Fit, genes: Any, mask_var: Any) -> np.ndarray:
    """Columns of the genes to add, in the order of ``adata``."""
    fitted = adata.var_names.isin(fit.var_names)
    if genes is not None and mask_var is not None:
        raise ValueError("genes= and mask_var= both say which genes: leave out one")
    if genes is None:
        mask = inputs.gene_mask(adata, mask_var)
        chosen = ~fitted if mask is None else mask & ~fitted
    else:
        wanted = pd.Index(names("genes", genes))
        for wrong, what in (
            (wanted.difference(adata.var_names), "is no gene of adata"),
            (wanted.intersection(fit.var_names), "was fitted"),
        ):
            if len(wrong):
                hint = near(wrong[0], adata.var_names) if "no gene" in what else "Leave it out"
                raise ValueError(f"genes: {wrong[0]!r} {what}. {hint}")
        chosen = adata.var_names.isin(wanted)
    if not chosen.any():
        raise ValueError(
            f"the fit has all of adata's genes that were asked for: there is none to add to its "
            f"{len(fit.var_names)}"
        )
    return np.flatnonzero(chosen)


def _training(adata: AnnData, key: str | None) -> np.ndarray:
    """The fit's training cells; all where it does not say."""
    slot = Keys.of(key).obs["split"]
    if slot not in adata.obs:
        return np.arange(adata.n_obs)
    held_out = (inputs.obs_column(adata, slot) == "validation").to_numpy()
    return np.flatnonzero(~held_out) if not held_out.all() else np.arange(adata.n_obs)
