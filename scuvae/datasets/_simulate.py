"""Simulated matrices whose truth is stored beside them."""

import math
import os

import numpy as np
import pandas as pd
from anndata import AnnData

from .._checks import random_generator, whole

FACTOR_SCALE = 0.5
LOADING_SCALE = 0.5
NOISE_SCALE = 0.3


def linear_factor(
    n_obs: int = 200,
    n_vars: int = 500,
    n_factors: int = 3,
    *,
    rng: int | np.random.Generator | None = 1,
) -> AnnData:
    r"""Draw a matrix from a linear factor model.

    .. math:: x_{ij} \sim N\left(\sum_k l_{ik} f_{jk},\; 0.3^2\right), \qquad
              l_{ik}, f_{jk} \sim N(0, 0.5^2)

    Parameters
    ----------
    n_obs, n_vars, n_factors
        Number of cells, genes and factors, each at least one.
    rng
        Seed or generator; None draws a fresh seed. A generator is advanced by the draws.

    Returns
    -------
    AnnData
        ``X``, float32, and the truth it was drawn from:

        ``layers["oracle"]``
            The noiseless matrix :math:`l f^\top`, float32.
        ``obsm["factors"]``, ``varm["loadings"]``
            :math:`l` and :math:`f`, float64.
        ``uns["linear_factor"]``
            The three standard deviations and ``n_factors``.

    Raises
    ------
    TypeError, ValueError
        If a size is not a whole number of at least one, or ``rng`` is neither a seed nor a
        generator.

    Notes
    -----
    The defaults draw the simulated example of the note "VAEs without amortized inference": its
    numbers are these before the cast to float32.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.linear_factor()
    >>> adata.shape, adata.obsm["factors"].shape
    ((200, 500), (200, 3))
    >>> residual = adata.X - adata.layers["oracle"]
    >>> round(float(residual.std()), 2)
    0.3
    """
    n_obs, n_vars = whole("n_obs", n_obs), whole("n_vars", n_vars)
    n_factors = whole("n_factors", n_factors)
    check_cells({"n_obs": n_obs, "n_vars": n_vars})
    check_cells({"n_obs": n_obs, "n_factors": n_factors})
    check_cells({"n_vars": n_vars, "n_factors": n_factors})
    generator = random_generator(rng)

    # The order of the draws fixes the numbers: factors, loadings, data.
    factors = generator.normal(scale=FACTOR_SCALE, size=(n_obs, n_factors))
    loadings = generator.normal(scale=LOADING_SCALE, size=(n_vars, n_factors))
    oracle = factors @ loadings.T
    x = generator.normal(loc=oracle, scale=NOISE_SCALE)

    return AnnData(
        x.astype(np.float32),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_obs)]),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(n_vars)]),
        obsm={"factors": factors},
        varm={"loadings": loadings},
        layers={"oracle": oracle.astype(np.float32)},
        uns={
            "linear_factor": {
                "n_factors": int(n_factors),
                "factor_scale": FACTOR_SCALE,
                "loading_scale": LOADING_SCALE,
                "noise_scale": NOISE_SCALE,
            }
        },
    )


def check_cells(sizes: dict[str, int]) -> None:
    """Raise where no memory of this machine holds an array of these sizes, in float64."""
    needed = 8.0 * math.prod(sizes.values())
    try:
        there = float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        there = math.inf
    if needed > there:
        said = " with ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"{said} takes {needed / 2**30:,.4g} GiB of memory at least, and there are "
            f"{there / 2**30:,.4g} GiB: pass less"
        )
