"""tl.transfer_labels: labels of new cells, from those of a reference."""

import logging
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.nn import functional as F

from scuvae._checks import random_state_alias, whole
from scuvae._keys import Keys
from scuvae.inference.mapping.label_transfer import votes
from scuvae.inference.refinement.profile_likelihood import profile_log_likelihood
from scuvae.io import inputs
from scuvae.io.covariates import column_of
from scuvae.io.fit_state import read_extended, read_fit, read_missing
from scuvae.io.genes import match, warn_of_empty
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device
from scuvae.tl._project import read_reference

logger = logging.getLogger("scuvae")

# Numbers in the table of cells and reference cells held at once: 64 MB. And cells: each time the
# reference's profiles are made anew.
NUMBERS_AT_ONCE = 2**24
_CELLS = 4 * CHUNK


@isolated
@random_state_alias
def transfer_labels(
    adata: AnnData,
    reference: AnnData | str | PathLike[str],
    *,
    labels: str = "cell_type",
    key: str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    n_neighbors: int = 15,
    n_reference: int = 10_000,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Label new cells by the reference cells whose decoded profiles explain them best.

    Every labelled reference cell r votes for its label with the share
    p(x | z_r) / Σ p(x | z_s) of each new cell x, z_r its posterior mean: Bayes' rule, with the
    reference's cells as the prior in place of N(0, I). Only the observed genes are asked. Where
    these are few, posterior means lie nearer to the prior's, and votes are right more often than
    the means' neighbours.

    Shares are evened out where fewer than ``n_neighbors`` reference cells would have all: a model
    is surer than it should be. Counts are compared as multinomial draws, other values by weighted
    squares.

    Parameters
    ----------
    adata
        New cells, projected or not. Genes are matched by name; those that a projection did
        without (``genes=`` of :func:`scuvae.tl.project`) are left out here too, and batches that it
        estimated are known.
    reference
        A fitted AnnData, or the path of one (``.h5ad`` or ``.zarr``).
    labels
        Column of ``reference.obs`` with the labels. Cells without one have no vote.
    key
        The reference's fit; None for the default.
    layer
        Where the new cells' values are; None: where the reference's were.
    key_added
        Name of the slots in ``adata``; None for the default names.
    n_neighbors
        Effective number of voters at least, 1 / Σ share².
    n_reference
        Reference cells at most; of more, so many are chosen at random.
    rng
        Seed of that choice, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets:

    ``obs["scuvae_label"]``
        The label with the largest share, categorical, of the reference's categories.
    ``obs["scuvae_label_share"]``
        That share, float32, in (0, 1]. It says how much the voters agree: a cell of a kind that the
        reference lacks gets a label too (see :func:`scuvae.tl.novelty`).

    Raises
    ------
    ValueError
        The reference holds no fit, no such column, or no names in it; no gene in common; a batch
        that the fit has not seen; values that its likelihood cannot have.

    Warns
    -----
    UserWarning
        Cells without counts in the observed genes.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:, ::2].copy()
    >>> scuvae.tl.fit(old, max_epochs=20)
    >>> scuvae.tl.transfer_labels(new, old, labels="cell_type")
    >>> bool((new.obs["scuvae_label"] == new.obs["cell_type"]).mean() > 0.5)
    True
    """
    inputs.check_anndata(adata)
    keys = Keys.of(key_added)
    n_neighbors = whole("n_neighbors", n_neighbors)
    n_reference = whole("n_reference", n_reference)
    reference = read_reference(reference, key, cells=True)
    fit = read_extended(adata, key_added, read_fit(reference, key))
    kinds = _labels(reference, labels)
    where = resolve_device(device)
    genes = adata.var_names.difference(read_missing(adata, key_added))
    cells = match(adata, fit, layer, where, genes=genes).cells

    model = fit.model.to(where)
    voters = np.flatnonzero(kinds.codes >= 0)
    if len(voters) > n_reference:
        with random_state(rng, where) as generator:
            voters = np.sort(generator.choice(voters, n_reference, replace=False))
    mean = read_posterior(reference, key).mean[voters].to(where)
    code = torch.as_tensor(kinds.codes[voters].astype(np.int64), device=where)
    of_label = F.one_hot(code, len(kinds.categories)).to(mean)
    everyone = torch.arange(len(cells), device=where)
    best = torch.cat(
        [
            votes(profile_log_likelihood(model, batch, mean), n_neighbors) @ of_label
            for batch in cells.loader(everyone, min(_CELLS, max(1, NUMBERS_AT_ONCE // len(voters))))
        ]
    ).max(1)

    warn_of_empty(fit, cells, "they get the most common label", stacklevel=5)
    out = target(adata, copy)
    found: dict[str, Any] = {
        "label": pd.Categorical.from_codes(best.indices.cpu().numpy(), dtype=kinds.dtype),
        "label_share": best.values.clamp_max(1.0).cpu().numpy(),
    }
    for name, values in found.items():
        out.obs[keys.obs[name]] = values
    return out if copy else None


def _labels(reference: AnnData, column: str) -> pd.Categorical:
    """The labels of the reference's cells, without categories that no cell has."""
    values = column_of(reference, "labels", column, owner="reference")
    if values.dtype.kind == "f":
        raise ValueError(
            f"reference.obs[{column!r}] is {values.dtype}, a measurement: pass labels= a column of "
            "names, or convert it with .astype(str)"
        )
    found = pd.Categorical(values).remove_unused_categories()
    if not len(found.categories):
        raise ValueError(
            f"reference.obs[{column!r}] has no label: pass labels= a column that has them"
        )
    without = int((found.codes < 0).sum())
    if without:
        logger.info("%d of %d reference cells have no label, and no vote", without, len(found))
    return found
