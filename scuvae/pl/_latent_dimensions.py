"""How much each latent dimension of a fit is used."""

from collections.abc import Sequence
from os import PathLike

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._common import colours, finish, fits, picture


@picture
def latent_dimensions(
    adata: AnnData,
    *,
    keys: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Average KL to the prior along each principal axis of the latent space, one line per fit.

    A fit whose last axes lie near zero has more dimensions than it needs; one that falls off
    nowhere might use more: :func:`scuvae.tl.compare_n_latent` tells. Axes are the principal ones of
    the posterior means, since z is known up to a rotation.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`.
    keys
        The fits; None for all.
    ax
        Axes to draw in; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    save
        A file to write the picture to, such as ``"loss.png"`` or ``"loss.pdf"``; it is then not
        shown unless ``show=True``.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    The axes, the figure with ``return_fig``, or None if the figure was shown.

    Raises
    ------
    ValueError
        ``adata`` has no such fit, or it is of a version that did not write ``latent``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> ax = scuvae.pl.latent_dimensions(adata, show=False)
    >>> ax.get_ylabel()
    'KL to the prior (nats per cell)'
    """
    asked = fits(adata, keys)
    for key in asked:
        if "latent" not in adata.uns[key]:
            raise ValueError(
                f"adata.uns[{key!r}] has no 'latent': it is a projection's or of an earlier "
                "version. Call scuvae.tl.fit(adata) again."
            )
    own = ax is None
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
    for i, (key, colour) in enumerate(zip(asked, colours(len(asked)), strict=True)):
        latent = adata.uns[key]["latent"]
        kl = np.asarray(latent["kl"])
        said = f"{key}: {int(latent['n_active'])} of {len(kl)} active"
        # Under it a fit of the same KL, as a refined one has, is still seen.
        style = "--" if i % 2 else "-"
        ax.plot(np.arange(1, len(kl) + 1), kl, style, color=colour, marker="o", ms=4, label=said)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("Principal latent axis")
    ax.set_ylabel("KL to the prior (nats per cell)")
    ax.legend(frameon=False)
    return finish(ax, ax, own=own, show=show, save=save, return_fig=return_fig)
