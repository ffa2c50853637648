"""pp.thin_counts: each count split in two, molecule by molecule."""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse as sp

from scuvae._checks import flag, names, random_generator, random_state_alias, real
from scuvae._keys import check_name
from scuvae.batches.split_counts import split_counts
from scuvae.io import inputs
from scuvae.io.slots import target
from scuvae.runtime import isolated


@isolated
@random_state_alias
def thin_counts(
    adata: AnnData,
    *,
    fraction: float = 0.5,
    layer: str | None = None,
    layers_added: Sequence[str] = ("thinned", "rest"),
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Split every count in two: each molecule goes to the first layer with chance ``fraction``.

    For molecular cross-validation (Batson, Royer & Webber, bioRxiv 2019): fit to the first layer,
    see how well the second is explained. Or for shallower cells: the first layer is what a
    sequencer would have counted of the same cells at that fraction of the depth. Where counts are
    Poisson given a cell's state, the two layers are independent given it.

    Parameters
    ----------
    adata
        Cells with whole counts.
    fraction
        The expected share of molecules in the first layer, above 0 and below 1.
    layer
        Where the counts are; None for ``adata.X``.
    layers_added
        Names of the two layers: the thinned counts, and the rest.
    rng
        Seed, Generator or None; ``random_state`` is an alias. The same seed gives the same split,
        whether counts are stored sparse or dense.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``layers["thinned"]``, Binomial(x, ``fraction``)
    of every count x, and ``layers["rest"]``, what is left of it: they sum to the original. Sparse
    counts give CSR matrices, dense ones arrays, of their dtype (float16 becomes float32).

    Raises
    ------
    ValueError
        The counts are not whole, or negative: names the first cell and gene. ``fraction`` is not
        between 0 and 1; the two names are one, or that of ``layer``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.pp.thin_counts(adata, fraction=0.1)
    >>> bool(0.09 < adata.layers["thinned"].sum() / adata.X.sum() < 0.11)
    True
    >>> bool(abs(adata.layers["thinned"] + adata.layers["rest"] - adata.X).max() == 0)
    True
    """
    inputs.check_anndata(adata, copy=copy)
    fraction = real("fraction", fraction, above=0, below=1)
    flag("copy", copy)
    if isinstance(layers_added, Set):
        raise TypeError(f"layers_added={layers_added!r} has no order: pass a list of two names")
    added = [check_name("layers_added", name) for name in names("layers_added", layers_added)]
    if len(added) != 2 or added[0] == added[1] or layer in added:
        raise ValueError(
            f"layers_added={layers_added!r}: pass two different names"
            + (f", neither of them {layer!r}, which is split" if layer in added else "")
        )
    generator = random_generator(rng)
    matrix = inputs.read_matrix(adata, layer)
    wrong = inputs.not_whole(matrix, adata, layer)
    if wrong:
        raise ValueError(f"{wrong}: only whole counts can be split. Pass layer= with raw counts")
    parts: tuple[Any, ...] = split_counts(matrix, fraction, generator)
    if isinstance(adata.X if layer is None else adata.layers[layer], sp.spmatrix):
        parts = tuple(sp.csr_matrix(part) for part in parts)

    out = target(adata, copy)
    for name, part in zip(added, parts, strict=True):
        out.layers[name] = part
    return out if copy else None
