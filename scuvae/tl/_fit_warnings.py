"""What tl.fit warns of before it trains, at the line that called it."""

import warnings
from functools import partial
from typing import Any

import numpy as np
from anndata import AnnData

from scuvae.inference.training.settings import Settings
from scuvae.io import inputs
from scuvae.io.covariates import warn_of_size_factors
from scuvae.model.likelihoods import Likelihood


def warn_of_shapes(
    matrix: Any, settings: Settings, likelihood: type[Likelihood] | Likelihood
) -> None:
    """More latent dimensions than genes; cells without a count."""
    n_vars = matrix.shape[1]
    if settings.n_latent >= n_vars > 1:
        warnings.warn(
            f"n_latent={settings.n_latent} is no fewer than the {n_vars} genes", stacklevel=5
        )
    if likelihood.support == "counts":
        empty = inputs.empty_cells(matrix)
        if empty:
            warnings.warn(
                f"{empty} cells have no counts at all: their posterior is the prior", stacklevel=5
            )


def warn_of_factors(
    key: str | None,
    factors: np.ndarray,
    matrix: Any,
    likelihood: type[Likelihood] | Likelihood,
    adata: AnnData,
    layer: str | None,
    genes: np.ndarray | None,
) -> None:
    """Size factors that have no part in the fit, or are no totals of the modelled genes."""
    if likelihood.link != "softmax":
        warnings.warn(
            f"size_factor_key={key!r} has no part in likelihood={likelihood.name!r}: leave it out, "
            "or pass a likelihood for counts",
            stacklevel=5,
        )
        return
    every = None if genes is None else partial(_totals, adata, layer)
    warn_of_size_factors(key, factors, inputs.totals(matrix), every, stacklevel=6)


def _totals(adata: AnnData, layer: str | None) -> np.ndarray:
    """Over all genes."""
    return inputs.totals(inputs.read_matrix(adata, layer, in_memory=False))
