"""tl.project: q for cells that a fit has not seen."""

import copy as copying
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae._checks import flag, names, one_of, whole
from scuvae._checks import path as path_of
from scuvae._keys import Keys
from scuvae.distributions.gaussian import COVARIANCES
from scuvae.inference.refinement.infer import POLISH, Polish
from scuvae.inference.refinement.refine import step_options
from scuvae.io import inputs
from scuvae.io.covariates import warn_of_size_factors
from scuvae.io.fit_state import Fit, read_entry, read_fit, sealed
from scuvae.io.genes import Matched, match, some, spelt_otherwise, warn_of_empty
from scuvae.io.model_files import is_hdf5, read_as
from scuvae.io.slots import components_of, target
from scuvae.runtime import isolated, resolve_device
from scuvae.tl._fit_slots import FitSlots
from scuvae.tl._projection import polished, project_cells

NEW_BATCHES = ("error", "estimate")
# A smaller share of the reference's genes than this is more often a mistake than a panel.
_FEW_GENES = 0.1


@isolated
def project(
    adata: AnnData,
    reference: AnnData | str | PathLike[str],
    *,
    key: str | None = None,
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    key_added: str | None = None,
    amortized: bool = False,
    covariance: str | None = None,
    new_batches: str = "error",
    max_steps: int | None = None,
    polish: Polish | None = None,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Find the posteriors of new cells under a fitted model, its decoder untouched.

    Genes are matched by name. Genes that ``adata`` lacks are left out of the likelihood: it is
    conditioned on the observed ones, exactly for Poisson counts, and for given totals
    (``size_factor_key``), while a negative binomial given its cell's total over fewer genes is
    another model's. Genes that the reference does not know are not used.
    A cell's posterior depends on no other cell, but for what a new batch's cells say together of
    their batch.

    Of few genes posteriors are wide, and their means lie nearer to the prior's than those of the
    reference's own cells, found from all genes. To compare like with like, look for neighbours and
    labels among reference cells projected over the same genes, by ``genes``, as in the example:
    ``new.obsm["X_scuvae"]`` beside ``old.obsm["panel"]``.

    A cell's expected total is its total over the observed genes. Where the fit had a
    ``size_factor_key``, that column of ``adata.obs`` must hold what it held there, the total over
    all of the fit's genes, also where ``adata`` lacks some: the observed ones are expected to
    have the share of it that the decoder gives them.

    Parameters
    ----------
    adata
        New cells.
    reference
        A fitted AnnData, the path of one (``.h5ad`` or ``.zarr``), or a model file of
        :func:`scuvae.io.write_model` or what was read from it. Its cells are not used.
    key
        The reference's fit; None for the default.
    layer
        Where the new cells' values are; None: where the reference's were.
    genes
        Names of the genes to condition on; the reference's others count as missing, also where
        ``adata`` has them. Names that one of the two does not have are not used. None: all that
        both have.
    key_added
        Name of the projection's slots; None for the default names. Under the name of a fit that
        ``adata`` holds, the posteriors replace the fit's own.
    amortized
        True: the encoder's q as it is. False: local steps from the likeliest of some hundred draws
        of the prior, and from the encoder where there is one; the better is kept for each cell.
    covariance
        ``"full"`` or ``"diagonal"``; None: as in the fit.
    new_batches
        What becomes of batches that the fit has not seen. ``"error"``: nothing.
        ``"estimate"``: what such a batch adds in the decoder is estimated from its cells, or
        1,000 of them chosen by name, all else frozen: the best ELBO with a Gaussian prior, whose
        mean and variance are those of the known batches, so that a few cells move it little. A
        batch whose cells are all of one kind is confounded with that kind. Levels of other
        categorical covariates are treated alike, one after another. An encoder takes them for the
        mean of the known. :func:`scuvae.tl.transfer_labels`, :func:`scuvae.tl.novelty` and all
        that is done with ``adata`` alone go by what was found.
    max_steps
        Steps at most, of either kind. None: 5 natural ones and 20 that polish, or without polish
        20, of which a cell takes as many as it needs; for another rule its own number.
    polish
        What follows the local steps (see :func:`scuvae.tl.calibration`). True, and the default for
        counts where steps are natural, but with ``amortized=True``: steps that take q's covariance
        from the ELBO's own curvature, to the best q that is near. False: nothing, in a third to two
        thirds of the time; q is then too narrow, and its ELBO about a nat below the best.
        ``"moments"``: the steps, then the mean and covariance, or scales, of the posterior itself,
        by importance weights: intervals cover what they should, at a lower ELBO.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``obsm["X_scuvae"]``, ``obsm["X_scuvae_scale"]``,
    for a full covariance ``obsm["X_scuvae_covariance"]``, and ``uns["scuvae"]`` with the
    reference's model, so that ``adata`` can be scored and denoised by itself;
    ``obsm["X_scuvae_embed"]``, the cells' places in the reference's map (:func:`scuvae.tl.embed`);
    ``obs["scuvae_scale"]``, geometric means of posterior standard deviations. Beside it:

    ``uns["scuvae"]["genes"]``
        ``n_reference``, ``n_observed`` and ``n_unused``: how many genes the reference has, how
        many of these are conditioned on, and how many of ``adata``'s are not, since the reference
        does not know them or ``genes`` leaves them out; ``missing``: the names of the reference's
        genes that are not conditioned on, since ``adata`` lacks them or ``genes`` leaves them out,
        an array. What is made of the posteriors afterwards, by :func:`scuvae.tl.score` and others,
        does without the same genes.
    ``uns["scuvae"]["params"]["new_batches"]``
        The names of estimated batches, where there are any. ``params["batches"]`` has them after
        the fit's own, ``state`` what they add: ``adata`` is a reference that knows them.
        ``params["new_levels"]``: the same of other covariates, as ``column: level``.

    Raises
    ------
    TypeError
        ``genes`` is a single string, or holds something else than strings.
    ValueError
        The reference holds no fit; no gene in common, or none of ``genes``; a batch that the fit
        has not seen, but for ``new_batches="estimate"``, which needs a fit with batches; values
        that its likelihood cannot have; ``amortized=True`` without an encoder, with genes missing
        or with ``polish``.

    Warns
    -----
    UserWarning
        Fewer than a tenth of the reference's genes are observed; cells without counts.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:, ::2].copy()
    >>> scuvae.tl.fit(old, max_epochs=5)
    >>> scuvae.tl.project(new, old)
    >>> new.obsm["X_scuvae"].shape
    (100, 10)

    The reference's cells over the same genes, beside what they were fitted with:

    >>> scuvae.tl.project(old, old, genes=new.var_names, key_added="panel")
    >>> old.obsm["panel"].shape
    (600, 10)
    """
    inputs.check_anndata(adata, copy=copy)
    keys = Keys.of(key_added)
    keys.check_free(adata)
    flag("amortized", amortized)
    if polish is not None and one_of("polish", polish, POLISH) and amortized:
        raise ValueError(f"polish={polish!r} moves the encoder's q: pass amortized=False")
    if max_steps is not None:
        max_steps = whole("max_steps", max_steps)
    if covariance is not None:
        one_of("covariance", covariance, COVARIANCES)
    one_of("new_batches", new_batches, NEW_BATCHES)
    chosen = None if genes is None else pd.Index(names("genes", genes))
    reference = read_reference(reference, key)
    fit = read_fit(reference, key, "reference")
    entry = copying.deepcopy(read_entry(reference, key))
    if layer is not None:
        entry["params"]["layer"] = layer
    if covariance is None:
        covariance = str(fit.params["covariance"])
    options = step_options(str(fit.params["local_step"]), max_steps, fit.params)
    if polish is None:
        polish = not amortized and polished(fit)
    extend = new_batches == "estimate"
    if extend and not fit.design.categorical:
        raise ValueError(
            "new_batches='estimate', but the fit knows no batches: fit the reference with "
            "batch_key= or categorical_covariate_keys=, or pass new_batches='error'"
        )
    where = resolve_device(device)
    matched = match(adata, fit, layer, where, genes=chosen, extend=extend)
    cells = matched.cells
    if amortized and (fit.model.encoder is None or cells.observed is not None):
        lacks = (
            "the fit has no encoder (scuvae.tl.to_encoder makes one)"
            if fit.model.encoder is None
            else f"{int((~cells.observed).sum())} of the encoder's genes are not observed"  # type: ignore[operator]
        )
        raise ValueError(f"amortized=True, but {lacks}: pass amortized=False")

    _warn_of_few_genes(adata, fit, matched, chosen)
    if fit.size_factor_key is not None and cells.observed is None:
        factors, totals = cells.size_factor.cpu().numpy(), cells.source.totals().cpu().numpy()
        if fit.model.likelihood.link == "softmax":
            warn_of_size_factors(fit.size_factor_key, factors, totals, None, stacklevel=4)
    entry["genes"] = matched_genes(fit, matched)
    options |= {"amortized": amortized, "polish": polish}
    found = project_cells(adata, fit, entry, matched, covariance, **options)
    warn_of_empty(fit, cells, "they say nothing about z")
    components = components_of(found.q, found.model.prior)
    slots = FitSlots(found.q, sealed(entry), found.coordinates, components)
    # All is at hand: what interrupts a call before here leaves all as it was.
    out = target(adata, copy)
    slots.write(out, key_added)
    return out if copy else None


def read_reference(
    reference: AnnData | str | PathLike[str], key: str | None = None, *, cells: bool = False
) -> AnnData:
    """A reference in memory, or read from the file that it is the path of.

    The one fit of a model file is found under ``key``. ``cells``: the reference's are needed too.
    """
    if isinstance(reference, str | PathLike):
        text = path_of("reference", reference, "a file with a fit, or pass a fitted AnnData")
        reference = _read(Path(text), Keys.of(key).uns)
    inputs.check_type(reference, "reference")
    if cells and not reference.n_obs:
        raise ValueError(
            "reference is a model without cells, and new cells are compared with its cells: pass "
            "the fitted AnnData, or the path of one"
        )
    return reference


def matched_genes(fit: Fit, matched: Matched) -> dict[str, Any]:
    """What was matched of the reference's genes, for ``uns``."""
    found = matched.found
    return {
        "n_reference": len(found),
        "n_observed": int(found.sum()),
        "n_unused": matched.n_unused,
        "missing": np.array(fit.var_names[~found], dtype=object),
    }


def _warn_of_few_genes(adata: AnnData, fit: Fit, matched: Matched, chosen: pd.Index | None) -> None:
    found = matched.found
    differ = spelt_otherwise(adata.var_names, fit.var_names[~found]) if chosen is None else ""
    if found.mean() < _FEW_GENES or differ:
        who = "adata has" if chosen is None else "genes= leaves"
        named = "" if chosen is None else f", genes= has {some(chosen)}"
        advice = differ or "Are they all symbols, or all ids?"
        warnings.warn(
            f"{who} {found.sum()} of the reference's {len(found)} genes: the reference has "
            f"{some(fit.var_names)}, adata has {some(adata.var_names)}{named}. {advice}",
            stacklevel=4,
        )


def _read(path: Path, name: str) -> AnnData:
    if not path.exists():
        raise FileNotFoundError(
            f"reference={str(path)!r} does not exist: pass a fitted AnnData, or the path of one"
        )
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"reference={str(path)!r} is a FIFO or device: name a file with a fit")
    if not path.is_dir() and path.suffix != ".h5ad" and not is_hdf5(path):
        return read_as(path, name)
    try:
        return anndata.read_zarr(str(path)) if path.is_dir() else anndata.read_h5ad(path)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"reference={str(path)!r} cannot be read as an AnnData ({said}): pass a fitted "
            "AnnData, or the path of one"
        ) from error
