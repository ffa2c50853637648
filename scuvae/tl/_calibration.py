"""tl.calibration: do posteriors cover what they should?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._checks import one_of, random_state_alias, real, whole
from scuvae._keys import Keys
from scuvae.distributions.gaussian import COVARIANCES
from scuvae.inference.evaluation.simulation_based_calibration import (
    Residuals,
    coverage,
    diagonal_coverage,
    scale_ratio,
    simulate,
)
from scuvae.inference.refinement.infer import POLISH, Polish, infer
from scuvae.inference.refinement.initialization import encoded
from scuvae.inference.refinement.refine import step_options
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.io.slots import target
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device


@isolated
@random_state_alias
def calibration(
    adata: AnnData,
    *,
    key: str | None = None,
    n_cells: int = 1000,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    covariance: str | None = None,
    max_steps: int | None = None,
    polish: Polish = False,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """How often posterior intervals hold the z that a cell was simulated from.

    Simulation-based calibration (Talts et al., arXiv:1804.06788): z* from the prior, x from the
    fitted p(x | z*) at the size factors and batches of cells drawn from ``adata``, then q(z) of x
    as :func:`scuvae.tl.project` finds it. On average over the prior, central intervals of exact
    posteriors cover z* as often as they say. This judges inference under the model, not the model,
    for which see :func:`scuvae.tl.predictive_check`.

    A diagonal q of correlated dimensions is too narrow: at a posterior precision Λ its best scales
    are 1/√Λ_kk, while the posterior's own are √(Λ⁻¹)_kk. With r their ratio, an interval of level c
    covers 2 Φ(z_c r) − 1, z_c = Φ⁻¹((1 + c)/2). That is predicted from the full-covariance q of
    the same cells, and stands beside what diagonal q cover. (Not with ``polish="moments"``, whose
    diagonal q have the posterior's own scales.)

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    n_cells
        Cells to simulate, some milliseconds each. The error of a coverage is about
        .5/√(n_cells × n_latent) or, as dimensions of a cell go together, somewhat more.
    levels
        Nominal coverages, between 0 and 1.
    covariance
        ``"full"`` or ``"diagonal"``; None for both and the prediction.
    max_steps
        As in :func:`scuvae.tl.project`.
    polish
        As in :func:`scuvae.tl.project`.
    rng
        Seed of cells and draws, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``uns["scuvae_calibration"]``, a dict. Its
    families are ``full``, ``diagonal`` and, where the fit has one, the ``encoder``'s own q.

    ``"coverage"``
        DataFrame, index ``level``: the share of intervals of that level that hold z*, over cells
        and dimensions, a column a family; ``full_se`` and so on are standard errors over cells.
        ``diagonal_predicted`` is what the full covariance predicts of ``diagonal``.
    ``"dimensions"``
        DataFrame, index ``dimension``: the same for each latent dimension, in columns such as
        ``full_0.5``.
    ``"residuals"``
        DataFrame, index ``family``, each 1 for exact posteriors: ``r2`` is the mean of r², r the
        whitened residual C⁻¹ (z* − m) with C Cᵀ the covariance, ``z2`` that of ((z* − m)/s)²; and
        their standard errors, ``r2_se`` and ``z2_se``.
    ``"pit"``
        Dict: a family's Φ((z* − m)/s), uniform for exact Gaussian posteriors; float32 arrays
        (n_cells, n_latent).
    ``"scale_ratio"``
        With both families: r, a float32 array (n_cells, n_latent).
    ``"params"``
        Dict: ``n_cells``, and ``polish`` as a string.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``; a level is not between 0 and 1.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.calibration(adata, n_cells=100, polish=True)
    >>> table = adata.uns["scuvae_calibration"]["coverage"]
    >>> table.index.tolist()
    [0.5, 0.8, 0.95]
    >>> bool((table["diagonal"] < table["full"]).all())
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_cells = whole("n_cells", n_cells)
    nominal = _levels(levels)
    if covariance is not None:
        one_of("covariance", covariance, COVARIANCES)
    if max_steps is not None:
        max_steps = whole("max_steps", max_steps)
    one_of("polish", polish, POLISH)
    options = step_options(str(fit.params["local_step"]), max_steps, fit.params)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)

    families = COVARIANCES if covariance is None else (covariance,)
    found: dict[str, list[Residuals]] = {}
    ratios = []
    with torch.no_grad(), random_state(rng, where) as generator:
        rows = torch.as_tensor(generator.integers(len(cells), size=n_cells), device=where)
        for real_cells in cells.loader(rows, CHUNK):
            z, batch = simulate(model, real_cells)
            for family in families:
                q = infer(model, batch, family, polish=polish, **options)
                found.setdefault(family, []).append(Residuals.of(q, z))
                if family == "full" and covariance is None and polish != "moments":
                    ratios.append(scale_ratio(q))
            if model.encoder is not None and batch.observed is None:
                q = encoded(model, batch, str(fit.params["covariance"]))
                found.setdefault("encoder", []).append(Residuals.of(q, z))

    out = target(adata, copy)
    ratio = torch.cat(ratios) if ratios else None
    merged = {family: Residuals.concatenate(parts) for family, parts in found.items()}
    entry = _tables(merged, ratio, nominal)
    entry["params"] = {"n_cells": n_cells, "polish": str(polish)}
    out.uns[Keys.of(key).calibration] = entry
    return out if copy else None


def _levels(levels: Sequence[float]) -> list[float]:
    if isinstance(levels, str) or not isinstance(levels, Sequence | np.ndarray) or not len(levels):
        raise TypeError(f"levels={levels!r}: pass some numbers between 0 and 1, such as (.5, .95)")
    return sorted({real(f"levels[{i}]", v, above=0, below=1) for i, v in enumerate(levels)})


def _tables(
    found: dict[str, Residuals], ratio: torch.Tensor | None, nominal: list[float]
) -> dict[str, Any]:
    levels = torch.tensor(nominal, dtype=torch.float64)
    pooled: dict[str, np.ndarray] = {}
    dimensions: dict[str, np.ndarray] = {}
    moments: dict[str, list[float]] = {"r2": [], "r2_se": [], "z2": [], "z2_se": []}
    for family, part in found.items():
        covered = coverage(part.z_score, levels)
        pooled[family], pooled[f"{family}_se"] = _mean_and_error(covered.mean(2))
        if family == "diagonal" and ratio is not None:
            pooled["diagonal_predicted"] = diagonal_coverage(ratio, levels).mean((1, 2)).numpy()
        for level, by_cell in zip(nominal, covered, strict=True):
            dimensions[f"{family}_{level:g}"] = by_cell.mean(0).numpy()
        for name, values in (("r2", part.whitened), ("z2", part.z_score)):
            mean, error = _mean_and_error(values.square().mean(1))
            moments[name].append(float(mean))
            moments[f"{name}_se"].append(float(error))
    n_latent = len(next(iter(dimensions.values())))
    pit = {
        family: torch.special.ndtr(part.z_score).float().numpy() for family, part in found.items()
    }
    entry = {
        "coverage": pd.DataFrame(pooled, index=pd.Index(nominal, name="level")),
        "dimensions": pd.DataFrame(dimensions, index=pd.RangeIndex(n_latent, name="dimension")),
        "residuals": pd.DataFrame(moments, index=pd.Index(list(found), name="family")),
        "pit": pit,
    }
    if ratio is not None:
        entry["scale_ratio"] = ratio.float().numpy()
    return entry


def _mean_and_error(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean over cells, the last axis, and its standard error, NaN for a single cell."""
    n_cells = values.shape[-1]
    spread = values.std(-1) if n_cells > 1 else torch.full_like(values[..., 0], torch.nan)
    return values.mean(-1).numpy(), (spread / n_cells**0.5).numpy()
