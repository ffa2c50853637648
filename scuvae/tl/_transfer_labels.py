"""tl.transfer_labels: labels of new cells, from those of a reference."""

import logging
from os import PathLike

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.nn import functional as F

from scuvae._adata import groups_of, names_in
from scuvae._checks import flag, random_state_alias, real, whole
from scuvae._keys import Keys
from scuvae.batches import Batch
from scuvae.inference.mapping.label_probabilities import (
    MOST_TRAINED,
    LabelProbabilities,
    Voters,
    chunks,
)
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_extended, read_fit, read_missing
from scuvae.io.genes import match, warn_of_empty
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import isolated, random_state, resolve_device
from scuvae.tl._project import read_reference

logger = logging.getLogger("scuvae")

UNASSIGNED = "unassigned"
# Labelled reference cells that probabilities need.
_FEWEST = 200


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
    calibrate: bool | None = None,
    min_probability: float = 0.0,
    max_novelty: float | None = None,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Label new cells by a reference's cells, with the probability of each label.

    Two opinions are asked. Every labelled reference cell r votes for its label with the share
    p(x | z_r) / Σ p(x | z_s) of each new cell x, z_r its posterior mean: Bayes' rule, with the
    reference's cells as the prior in place of N(0, I). Only the observed genes are asked. Where
    these are few, posterior means lie nearer to the prior's, and votes are right more often than
    the means' neighbours. Shares are evened out where fewer than ``n_neighbors`` reference cells
    would have all: a model is surer than it should be. Counts are compared as multinomial draws,
    other values by weighted squares. The other opinion is a logistic regression of the labels on
    the reference's values of the observed genes.

    Probabilities are calibrated: how much each opinion counts, at which depth, is found from up to
    2,000 of the reference's labelled cells, each as if it were new. Its own vote is left out, those
    of other held-out cells too if it was held out of the fit, and it is asked by a regression that
    has not seen it; with counts, once as it is and once thinned (see
    :mod:`scuvae.inference.mapping.label_probabilities`). So a label given with probability .8 is
    right eight times in ten: of cells like the reference's, at any depth, with any genes missing.
    It need not hold for other experiments or kinds, of which :func:`scuvae.tl.novelty` warns.

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
    calibrate
        Whether to find probabilities, and to give the most probable label. False: the label with
        the most votes. None: where the reference has its values, two labels and 200 labelled cells.
    min_probability
        Cells whose label is less probable are ``"unassigned"``. 0: none.
    max_novelty
        Cells whose ``obs["scuvae_novelty"]``, which :func:`scuvae.tl.novelty` has written under the
        same ``key_added``, is above are ``"unassigned"``: 2 leaves one in 100 ordinary cells out.
        None: novelty is not asked.
    rng
        Seed of choices and of thinning, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets:

    ``obs["scuvae_label"]``
        The most probable label, categorical, of the reference's categories, with
        ``min_probability`` or ``max_novelty`` followed by ``"unassigned"``.
    ``obs["scuvae_label_share"]``
        Its share of the votes, float32, in [0, 1]: how much the voters agree.
    ``obs["scuvae_label_probability"]``
        Its probability, float32, also of cells that are unassigned.
    ``obsm["scuvae_label_probabilities"]``
        A float32 DataFrame, cells × labels, rows add up to 1. Columns are the labels in the
        categories' order; ``/`` in them, which files do not take, is ``_``.
    ``uns["scuvae_label_calibration"]``
        How well probabilities hold for the reference's cells, those of each third by weights and a
        regression of the others: the expected calibration error ``ece``, and bins for
        :func:`scuvae.pl.label_reliability`; the same of thinned cells after ``thinned_``.

    The last three only where probabilities are found.

    Raises
    ------
    ValueError
        The reference holds no fit, no such column, or no names in it; no gene in common; a batch
        that the fit has not seen; values that its likelihood cannot have; ``calibrate=True`` or
        ``min_probability`` of a reference without two labels or 200 labelled cells, or without its
        values; ``max_novelty`` without novelty; a label named ``"unassigned"`` beside one of both.

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
    inputs.check_anndata(adata, copy=copy)
    keys = Keys.of(key_added)
    n_neighbors = whole("n_neighbors", n_neighbors)
    n_reference = whole("n_reference", n_reference)
    if calibrate is not None:
        flag("calibrate", calibrate)
    least = real("min_probability", min_probability, low=0.0, below=1.0)
    novel = _novel(adata, keys, max_novelty)
    reference = read_reference(reference, key, cells=True)
    fit = read_extended(adata, key_added, read_fit(reference, key, "reference"))
    kinds = _labels(reference, labels)
    if (least or novel is not None) and UNASSIGNED in map(str, kinds.categories):
        raise ValueError(
            f"reference.obs[{labels!r}] has the label {UNASSIGNED!r}, which min_probability and "
            "max_novelty give: rename it"
        )
    lacks = _lacks(reference, fit, kinds)
    if lacks and (calibrate or least):
        which = "calibrate=True" if calibrate else f"min_probability={least}"
        raise ValueError(f"{which} needs probabilities, but {lacks}: leave it out")
    if least and calibrate is False:
        raise ValueError(f"min_probability={least} needs probabilities: leave out calibrate=False")
    calibrate = not lacks if calibrate is None else calibrate
    where = resolve_device(device)
    genes = adata.var_names.difference(read_missing(adata, key_added))
    matched = match(adata, fit, layer, where, genes=genes)
    cells = matched.cells

    voters = np.flatnonzero(kinds.codes >= 0)
    with random_state(rng, where) as generator:
        if len(voters) > n_reference:
            voters = np.sort(generator.choice(voters, n_reference, replace=False))
        mean = read_posterior(reference, key).mean[voters].to(where)
        code = torch.as_tensor(kinds.codes[voters].astype(np.int64), device=where)
        of_label = F.one_hot(code, len(kinds.categories)).to(mean)
        asked = Voters(fit.model.to(where), mean, of_label, n_neighbors)
        probabilities = None
        if calibrate:
            found_genes = fit.var_names[matched.found]
            probabilities = _probabilities(
                reference, key, fit, asked, voters, found_genes, generator
            )

    def shares_alone(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        shares = asked.shares(batch)
        return shares, shares

    ask = shares_alone if probabilities is None else probabilities
    parts = [ask(batch) for batch in chunks(cells, len(voters))]
    table, shares = (np.concatenate(part) for part in zip(*parts, strict=True))
    best = table.argmax(1)
    warn_of_empty(fit, cells, "they get the most common label", stacklevel=5)

    out = target(adata, copy)
    for slot in (keys.label_probabilities, keys.label_calibration, keys.obs["label_probability"]):
        for held in (out.obsm, out.uns, out.obs):
            if slot in held:
                del held[slot]  # of an earlier call
    top, share = (part[np.arange(len(best)), best] for part in (table, shares))
    categories: pd.Index = kinds.categories
    if least or novel is not None:
        left = top < least
        left |= False if novel is None else novel
        best = np.where(left, len(categories), best)
        categories = pd.Index([*map(str, categories), UNASSIGNED])
    out.obs[keys.obs["label"]] = pd.Categorical.from_codes(
        best, categories, ordered=kinds.ordered and len(categories) == len(kinds.categories)
    )
    out.obs[keys.obs["label_share"]] = share.clip(0, 1).astype(np.float32)
    if probabilities is not None:
        out.obs[keys.obs["label_probability"]] = top.astype(np.float32)
        out.obsm[keys.label_probabilities] = pd.DataFrame(
            table.astype(np.float32), out.obs_names, _columns(kinds.categories)
        )
        out.uns[keys.label_calibration] = {"labels": labels, **probabilities.report}
    return out if copy else None


def _probabilities(
    reference: AnnData,
    key: str | None,
    fit: Fit,
    asked: Voters,
    voters: np.ndarray,
    genes: pd.Index,
    generator: np.random.Generator,
) -> LabelProbabilities:
    """From some of the voters, over the genes that the new cells have."""
    some = np.arange(len(voters))
    if len(some) > MOST_TRAINED:
        some = np.sort(generator.choice(some, MOST_TRAINED, replace=False))
    chosen = reference[voters[some]]
    chosen = chosen.to_memory() if chosen.isbacked else chosen
    known = match(chosen, fit, device=asked.z.device, genes=genes).cells
    slot = Keys.of(key).obs["split"]
    held_out = np.zeros(len(voters), bool)
    if slot in reference.obs:
        held_out = (inputs.obs_column(reference, slot) == "validation").to_numpy()[voters]
    found = LabelProbabilities(asked, known, some, held_out, generator)
    logger.info(
        "labels of %d reference cells: expected calibration error %.3f",
        found.report["n"],
        found.report["ece"],
    )
    return found


def _novel(adata: AnnData, keys: Keys, most: float | None) -> np.ndarray | None:
    """Cells above it; None where novelty is not asked."""
    if most is None:
        return None
    most, slot = real("max_novelty", most), keys.obs["novelty"]
    if slot not in adata.obs:
        raise ValueError(
            f"max_novelty={most:g}, but adata.obs has no {slot!r}: call scuvae.tl.novelty(adata, "
            "reference) first, with the same key_added="
        )
    return inputs.obs_column(adata, slot).to_numpy(dtype=float) > most


def _lacks(reference: AnnData, fit: Fit, kinds: pd.Categorical) -> str:
    """What probabilities need that the reference has not; "" for nothing."""
    n = int((kinds.codes >= 0).sum())
    if len(kinds.categories) < 2:
        return "the reference has one label"
    if n < _FEWEST:
        return f"{n} of the reference's cells have a label, fewer than {_FEWEST}"
    layer = fit.layer
    there = reference.X is not None if layer is None else layer in reference.layers
    return "" if there else f"the reference has lost its values, {inputs.slot_name(layer)}"


def _columns(categories: pd.Index) -> list[str]:
    """Names that files take as those of columns, each once."""
    found: list[str] = []
    for name in categories:
        safe = str(name).replace("/", "_")
        while safe in found:
            safe += "_"
        found.append(safe)
    return found


def _labels(reference: AnnData, column: str) -> pd.Categorical:
    """The labels of the reference's cells, without categories that no cell has."""
    values = names_in(reference, "labels", column, owner="reference")
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
    # Numbers stay numbers; others, such as dates, go into no file but as text.
    if found.categories.dtype.kind not in "iub":
        found = groups_of(values)
    without = int((found.codes < 0).sum())
    if without:
        logger.info("%d of %d reference cells have no label, and no vote", without, len(found))
    return found
