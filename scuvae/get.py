"""Read a fit back from AnnData."""

import pandas as pd
from anndata import AnnData
from torch.distributions import Distribution

from scuvae.io.fit_state import read_entry, read_fit
from scuvae.io.fit_summary import FitSummary, summary_of
from scuvae.io.inputs import check_anndata, check_type
from scuvae.io.slots import read_posterior
from scuvae.model import VAE
from scuvae.runtime import isolated

__all__ = ["fit", "history", "model", "posterior"]


@isolated
def fit(adata: AnnData, *, key: str | None = None) -> FitSummary:
    """What a fit is: on what, how, how good, what it wrote and what can be done next.

    Parameters
    ----------
    adata, key
        As in :func:`model`.

    Returns
    -------
    An object that prints as some lines, and as a table in a notebook; its ``to_dict()`` has the
    same as numbers: ``n_obs``, ``epochs``, ``held_out_elbo`` (nats per cell), ...

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()[:100].copy()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> print(scuvae.get.fit(adata))  # doctest: +ELLIPSIS
    scuvae fit 'scuvae', made by version ...
      on          100 cells × 765 genes, values of X
      model       negative_binomial likelihood, standard_normal prior, 10 latent dimensions ...
    >>> scuvae.get.fit(adata).to_dict()["epochs"]
    2
    """
    return summary_of(check_type(adata), key)


@isolated
def model(adata: AnnData, *, key: str | None = None) -> VAE:
    """The fitted model, in evaluation mode on the CPU.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or read by :func:`scuvae.io.read_model`.
    key
        The fit's ``key_added``; None for the default, ``"scuvae"``.

    Returns
    -------
    A torch module with ``decoder``, ``likelihood``, ``prior`` and ``encoder`` (None when there is
    none). ``likelihood.log_prob(x, decoder(z), size_factor)`` is log p(x | z) in nats, summed over
    genes, with any leading dimensions of draws; after ``dispersion="gene-batch"`` ask
    ``likelihood_of(covariates)``, that of cells with such rows of covariates, in its place.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()[:100].copy()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> vae = scuvae.get.model(adata)
    >>> eta = vae.decoder(vae.prior.sample((5,)))
    >>> eta.shape
    torch.Size([5, 765])
    """
    return read_fit(check_type(adata), key).model


@isolated
def posterior(adata: AnnData, *, key: str | None = None) -> Distribution:
    """Every cell's q(z) as a torch distribution, batch shape (n_obs,), event shape (n_latent,).

    Parameters
    ----------
    adata, key
        As in :func:`model`.

    Returns
    -------
    ``MultivariateNormal`` for a full covariance, ``Independent(Normal)`` for a diagonal one.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or its ``obsm`` slots are gone.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()[:100].copy()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> scuvae.get.posterior(adata).sample((3,)).shape
    torch.Size([3, 100, 10])
    """
    return read_posterior(check_anndata(adata), key).as_torch()


@isolated
def history(adata: AnnData, *, key: str | None = None) -> pd.DataFrame:
    """The loss trace: one row an epoch, nats per cell.

    Parameters
    ----------
    adata, key
        As in :func:`model`.

    Returns
    -------
    Index ``epoch``, columns ``loss`` (what was minimised), ``elbo``, ``reconstruction``, ``kl``
    (on training cells) and ``validation_elbo`` (held-out cells, q optimised with the decoder
    frozen; NaN in epochs without a measurement).

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()[:100].copy()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> scuvae.get.history(adata).shape
    (2, 5)
    """
    table: pd.DataFrame = read_entry(check_type(adata), key)["history"].copy()
    return table
