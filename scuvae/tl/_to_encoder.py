"""tl.to_encoder: an encoder for a fit that has none, its decoder untouched."""

import copy as copying
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from scuvae import __version__
from scuvae._checks import random_state_alias, real, whole
from scuvae._keys import Keys
from scuvae.batches import Cells
from scuvae.distributions.gaussian import moments
from scuvae.inference.refinement.initialization import encoded
from scuvae.inference.training.distillation import distil
from scuvae.inference.training.fit import bar
from scuvae.inference.training.settings import BATCH_SIZE, LEARNING_RATES, epochs_for
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_entry, read_fit, sealed
from scuvae.io.genes import cells_of
from scuvae.io.model_arrays import build_model, model_to_arrays
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.runtime import CHUNK, isolated, logger, random_state, resolve_device
from scuvae.tl._gap import gap_columns


@isolated
@random_state_alias
def to_encoder(
    adata: AnnData,
    *,
    key: str | None = None,
    key_added: str | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Give a fit without an encoder one, which maps new cells at once; the decoder is untouched.

    The encoder, of the fit's width, depth and covariance, maximises the ELBO of its own q under
    the finished decoder: on the training cells, and on cells drawn from the decoder at their
    posteriors, new ones at every step; of counts, on some of both thinned to fewer. The held-out
    cells decide when to stop. What it still loses is measured for every cell.

    The cells keep the posteriors that they have, which are better than the encoder's;
    ``scuvae.tl.project(new, adata, amortized=True)`` hands out the encoder's for new ones.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit` with ``amortized=False``.
    key
        The fit; None for the default.
    key_added
        Name of a copy of the fit that gets the encoder; None: the fit itself gets it.
    max_epochs
        Passes over the training cells at most; None: as many as a fit of as many cells would take.
    batch_size
        Cells a step; None for 128.
    learning_rate
        Of Adam, falling to zero along a cosine; None for 1e-2.
    rng
        Seed, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.
    progress
        Show one bar; None: where there is a terminal or notebook.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets the following fields (with ``key_added="k"``:
    ``k`` in place of ``X_scuvae`` and ``scuvae``, and all of the fit's slots beside them):

    ``uns["scuvae"]``
        ``state`` with the encoder, decoder and likelihood as they were, ``params["amortized"]``
        as ``"distilled"``, and ``params["distilled"]``: how the encoder was trained.
    ``obsm["X_scuvae_encoder"]``, ``obsm["X_scuvae_encoder_scale"]``
        Means and standard deviations of the encoder's q, float32 (n_obs, n_latent).
    ``obs["scuvae_amortization_gap"]``, ``obs["scuvae_amortization_gap_se"]``
        What the encoder loses on each cell, in nats, and its standard error, as by
        :func:`scuvae.tl.amortization_gap`. The means are logged.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, the fit has an encoder already, its posteriors are
        gone, or ``adata`` lacks some of its genes.
    scuvae.inference.training.loop.TrainingError
        The loss became infinite or NaN.

    Notes
    -----
    Cells drawn from the decoder are the sleep phase of Hinton, Dayan, Frey & Neal, Science 1995,
    here with the ELBO in place of log q(z | x).

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:].copy()
    >>> scuvae.tl.fit(old, max_epochs=5)
    >>> scuvae.tl.to_encoder(old, max_epochs=5)
    >>> scuvae.tl.project(new, old, amortized=True)
    >>> new.obsm["X_scuvae"].shape
    (100, 10)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    keys, own = Keys.of(key if key_added is None else key_added), Keys.of(key)
    keys.check_free(adata)
    size = BATCH_SIZE if batch_size is None else whole("batch_size", batch_size)
    if max_epochs is not None:
        max_epochs = whole("max_epochs", max_epochs)
    rate = LEARNING_RATES["adam"]
    if learning_rate is not None:
        rate = real("learning_rate", learning_rate, above=0.0)
    where = resolve_device(device)
    if fit.model.encoder is not None:
        raise ValueError(
            f"adata.uns[{own.uns!r}] has an encoder: it is a fit with amortized="
            f"{fit.params['amortized']!r}. Pass the key= of a fit with amortized=False"
        )
    stored = read_posterior(adata, key)
    cells = cells_of(adata, fit, device=where)
    if cells.observed is not None:
        raise ValueError(
            f"adata.var_names lack {int((~cells.observed).sum())} of the fit's genes, or "
            "tl.project(genes=) left them out: an encoder needs them all. Pass the cells that were "
            "fitted"
        )
    counts = fit.model.likelihood.support == "counts"
    held_out, training = _split(adata, own, cells, counts)
    if not len(training):
        raise ValueError(
            f"adata.obs[{own.obs['split']!r}] is 'validation' for every cell with values: there is "
            "none to train on. Pass the cells that were fitted"
        )
    if max_epochs is None:
        max_epochs = epochs_for(len(training), size)

    with random_state(rng, where) as generator:
        model = _with_encoder(fit).to(where)
        order = torch.Generator().manual_seed(int(generator.integers(2**63)))
        with bar("distil", max_epochs, progress) as on_epoch:
            history = distil(
                model,
                stored.to(where),
                cells.loader(training.to(where), size, order),
                n_obs=len(training),
                held_out=cells.loader(held_out.to(where), CHUNK) if len(held_out) else None,
                learning_rate=rate,
                max_epochs=max_epochs,
                kl_weight=float(fit.params["kl_weight"]),
                totals=counts and fit.size_factor_key is None,
                on_epoch=on_epoch,
            )
    with torch.no_grad():
        everyone = cells.loader(torch.arange(len(cells), device=where), CHUNK)
        q = moments((encoded(model, batch, "diagonal") for batch in everyone), "diagonal")
    with random_state(0, where):  # then tl.amortization_gap finds the same
        columns = gap_columns(model, cells)
    for name, rows in (("training", training), ("held-out", held_out)):
        if len(rows):
            gap = float(columns["amortization_gap"][rows.numpy()].mean())
            logger.info("amortization gap of %d %s cells: %.2f nats", len(rows), name, gap)

    entry = copying.deepcopy(read_entry(adata, key))
    entry["params"] |= _params_of(fit)
    entry["params"]["distilled"] = {
        "epochs": len(history),
        "max_epochs": max_epochs,
        "batch_size": size,
        "learning_rate": rate,
        "version": __version__,
        **({"rng": int(rng)} if isinstance(rng, int | np.integer) else {}),
    }
    entry["state"] = {**entry["state"], "encoder": model_to_arrays(model)["encoder"]}
    entry = sealed(entry)
    # All is at hand: what interrupts a call before here leaves all as it was.
    out = target(adata, copy)
    if keys != own:
        kept = {slot: adata.obsm[name].copy() for slot, name in _moments(own) if name in adata.obsm}
        columns_kept = {
            name: adata.obs[own.obs[name]].copy()
            for name in ("split", "scale")
            if own.obs[name] in adata.obs
        }
        keys.clear(out)
        for slot, name in _moments(keys):
            if slot in kept:
                out.obsm[name] = kept[slot]
        for column, values in columns_kept.items():
            out.obs[keys.obs[column]] = values
    out.uns[keys.uns] = entry
    out.obsm[keys.encoder], out.obsm[keys.encoder_scale] = q["mean"], q["scale"]
    for name, values in columns.items():
        out.obs[keys.obs[name]] = values
    return out if copy else None


def _moments(keys: Keys) -> list[tuple[str, str]]:
    moments = [("mean", keys.mean), ("scale", keys.scale), ("covariance", keys.covariance)]
    return [*moments, ("embed", keys.embed)]


def _split(adata: AnnData, keys: Keys, cells: Cells, counts: bool) -> tuple[Tensor, Tensor]:
    """Rows of held-out and of training cells; those without a count teach nothing."""
    useful = cells.source.totals().cpu().numpy() > 0 if counts else np.ones(adata.n_obs, bool)
    split = adata.obs.get(keys.obs["split"])
    held_out = np.zeros(adata.n_obs, bool) if split is None else (split == "validation").to_numpy()
    if not (held_out & useful).any():
        logger.warning(
            "no cell is 'validation' in adata.obs[%r]: early stopping is off", keys.obs["split"]
        )
    rows = np.flatnonzero(held_out & useful), np.flatnonzero(~held_out & useful)
    return torch.as_tensor(rows[0]), torch.as_tensor(rows[1])


def _with_encoder(fit: Fit) -> VAE:
    """The fit's model, with a new encoder from torch's random state."""
    encoder = build_model(fit.params | _params_of(fit), len(fit.var_names)).encoder
    return VAE(fit.model.decoder, fit.model.likelihood, encoder, fit.model.prior, fit.design).eval()


def _params_of(fit: Fit) -> dict[str, Any]:
    """What describes the new encoder among the parameters of the fit."""
    found: dict[str, Any] = {"amortized": "distilled"}
    if "has_encoder" in fit.params:
        found["has_encoder"] = True
    if fit.design.n_columns:
        found["encoder_covariates"] = True
    entering = fit.model.likelihood.encoder_input()
    return found | ({} if entering == "values" else {"encoder_input": entering})
