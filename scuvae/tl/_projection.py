"""q of cells under a finished decoder, levels that it has not seen included."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae.batches import Batch, Cells
from scuvae.distributions.gaussian import Gaussian, moments
from scuvae.inference.mapping.alignment import Alignment
from scuvae.inference.mapping.new_batches import estimate_levels
from scuvae.inference.refinement.infer import infer
from scuvae.inference.refinement.initialization import encoded
from scuvae.inference.refinement.refine import LOCAL_STEPS
from scuvae.io.fit_state import Fit
from scuvae.io.further_genes import SLOT as FURTHER
from scuvae.io.genes import Matched
from scuvae.io.model_arrays import model_to_arrays
from scuvae.model import VAE
from scuvae.model.covariates import Design
from scuvae.runtime import CHUNK, chunk_on, logger
from scuvae.tl._embed import placed

# Cells that the offset of a new batch is estimated from: more of them hardly change it.
MOST_CELLS = 1000


@dataclass(frozen=True)
class Projection:
    """Some cells' moments and places in the reference's map, and the model that they are of."""

    model: VAE
    q: dict[str, np.ndarray]
    coordinates: np.ndarray | None


def project_cells(
    adata: AnnData,
    fit: Fit,
    entry: dict[str, Any],
    matched: Matched,
    covariance: str,
    *,
    rows: torch.Tensor | None = None,
    **options: Any,
) -> Projection:
    """The cells of ``rows``, or all; ``entry`` gets what they add to the model.

    ``options`` are of :func:`projected`.
    """
    cells = matched.cells
    where = cells.size_factor.device
    model = with_new_levels(adata, fit, matched, covariance)
    design = model.design
    if design != fit.design:
        entry["state"] = model_to_arrays(model)
        entry["params"] |= extended_params(entry["params"], fit.design, design)
        if entry.pop(FURTHER, None) is not None:
            logger.info("genes of tl.extend_genes have no rates in new batches: not taken over")
    n_rows = len(cells) if rows is None else len(rows)
    parts = (q for _, q in projected(model, cells, covariance, rows=rows, **options))
    found = moments(parts, covariance, partial(cells.room, n_rows=n_rows))
    coordinates = None
    if "embed" in entry:  # fits of earlier versions have none
        mean = torch.as_tensor(found["mean"], device=where)
        covariates = matched.covariates
        if covariates is not None and rows is not None:
            covariates = covariates.part(rows)
        if covariates is not None and "alignment" in entry["embed"]:
            known = Alignment.of(entry["embed"]["alignment"], mean)
            own = known.with_levels(fit.design, mean, covariates)
            entry["embed"]["alignment"] = own.to_entry()
        coordinates = placed(model, mean, entry["embed"], covariates)
    return Projection(model, found, coordinates)


@torch.no_grad()
def projected(
    model: VAE,
    cells: Cells,
    covariance: str,
    *,
    rows: torch.Tensor | None = None,
    amortized: bool = False,
    **options: Any,
) -> Iterator[tuple[Batch, Gaussian]]:
    """The cells a chunk at a time, in order, and their q."""
    where = cells.size_factor.device
    if rows is None:
        rows = torch.arange(len(cells), device=where)
    for batch in cells.loader(rows, chunk_on(where, model.n_vars)):
        if amortized:
            yield batch, encoded(model, batch, covariance)
        else:
            yield batch, infer(model, batch, covariance, **options)


def polished(fit: Fit) -> bool:
    """Whether local steps are polished where nobody says."""
    # Where a likelihood is not curved natural steps are all but exact; gradient's end by Adam.
    curved = fit.model.likelihood.link != "identity"
    return curved and bool(LOCAL_STEPS[str(fit.params["local_step"])].before_polish)


def with_new_levels(adata: AnnData, fit: Fit, matched: Matched, covariance: str) -> VAE:
    """The model under the cells' design, with levels that it has not seen, on their device."""
    cells, covariates = matched.cells, matched.covariates
    model = fit.model.to(cells.size_factor.device)
    if covariates is None or covariates.design == fit.design:
        return model
    # By name, not by place: the same cells in any order.
    names = [str(name).encode(errors="surrogatepass") for name in adata.obs_names]
    rank = np.array([zlib.crc32(name) for name in names])

    def cells_of(number: int, level: int) -> Iterable[Batch]:
        rows = (covariates.codes[:, number] == level).nonzero().squeeze(1)
        if len(rows) > MOST_CELLS:
            order = np.argsort(rank[rows.cpu().numpy()], kind="stable")[:MOST_CELLS]
            rows = rows[torch.as_tensor(order, device=rows.device)]
        return cells.loader(rows, CHUNK)

    model, found = estimate_levels(
        model, covariates.design, cells_of, covariance, kl_weight=float(fit.params["kl_weight"])
    )
    for one, level, offset in found:
        logger.info(
            "%r of adata.obs[%r]: its offset in the decoder raises the ELBO of %d cells from %.2f "
            "to %.2f nats a cell, after %d turns",
            level,
            one.key,
            offset.n_cells,
            offset.start,
            offset.end,
            offset.n_turns,
        )
    return model


def extended_params(params: dict[str, Any], known: Design, design: Design) -> dict[str, Any]:
    """The parameters of a fit under a design with further levels."""
    found = design.to_params()
    batches, levels = [], []
    for number, (old, new) in enumerate(zip(known.categorical, design.categorical, strict=True)):
        names = new.levels[len(old.levels) :]
        if design.has_batch and not number:
            batches = list(names)
        else:
            levels += [f"{new.key}: {name}" for name in names]
    for name, new_ones in (("new_batches", batches), ("new_levels", levels)):
        if new_ones:
            found[name] = np.array([*map(str, params.get(name, ())), *new_ones], dtype=object)
    return found
