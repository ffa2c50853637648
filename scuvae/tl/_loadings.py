"""tl.loadings: a linear decoder's loadings in principal order."""

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import flag
from scuvae._keys import Keys
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import isolated


@isolated
def loadings(adata: AnnData, *, key: str | None = None, copy: bool = False) -> AnnData | None:
    """Genes' loadings of a linear decoder, in principal order: a PCA of what the model fitted.

    A fit with ``n_layers=0`` is a probabilistic PCA, or under counts a GLM-PCA (Townes, Hicks,
    Aryee & Irizarry, Genome Biology 2019): logits are W z + b. W is known up to a rotation; here
    W z is written as orthonormal loadings times factors that are uncorrelated over cells, the
    widest first, each gene of the largest loading with a positive one.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit` with ``n_layers=0``.
    key
        The fit; None for the default.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets:

    ``varm["scuvae_loadings"]``
        Orthonormal loadings, float32 (n_vars, n_latent); 0 at genes that were not modelled, as
        scanpy's ``PCs`` have it. Of counts those of ln μ less its average over genes, which is all
        that a softmax sees.
    ``obsm["X_scuvae_factors"]``
        Cells' posterior means along them, float32 (n_obs, n_latent): logits are factors times
        loadings, and the gene's intercept.
    ``uns["scuvae_loadings"]``
        ``variance`` of the factors over cells, and ``variance_ratio``, their shares.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or one whose decoder is not linear.

    Examples
    --------
    >>> import scanpy as sc, scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, n_layers=0, max_epochs=5)
    >>> scuvae.tl.loadings(adata)
    >>> grid = sc.pl.ranking(adata, "varm", "scuvae_loadings", indices=[0, 1], show=False)
    >>> bool(abs(adata.uns["scuvae_loadings"]["variance_ratio"].sum() - 1) < 1e-6)
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    flag("copy", copy)
    keys = Keys.of(key)
    decoder = fit.model.decoder
    if len(decoder.layers) > 1:
        raise ValueError(
            f"adata.uns[{keys.uns!r}] has a decoder of {len(decoder.layers) - 1} hidden layers, "
            "which has no loadings: fit with n_layers=0"
        )
    mean = read_posterior(adata, key).mean.double()
    weight = decoder.output.weight.detach().double()
    if fit.model.likelihood.link == "softmax":
        weight = weight - weight.mean(0)
    factors, axes, variance = _principal(mean, weight)

    wide = np.zeros((adata.n_vars, axes.shape[1]), np.float32)
    places = adata.var_names.get_indexer(fit.var_names)
    wide[places[places >= 0]] = axes.numpy()[places >= 0]
    out = target(adata, copy)
    out.varm[keys.loadings] = wide
    out.obsm[keys.factors] = factors.numpy().astype(np.float32)
    out.uns[keys.loadings] = {
        "variance": variance.numpy(),
        "variance_ratio": (variance / variance.sum().clamp_min(1e-300)).numpy(),
    }
    return out if copy else None


def _principal(mean: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Factors and loadings of M Wᵀ, M centred over cells, and the factors' variances.

    By the singular values of the product of the two triangles of their QR decompositions: the
    matrix itself, cells × genes, is not made.
    """
    cells = torch.linalg.qr(mean - mean.mean(0))
    genes = torch.linalg.qr(weight)
    left, singular, right = torch.linalg.svd(cells.R @ genes.R.mT, full_matrices=False)
    axes = genes.Q @ right.mT
    largest = axes.abs().argmax(0)
    sign = axes[largest, torch.arange(axes.shape[1])].sign()
    factors = (cells.Q @ left) * (singular * sign)
    return factors, axes * sign, singular.square() / max(1, len(mean) - 1)
