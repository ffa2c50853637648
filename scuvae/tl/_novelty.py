"""tl.novelty: how surprising cells are under a fit, against the reference's own."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from scuvae._checks import flag, random_state_alias, whole
from scuvae._keys import Keys
from scuvae.batches import Cells
from scuvae.batches.sparse_rows import sparse
from scuvae.batches.thinning import thinned
from scuvae.distributions.gaussian import Gaussian, concatenate
from scuvae.inference.mapping.latent_distance import distance_to_posteriors
from scuvae.inference.mapping.neighbour_residuals import Neighbours, Residuals, joined, residuals
from scuvae.inference.mapping.tail_probabilities import (
    DepthWeights,
    Residual,
    combine,
    log_tail,
    standardised,
)
from scuvae.inference.mapping.typicality import typicality
from scuvae.inference.refinement.infer import infer
from scuvae.inference.refinement.refine import step_options
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_extended, read_fit, read_missing
from scuvae.io.genes import match
from scuvae.io.slots import target
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device
from scuvae.tl._project import read_reference
from scuvae.tl._projection import projected

logger = logging.getLogger("scuvae")

# Below this, neither a regression on three numbers nor a tail says much.
_FEWEST = 20
# Reference cells that a cell's distance is measured by.
_NEAREST = 5
# Cells at most among which a cell has neighbours: their residuals are held together.
_POOL = 2000
# A change of log totals that says nothing.
_NO_DEPTH = 1e-3


@isolated
@random_state_alias
def novelty(
    adata: AnnData,
    reference: AnnData | str | PathLike[str],
    *,
    key: str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    n_samples: int = 8,
    n_reference: int = 2000,
    n_neighbors: int = 50,
    adjust_genes: bool = False,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """How surprising each cell is under a fit, against the reference's own cells.

    A cell type that the reference lacks surprises a model in four ways. Its z has to lie where the
    prior expects few cells, which costs KL(q ‖ prior); it lies far from the reference's cells;
    whatever its z, its counts are less likely than counts that the model itself would draw there,
    E_q[log p(x | z)] below E_q E_x̃[log p(x̃ | z)]; and what the model misses in one of its cells it
    misses in the others as well, which shows where no single cell is striking. How deeply a cell
    was sequenced must not count: the KL is taken less what depth does to it, found by drawing half
    of the reference cells' counts and looking again; the distance, to the five nearest of the
    reference's posteriors, is in units of their scales; E_q[log p(x | z)] is taken less its
    regression on its expectation and on log total, in standard deviations that may change with
    depth; and how far a cell's counts lie in the direction in which its neighbours' lie is in
    standard deviations under the model. The four are compared with those of the reference's
    held-out cells, and combined; what comes out is compared with those cells' own. Each time cells
    of like depth weigh most, by a Gaussian kernel over depths' ranks.

    So about a tenth of ordinary cells is above 1 at any depth, on average over references (.07 to
    .14 in each quarter of depth on the two data sets that the kernel was chosen on): of some
    hundred held-out cells a quarter of the depths has a few dozen, and its share above 1 is known
    to about .04. It does not hold type by type. Types of few cells in the reference, which the
    decoder knows least, have more than a tenth above 1, at times more than half: look at the share
    above 1 among the reference's own held-out cells of a type before calling new ones novel.

    The posteriors of all cells, the reference's held-out ones included, are found anew as
    :func:`scuvae.tl.project` does with ``polish=False``: ``adata`` may be projected or not (if so,
    project first: that clears the slots of its name; genes that it did without are left out here
    too, and batches that it estimated are known), and no encoder is needed.

    Neighbours are new cells, by their posterior means; of more than 2,000, or than there are of the
    reference's, so many drawn at random are candidates. A kind of some 50 cells among them is
    enough to gain by them. What all new cells have in common counts as well: genes that another
    experiment catches more or less often make all its cells look novel. ``adjust_genes=True`` takes
    that out; ``n_neighbors=1`` does without neighbours, and a cell's novelty then depends on no
    other cell of ``adata``.

    Parameters
    ----------
    adata
        New cells.
    reference
        A fitted AnnData, or the path of one (``.h5ad`` or ``.zarr``). Its cells that were held out
        of training (``obs["scuvae_split"]``) are what is usual. Where they are fewer than 20, all
        its cells are, with a warning: the decoder has seen them, so that new cells look more
        surprising than they are.
    key
        The reference's fit; None for the default.
    layer
        Where the new cells' values are; None: where the reference's were.
    key_added
        Name of the slots in ``adata``; None for the default names.
    n_samples
        Draws of z per cell, and of x̃.
    n_reference
        Reference cells at most; of more, so many are chosen at random.
    n_neighbors
        Cells of a neighbourhood, the cell itself included; 1 for none.
    adjust_genes
        Take out of the neighbours' part what each gene is off by over the new cells that are less
        novel by themselves, a factor for counts and a shift for other values; and over the
        reference's. For new cells of another experiment, if their batch is none of the fit's. A
        kind that no single cell shows loses some of its novelty by it.
    rng
        Seed of the draws, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, per cell, float32, higher is more novel:

    ``obs["scuvae_novelty"]``
        −log10 of the share of reference cells of about the same depth that are as surprising:
        1 is one in ten, 2 one in a hundred. Beyond the reference's highest tenth by an exponential
        tail (generalised Pareto of shape 0: Pickands, Annals of Statistics 1975), so values far
        above log10 of the number of reference cells rank cells, but are no probabilities.
    ``obs["scuvae_novelty_counts"]``, ``obs["scuvae_novelty_latent"]``,
    ``obs["scuvae_novelty_distance"]``, ``obs["scuvae_novelty_shared"]``
        What it combines (Fisher's method, on the same tails): what is left of the counts' and of
        the KL's part, the distance, and how far the cell's counts lie in the direction of its
        neighbours', in standard deviations of the reference cells. Without neighbours
        (``n_neighbors=1``, or a single new cell) the last one is not written.

    Raises
    ------
    ValueError
        The reference holds no fit, or fewer than 20 cells; otherwise as
        :func:`scuvae.tl.project`.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> b = (adata.obs["cell_type"] == "CD19+ B").to_numpy()
    >>> old, new = adata[~b].copy(), adata[b].copy()
    >>> scuvae.tl.fit(old, max_epochs=5)
    >>> scuvae.tl.novelty(new, old)
    >>> bool((new.obs["scuvae_novelty"] > 1).mean() > 0.5)
    True
    """
    inputs.check_anndata(adata, copy=copy)
    keys = Keys.of(key_added)
    n_samples = whole("n_samples", n_samples)
    n_reference = whole("n_reference", n_reference, at_least=_FEWEST)
    n_neighbors = whole("n_neighbors", n_neighbors)
    flag("adjust_genes", adjust_genes)
    reference = read_reference(reference, key, cells=True)
    fit = read_extended(adata, key_added, read_fit(reference, key, "reference"))
    where = resolve_device(device)
    # The same genes for both: a score over others is another score.
    shared = adata.var_names.intersection(reference.var_names)
    genes = shared.difference(read_missing(adata, key_added))
    new = match(adata, fit, layer, where, genes=genes).cells
    with random_state(rng, where) as generator:
        rows = _usual(reference, key, n_reference, generator)
        chosen = reference[rows]
        chosen = chosen.to_memory() if chosen.isbacked else chosen
        old = match(chosen, fit, device=where, genes=genes).cells
        usual, found = _scores(fit, old, n_samples), _scores(fit, new, n_samples)
        effect = _effect_of_depth(fit, old, usual)
        pool = min(len(new), len(old), _POOL)
        candidates = [generator.choice(len(cells), pool, replace=False) for cells in (new, old)]

    def against_usual(score: Callable[[_Scores], Tensor]) -> tuple[Tensor, Tensor]:
        reference_scores = score(usual)
        new_scores = standardised(score(found), reference_scores)
        return new_scores, standardised(reference_scores, reference_scores)

    line, counts = Residual.of(-usual.reconstruction, usual.covariates)
    near = min(_NEAREST, len(rows) - 1)
    pairs = {
        "counts": (line(-found.reconstruction, found.covariates), counts),
        "latent": against_usual(lambda cells: cells.kl - effect * cells.depth),
        "distance": against_usual(
            lambda cells: distance_to_posteriors(cells.q.mean, usual.q, near).cpu()
        ),
    }
    # What a tail is read from: reference cells of about the same depth.
    there, here = (
        DepthWeights.of(found.depth, usual.depth),
        DepthWeights.of(usual.depth, usual.depth),
    )
    others = min(n_neighbors, pool) - 1
    if others:
        alone: list[Tensor | None] = [None, None]
        if adjust_genes:
            alone = [
                combine(pairs.values(), there),
                combine(((own, own) for _, own in pairs.values()), here),
            ]
        # As many candidates on both sides: where cells lie closer, what they miss agrees more.
        shared = [
            shared_scores(fit, cells, scores.q, rows, others, single)
            for cells, scores, rows, single in zip(
                (new, old), (found, usual), candidates, alone, strict=True
            )
        ]
        pairs["shared"] = standardised(*shared), standardised(shared[1], shared[1])
    own = combine(((scores, scores) for _, scores in pairs.values()), here)
    combined = combine(pairs.values(), there)
    columns = {"novelty": -log_tail(combined, own, there) / math.log(10)}
    columns |= {f"novelty_{name}": scores for name, (scores, _) in pairs.items()}

    out = target(adata, copy)
    for name, values in columns.items():
        out.obs[keys.obs[name]] = values.cpu().numpy().astype(np.float32)
    if "shared" not in pairs and keys.obs["novelty_shared"] in out.obs:
        del out.obs[keys.obs["novelty_shared"]]  # of an earlier call
    return out if copy else None


def _usual(
    reference: AnnData, key: str | None, most: int, generator: np.random.Generator
) -> np.ndarray:
    """The rows of the reference that new cells are compared with, in order."""
    slot = Keys.of(key).obs["split"]
    held_out = np.zeros(reference.n_obs, bool)
    if slot in reference.obs:
        held_out = (reference.obs[slot] == "validation").to_numpy()
    rows = np.flatnonzero(held_out)
    if reference.n_obs < _FEWEST:
        raise ValueError(
            f"reference has {reference.n_obs} cells: novelty needs {_FEWEST} to compare with. Pass "
            "a fit of more cells"
        )
    if len(rows) < _FEWEST:
        logger.warning(
            "reference.obs[%r] marks %d cells held out of training, fewer than %d: new cells are "
            "compared with all, which the decoder was trained on, and look more surprising than "
            "they are. Fit with a larger validation_fraction",
            slot,
            len(rows),
            _FEWEST,
        )
        rows = np.arange(reference.n_obs)
    if len(rows) > most:
        rows = np.sort(generator.choice(rows, most, replace=False))
    return rows


@dataclass(frozen=True)
class _Scores:
    """Of each cell, (cells,), float64, on the host; and q, where the model is."""

    q: Gaussian
    depth: Tensor
    reconstruction: Tensor
    expected: Tensor
    kl: Tensor

    @property
    def covariates(self) -> Tensor:
        return torch.stack([self.depth, self.expected], 1)


def _scores(fit: Fit, cells: Cells, n_samples: int) -> _Scores:
    model = fit.model.to(cells.size_factor.device)
    found, parts = [], []
    for batch, q in projected(model, cells, str(fit.params["covariance"]), **_steps(fit)):
        found.append(q)
        parts.append(typicality(model, batch, q, n_samples))
    kl, reconstruction, expected = (
        torch.cat([getattr(part, name) for part in parts]).cpu()
        for name in ("kl", "reconstruction", "expected")
    )
    depth = torch.zeros_like(kl)
    if model.likelihood.support == "counts":
        depth = _log_total(cells.source.totals())
    return _Scores(concatenate(found), depth, reconstruction, expected, kl)


def _effect_of_depth(fit: Fit, cells: Cells, usual: _Scores) -> float:
    """What the KL changes by in a unit of log total, where nothing else changes; 0 if no counts."""
    if fit.model.likelihood.support != "counts":
        return 0.0
    everyone = torch.arange(len(cells), device=cells.size_factor.device)
    kl, depth = [], []
    for batch in cells.loader(everyone, CHUNK):
        fewer = thinned(batch)
        q = infer(fit.model, fewer, str(fit.params["covariance"]), **_steps(fit))
        kl.append(fit.model.prior.kl(q).double().cpu())
        depth.append(_log_total(sparse(fewer.x).sum()))
    change = (usual.depth - torch.cat(depth)).mean()
    if change < _NO_DEPTH:  # empty cells alone
        return 0.0
    return float((usual.kl - torch.cat(kl)).mean() / change)


def shared_scores(
    fit: Fit,
    cells: Cells,
    q: Gaussian,
    candidates: np.ndarray,
    n: int,
    adjust_by: Tensor | None,
) -> Tensor:
    """How far each cell lies in the direction of its ``n`` neighbours among the candidates.

    With the novelty of cells by themselves in ``adjust_by``, what genes are off by over the less
    novel half of the candidates is taken out.
    """
    where = cells.size_factor.device

    def parts(rows: Tensor) -> Iterator[Residuals]:
        for batch in cells.loader(rows, CHUNK):
            yield residuals(fit.model, batch, q.mean[batch.index])

    chosen = torch.as_tensor(np.sort(candidates))
    if adjust_by is not None:
        adjust_by = (adjust_by[chosen] <= adjust_by[chosen].median()).to(where)
    pool = joined(parts(chosen.to(where)))
    neighbours = Neighbours(pool, n, support=fit.model.likelihood.support, adjust_by=adjust_by)
    everyone = torch.arange(len(cells), device=where)
    return torch.cat([neighbours.residual_score(part) for part in parts(everyone)]).cpu()


def _log_total(totals: Tensor) -> Tensor:
    return totals.cpu().double().clamp_min(1).log()


def _steps(fit: Fit) -> dict[str, Any]:
    return step_options(str(fit.params["local_step"]), None, fit.params)
