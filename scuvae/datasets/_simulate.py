"""Simulated matrices whose truth is stored beside them."""

from numbers import Integral

import numpy as np
import pandas as pd
from anndata import AnnData

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
    sizes = {"n_obs": n_obs, "n_vars": n_vars, "n_factors": n_factors}
    for name, value in sizes.items():
        _check_size(name, value)
    generator = _generator(rng)

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


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}.")


def _generator(rng: object) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    # numpy would take True as the seed 1.
    if isinstance(rng, bool | np.bool_) or not isinstance(rng, Integral):
        raise TypeError(f"rng must be an int, a numpy.random.Generator or None, not {rng!r}.")
    if rng < 0:
        raise ValueError(f"rng must not be negative, not {rng}.")
    return np.random.default_rng(int(rng))
