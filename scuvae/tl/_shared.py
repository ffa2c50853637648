"""What the verbs of tl share: random state, device, log, progress, cells lined up with a fit."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.distributions import Distribution

from scuvae._checks import one_of, random_generator
from scuvae.inference.local_steps import draw, normal_points
from scuvae.inference.objectives import kl_to_prior
from scuvae.io import inputs
from scuvae.io.sources import Cells, source_of
from scuvae.io.state import Fit
from scuvae.model import VAE, Batch

logger = logging.getLogger("scuvae")

# Cells that inference with a frozen decoder takes at once.
CHUNK = 512

# And at most on a GPU, which they should keep busy; there they may take most of what is free, at so
# many numbers a gene: 16 arrays of twenty draws.
_MOST, _NUMBERS, _SHARE = 16_384, 320, 0.8

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(device: str) -> torch.device:
    """The torch device for ``device``; ``"auto"`` is CUDA where there is one, else the CPU."""
    kind = device.split(":")[0] if isinstance(device, str) else device
    one_of("device", kind, DEVICES)
    if kind == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device='auto': using %s", device)
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}: torch sees no CUDA device. Pass device='auto' or 'cpu'"
        )
    elif kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device={device!r}: torch sees no Metal device. Pass device='auto' or 'cpu'"
        )
    return torch.device(device)


def chunk_on(device: torch.device, n_vars: int) -> int:
    """Cells of so many genes that inference with a frozen decoder takes at once on a device."""
    if device.type != "cuda":
        return CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fitting = int(_SHARE * (free + kept) / (4 * _NUMBERS * n_vars))
    return max(1, min(fitting, _MOST))


@contextmanager
def random_state(
    rng: int | np.random.Generator | None, device: torch.device
) -> Iterator[np.random.Generator]:
    """Inside, torch's random state comes from ``rng``; outside, nothing has changed."""
    generator = random_generator(rng)
    seed = int(generator.integers(2**63))
    if isinstance(rng, int | np.integer):  # then as torch.manual_seed(rng) would have it
        seed = int(rng) % 2**63
    metal = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed every device, also those that nothing restores.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif metal is not None:
            torch.mps.manual_seed(seed)
        try:
            yield generator
        finally:
            if metal is not None:
                torch.mps.set_rng_state(metal)


def show_progress(progress: bool | None) -> bool:
    """``progress`` itself, or by default whether anybody is watching: a terminal or a notebook."""
    if progress is not None:
        return progress
    shell = sys.modules.get("IPython")
    notebook = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return notebook or sys.stderr.isatty()


@dataclass(frozen=True)
class Matched:
    """Cells as a fit's model sees them, and what of the two was matched by name.

    ``found`` is a boolean mask over the fit's genes, ``n_unused`` the number of other genes that
    the cells have, ``batches`` the names that the cells' codes stand for.
    """

    cells: Cells
    found: np.ndarray
    n_unused: int
    batches: list[str]


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
    ``extend``: batches that the fit has not seen get codes beyond its own.
    """
    device = device or torch.device("cpu")
    layer = fit.layer if layer is None else layer
    inputs.check_unique_genes(adata)
    position = adata.var_names.get_indexer(fit.var_names)
    common = position >= 0
    if not common.any():
        raise ValueError(
            f"adata.var_names share no gene with the fit's {len(fit.var_names)}: the fit has "
            f"{some(fit.var_names)}, adata has {some(adata.var_names)}. Are both symbols, or both "
            "ids?"
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

    matrix = inputs.read_matrix(adata, layer, columns)
    likelihood = fit.model.likelihood
    inputs.check_values(
        matrix,
        adata,
        layer,
        columns,
        likelihood=likelihood.name,
        counts=likelihood.counts,
        fractions=not fit.params.get("check_values", True),
        fitting=False,
    )
    codes, names = inputs.batch_codes(adata, fit.batch_key, fit.batches, extend=extend)
    size_factor = inputs.size_factors(adata, fit.size_factor_key)
    observed = None
    if not found.all():
        if size_factor is not None and likelihood.counts:
            logger.info(
                "adata.obs[%r] is taken for each cell's total over all of the fit's genes",
                fit.size_factor_key,
            )
        matrix = spread(matrix, np.flatnonzero(found), len(found))
        observed = torch.as_tensor(found, device=device)
    cells = Cells(
        source_of(matrix, device),
        size_factor=None if size_factor is None else torch.tensor(size_factor, device=device),
        codes=None if codes is None else torch.tensor(codes, device=device),
        n_categories=len(names),
        observed=observed,
    )
    return Matched(cells, found, unknown + chosen_out, names)


def warn_of_empty(fit: Fit, cells: Cells, so: str, *, stacklevel: int = 3) -> None:
    """Warn of cells without counts to go by, at the line that called the verb."""
    if fit.model.likelihood.counts:
        empty = int((cells.source.totals() == 0).sum())
        if empty:
            text = f"{empty} cells have no counts in the observed genes: {so}"
            warnings.warn(text, stacklevel=stacklevel)


def places(adata: AnnData, fit: Fit, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Columns of ``adata`` with genes that are observed, ascending, and these genes' in the fit."""
    position = fit.var_names.get_indexer(adata.var_names)
    use = position >= 0
    if cells.observed is not None:
        use &= cells.observed.cpu().numpy()[position]
    columns = np.flatnonzero(use)
    return columns, position[columns]


def some(names: pd.Index) -> str:
    """The first few names, for a message."""
    return ", ".join([*map(repr, names[:3]), "..."])


def spread(matrix: Any, columns: np.ndarray, n_vars: int) -> Any:
    """``matrix`` with its columns at the places ``columns`` among ``n_vars``; the others unused."""
    if isinstance(matrix, np.ndarray):
        wide = np.zeros((matrix.shape[0], n_vars), np.float32)
        wide[:, columns] = matrix
        return wide
    return type(matrix)(
        (matrix.data, columns[matrix.indices], matrix.indptr), shape=(matrix.shape[0], n_vars)
    )


def step_options(local_step: str, max_steps: int | None, params: dict[str, Any]) -> dict[str, Any]:
    """Options of :func:`scuvae.inference.refine.refine` for a fit's cells.

    Natural steps end by themselves once a cell has converged; other rules cannot tell, and unless
    told otherwise take as many as they need.
    """
    if max_steps is None and local_step == "natural":
        max_steps = 20
    steps = {} if max_steps is None else {"max_steps": max_steps}
    return {"local_step": local_step, "kl_weight": float(params["kl_weight"]), **steps}


def elbo_gain(
    model: VAE,
    batch: Batch,
    q: Distribution,
    other: Distribution,
    *,
    n_samples: int = 32,
    kl_weight: float = 1.0,
) -> torch.Tensor:
    """By how much q's ELBO exceeds the other's over the same fixed draws, (cells,), in nats.

    The draws are not those that refinement fits q to.
    """
    gain = kl_weight * (kl_to_prior(other) - kl_to_prior(q))
    points = normal_points(n_samples, q.mean, seed=1)
    for part in points.split(8):
        difference = model.log_likelihood(batch, draw(q, part))
        difference = difference - model.log_likelihood(batch, draw(other, part))
        gain = gain + difference.sum(0) / len(points)
    return gain
