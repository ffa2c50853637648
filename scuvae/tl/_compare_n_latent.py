"""tl.compare_n_latent: how many latent dimensions, by what was held out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse as sp

from scuvae._checks import random_generator, random_state_alias, whole
from scuvae._keys import DEFAULT
from scuvae.batches.sparse_rows import dense
from scuvae.batches.split_counts import split_counts
from scuvae.distributions.quasi_random import normal_points
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.io.slots import read_posterior
from scuvae.runtime import CHUNK, isolated
from scuvae.tl._fit import fit

# Draws of z that a cell's profile is averaged over.
_DRAWS = 8


@isolated
@random_state_alias
def compare_n_latent(
    adata: AnnData,
    *,
    n_latents: Sequence[int] = (5, 10, 20, 30),
    layer: str | None = None,
    rng: int | np.random.Generator | None = 0,
    **options: Any,
) -> pd.DataFrame:
    """Fit with several numbers of latent dimensions, and compare them by what was held out.

    Twice each: to all counts, judged by held-out cells, and to half of every cell's molecules,
    judged by the other half (molecular cross-validation: Batson, Royer & Webber, bioRxiv 2019).
    Take the smallest number after which neither rises by more than its noise.

    Parameters
    ----------
    adata
        Cells with whole counts; it is left alone.
    n_latents
        Numbers of latent dimensions.
    layer
        Where the counts are; None for ``adata.X``.
    rng
        Seed, Generator or None, of the split and of every fit; ``random_state`` is an alias.
    options
        Further arguments of :func:`scuvae.tl.fit`, the same for all.

    Returns
    -------
    Index ``n_latent``, columns ``validation_elbo`` (nats a held-out cell, the best of the fit),
    ``molecules`` (log-likelihood of the held-out molecules, Poisson, in nats a cell beyond that of
    the cells' mean profile), ``molecules_se`` (its standard error over cells) and ``n_active``.

    Raises
    ------
    ValueError, TypeError
        The counts are not whole, or arguments that :func:`scuvae.tl.fit` does not take.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> table = scuvae.tl.compare_n_latent(adata, n_latents=[2, 5], max_epochs=5)
    >>> table.columns.tolist()
    ['validation_elbo', 'molecules', 'molecules_se', 'n_active']
    """
    inputs.check_anndata(adata)
    if isinstance(n_latents, str | bytes | Mapping) or not isinstance(n_latents, Iterable):
        raise TypeError(
            f"n_latents={n_latents!r} is a {type(n_latents).__name__}: pass a list of whole numbers"
        )
    numbers = [whole("n_latents", n) for n in n_latents]
    if not numbers:
        raise ValueError("n_latents is empty: pass at least one number of latent dimensions")
    own = {"n_latent", "copy", "key_added", "random_state"} & options.keys()
    if own:
        raise TypeError(
            f"{min(own)}= is not for tl.compare_n_latent: it makes fits of its own, of n_latents="
        )
    generator = random_generator(rng)
    seed = int(rng) if isinstance(rng, int | np.integer) else int(generator.integers(2**31))
    matrix = inputs.read_matrix(adata, layer)
    wrong = inputs.not_whole(matrix, adata, layer)
    if wrong:
        raise ValueError(f"{wrong}: only whole counts can be held out. Pass layer= with raw counts")
    seen, hidden = split_counts(matrix, 0.5, generator)
    rows = []
    for n in numbers:
        whole_fit, half_fit = (
            _fitted(adata, values, n_latent=n, rng=seed, **options) for values in (matrix, seen)
        )
        entry = whole_fit.uns[DEFAULT]
        score = _molecules(half_fit, hidden)
        rows.append(
            {
                "validation_elbo": float(entry["history"]["validation_elbo"].max()),
                "molecules": float(score.mean()),
                "molecules_se": float(score.std(ddof=1) / len(score) ** 0.5),
                "n_active": entry["latent"]["n_active"],
            }
        )
    return pd.DataFrame(rows, index=pd.Index(numbers, name="n_latent"))


def _fitted(adata: AnnData, values: Any, **options: Any) -> AnnData:
    """A fit of the same cells with other counts."""
    found = AnnData(sp.csr_matrix(values) if sp.issparse(values) else values, adata.obs, adata.var)
    fit(found, **options)
    return found


@torch.no_grad()
def _molecules(adata: AnnData, hidden: Any) -> np.ndarray:
    """Of each cell with hidden molecules, Σ_g O_g ln μ_g − μ_g, μ = (Σ O) π, beyond mean π's."""
    fit = read_fit(adata, None)
    q, model, cells = read_posterior(adata, None), fit.model, cells_of(adata, fit)
    genes = adata.var_names.get_indexer(fit.var_names)
    hidden = sp.csr_array(hidden)[:, genes]
    usual = torch.as_tensor(np.asarray(hidden.sum(0)).ravel() / hidden.sum()).clamp_min(1e-12)
    points = normal_points(_DRAWS, q.mean)
    scores = []
    for batch in cells.loader(torch.arange(len(cells)), CHUNK):
        profile = torch.zeros(len(batch), len(genes))
        for point in points:
            eta = model.decoder(q[batch.index].draw(point), batch.covariates)
            likelihood = model.likelihood_of(batch.covariates)
            profile += dense(likelihood.mean(eta, model.size_factor(batch, eta), None))
        profile = (profile / profile.sum(1, keepdim=True)).double().clamp_min(1e-12)
        counts = torch.as_tensor(hidden[batch.index.numpy()].toarray()).double()
        # Both have the same total: what is left of the Poisson's is the logarithms.
        scores.append((counts * (profile / usual).log()).sum(1)[counts.sum(1) > 0])
    return torch.cat(scores).numpy()
