"""What the functions of pp share: a generator from ``rng``, and where results are written."""

import numpy as np
from anndata import AnnData


def generator_of(rng: int | np.random.Generator | None) -> np.random.Generator:
    """``rng`` itself, or a new generator from the seed; None for one that nobody can repeat."""
    if isinstance(rng, bool) or not (
        rng is None or isinstance(rng, int | np.integer | np.random.Generator)
    ):
        raise TypeError(
            f"rng={rng!r} is a {type(rng).__name__}: pass an int, a numpy.random.Generator or None"
        )
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng={rng}: a seed is not negative")
    return np.random.default_rng(rng)


def target(adata: AnnData, copy: bool) -> AnnData:
    """What to write to, once the results are there: a copy of a backed AnnData is in memory."""
    if not copy:
        return adata
    return adata.to_memory(copy=True) if adata.isbacked else adata.copy()
