"""tl.amortization_gap: what the encoder costs each cell."""

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from scuvae._checks import flag, random_state_alias, whole
from scuvae._keys import Keys
from scuvae.batches import Batch, Cells
from scuvae.distributions.gaussian import COVARIANCES, Gaussian, select
from scuvae.inference.evaluation.importance_sampling import draw_weights, gap, gap_to_evidence
from scuvae.inference.evaluation.paired_elbo import elbo_gain
from scuvae.inference.refinement.refine import THOROUGH, refine
from scuvae.inference.refinement.stein import refine_diagonal
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.io.slots import target
from scuvae.model import VAE
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device


@isolated
@random_state_alias
def amortization_gap(
    adata: AnnData,
    *,
    key: str | None = None,
    decompose: bool = False,
    max_steps: int = 20,
    n_samples: int = 32,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """What the encoder costs each cell: the best ELBO in its family less that of its own q.

    The decoder is frozen; the best q is found by local steps from the encoder's. All that is
    compared is taken over the same draws.

    With ``decompose``, what lies between the encoder's ELBO and log p(x), as Cremer, Li & Duvenaud
    (ICML 2018) take it apart: the amortization gap, best ELBO in a family less the encoder's, and
    the approximation gap, log p(x) less the best ELBO, for diagonal and for full covariances. For
    each family the two add up to the same whole. In place of log p(x) stands the
    importance-weighted bound of the best full-covariance q.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit` with ``amortized=True`` or ``"semi"``, given an encoder by
        :func:`scuvae.tl.to_encoder`, or projected.
    key
        The fit; None for the default.
    decompose
        Whether to take the whole apart, for both families.
    max_steps
        Local steps at most.
    n_samples
        Draws of z per cell for all that is compared. With ``decompose``, the bound rises with
        them, and the errors are its own from a few hundred on.
    rng
        Seed of the draws, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, in nats per cell, float32:

    ``obs["scuvae_amortization_gap"]``, ``obs["scuvae_amortization_gap_se"]``
        The gap in the encoder's own family, zero for a perfect encoder, and its Monte-Carlo
        standard error.
    ``obs["scuvae_amortization_gap_diagonal"]``, ``obs["scuvae_approximation_gap_diagonal"]``
        With ``decompose``: the best diagonal ELBO less the encoder's, and the bound less the best
        diagonal ELBO. Each has a column of its error, its name and ``_se``.
    ``obs["scuvae_amortization_gap_full"]``, ``obs["scuvae_approximation_gap_full"]``
        The same of full covariances.

    Raises
    ------
    ValueError
        The fit has no encoder, or ``adata`` lacks some of its genes, or was projected without.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, amortized=True, max_epochs=5)
    >>> scuvae.tl.amortization_gap(adata)
    >>> bool(adata.obs["scuvae_amortization_gap"].mean() > 0)
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    max_steps, n_samples = whole("max_steps", max_steps), whole("n_samples", n_samples)
    flag("decompose", decompose)
    if fit.model.encoder is None:
        raise ValueError(
            f"adata.uns[{Keys.of(key).uns!r}] is a fit with amortized=False: it has no encoder to "
            "judge. Fit with amortized=True or 'semi', or call scuvae.tl.to_encoder first"
        )
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    if cells.observed is not None:
        raise ValueError(
            f"adata.var_names lack {int((~cells.observed).sum())} of the encoder's genes, "
            "or tl.project(genes=) left them out: it cannot be judged on these cells"
        )
    with random_state(rng, where):
        columns = gap_columns(
            fit.model.to(where), cells, n_samples, max_steps=max_steps, decompose=decompose
        )

    out = target(adata, copy)
    keys = Keys.of(key)
    for kind in COVARIANCES:
        for name in (f"amortization_gap_{kind}", f"approximation_gap_{kind}"):
            keys.clear_obs(out, name, f"{name}_se")
    for name, values in columns.items():
        out.obs[keys.obs[name]] = values
    return out if copy else None


@torch.no_grad()
def gap_columns(
    model: VAE,
    cells: Cells,
    n_samples: int = 32,
    *,
    max_steps: int = 20,
    decompose: bool = False,
) -> dict[str, np.ndarray]:
    """Each gap of every cell and its standard error, in nats, over torch's random state."""
    columns: dict[str, list[Tensor]] = {}
    for batch in cells.loader(torch.arange(len(cells), device=cells.size_factor.device), CHUNK):
        found = _gaps(model, batch, n_samples, max_steps, decompose)
        for name, (values, errors) in found.items():
            columns.setdefault(name, []).append(values)
            columns.setdefault(f"{name}_se", []).append(errors)
    return {
        name: torch.cat(parts).cpu().numpy().astype(np.float32) for name, parts in columns.items()
    }


def _gaps(
    model: VAE, batch: Batch, n_samples: int, max_steps: int, decompose: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each gap of the cells of a batch, and its standard error."""
    encoded = model.encode(batch)
    own = encoded.family
    best: dict[str, Gaussian] = {}
    if decompose or own == "diagonal":
        found = refine_diagonal(model, batch, encoded, max_steps=max_steps)
        start = encoded.as_family("diagonal")
        best["diagonal"] = _better(model, batch, start, found, n_samples)
    if decompose or own == "full":
        # The wider family's best is no lower than the narrower's: it may start there.
        options = THOROUGH | {"max_steps": max_steps}
        best["full"], *others = [
            refine(model, batch, [q.as_family("full")], **options)
            for q in (encoded, *best.values())
        ]
        for other in others:
            best["full"] = _better(model, batch, best["full"], other, n_samples)
    first, *rest = draw_weights(model, batch, [encoded, *best.values()], n_samples)
    draws = dict(zip(best, rest, strict=True))
    out = {"amortization_gap": gap(draws[own], first)}
    if decompose:
        for kind in best:
            out[f"amortization_gap_{kind}"] = gap(draws[kind], first)
            out[f"approximation_gap_{kind}"] = gap_to_evidence(draws["full"], draws[kind])
    return out


def _better(model: VAE, batch: Batch, q: Gaussian, other: Gaussian, n_samples: int) -> Gaussian:
    """For each cell the other q where its ELBO is higher, over draws that neither was fitted to."""
    gain = elbo_gain(model, batch, other, q, n_samples=n_samples)
    return select([q, other], (gain > 0).long())
