"""external.scvi: better posteriors for models trained with scvi-tools, and back to scvi-tools."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor
from tqdm.auto import tqdm

from scuvae import __version__
from scuvae._checks import one_of, random_state_alias, whole
from scuvae._keys import SCVI, Keys
from scuvae.distributions.gaussian import COVARIANCES, Gaussian, moments, select
from scuvae.external._scvi_checks import check_model, loader_of
from scuvae.external._scvi_module import Bridge
from scuvae.inference.evaluation.paired_elbo import compare
from scuvae.inference.refinement.natural_gradient import refine_natural
from scuvae.inference.refinement.refine import THOROUGH
from scuvae.inference.refinement.stein import refine_diagonal
from scuvae.io.slots import target, write_posterior
from scuvae.runtime import isolated, random_state, resolve_device, show_progress

__all__ = ["hand_back", "refine"]

# Numbers at once in draws × cells × genes: calls must be worth their overhead.
_NUMBERS = {"cpu": 2**21, "cuda": 2**27}


@isolated
@torch.random.fork_rng(devices=[])  # scvi-tools draws by torch's own generator
@random_state_alias
def refine(
    model: Any,
    adata: AnnData | None = None,
    *,
    key_added: str | None = None,
    covariance: str = "diagonal",
    max_steps: int = 20,
    n_draws: int = 32,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Find for each cell the posterior that a trained scvi-tools model's encoder misses.

    The decoder is the model's own, in evaluation mode and untouched: batch norms with their
    running moments, batches and covariates as each cell has them. A cell keeps the encoder's q
    where refinement does not raise its ELBO. The model is neither trained nor changed.

    Parameters
    ----------
    model
        A trained ``scvi.model.SCVI``, or ``LinearSCVI`` with ``use_observed_lib_size=True``:
        every ``gene_likelihood`` and ``dispersion``, batches (one-hot or embedded), categorical
        and continuous covariates, observed library or size factors, any number of layers.
    adata
        Cells with the model's genes and covariates; None for those that it was trained on.
    key_added
        Name of the slots; None for the default, ``"scvi"``.
    covariance
        ``"diagonal"``, the encoder's family, which scvi-tools can be handed back; or ``"full"``,
        whose gap also holds what the wider family gains.
    max_steps
        Local steps at most, of which a cell takes as many as it needs.
    n_draws
        Draws of z per cell for the ELBOs, the same for both; an even number.
    rng
        Seed of these draws, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`; the model itself stays where it is.
    copy
        Return a copy with the result and leave ``adata`` alone.
    progress
        A progress bar; None: where there is a terminal or notebook.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, all float32:

    ``obsm["X_scvi"]``, ``obsm["X_scvi_scale"]``
        Means and standard deviations of the refined posteriors.
    ``obsm["X_scvi_covariance"]``
        Full covariance only: its lower triangle, row by row.
    ``obsm["X_scvi_variance"]``
        The squared scales, which is what scvi-tools calls ``qzv``.
    ``obsm["X_scvi_encoder"]``, ``obsm["X_scvi_encoder_scale"]``
        The encoder's means and standard deviations.
    ``obs["scvi_elbo"]``, ``obs["scvi_elbo_encoder"]``, ``obs["scvi_amortization_gap"]``
        ELBO of the refined and of the encoder's q, and by how much the first is higher, in nats.
        scvi-tools adds 1e-8 to every mean, this does not: its own figures are higher where a
        count meets a smaller mean.
    ``obs["scvi_elbo_se"]``, ``obs["scvi_elbo_encoder_se"]``, ``obs["scvi_amortization_gap_se"]``
        Their Monte-Carlo standard errors; that of the gap is paired, so smaller than the others.
    ``uns["scvi"]``
        The arguments as resolved, and versions.

    Raises
    ------
    TypeError
        ``model`` is not a model of scvi-tools.
    ValueError
        The model is not trained, or of a kind that is not supported; ``adata`` lacks some of its
        genes or covariates, or holds categories or values that the model cannot have.

    Examples
    --------
    >>> import scvi
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scvi.model.SCVI.setup_anndata(adata)
    >>> model = scvi.model.SCVI(adata, gene_likelihood="nb")
    >>> model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    >>> scuvae.external.scvi.refine(model)
    >>> bool(adata.obs["scvi_amortization_gap"].mean() > 0)
    True

    Then scvi-tools can work with the refined posteriors:

    >>> scuvae.external.scvi.hand_back(model)
    >>> bool((model.get_latent_representation() == adata.obsm["X_scvi"]).all())
    True
    """
    keys = Keys.of(key_added, SCVI)
    one_of("covariance", covariance, COVARIANCES)
    max_steps = whole("max_steps", max_steps)
    n_draws = whole("n_draws", n_draws, at_least=4)
    if n_draws % 2:
        raise ValueError(f"n_draws={n_draws}: draws come in pairs, pass an even number")
    where = resolve_device(device)
    check_model(model)
    adata = model.adata if adata is None else adata
    bridge = Bridge(model.module, where, whole_curvature=covariance == "full")

    parts: list[Gaussian] = []
    encoders: list[Gaussian] = []
    columns: dict[str, list[Tensor]] = {}
    with torch.no_grad(), random_state(rng, where):
        batches = tqdm(
            loader_of(model, adata, _cells_at_once(bridge, where)),
            desc="refining",
            unit="batch",
            disable=not show_progress(progress),
        )
        for tensors, index in _numbered(batches):
            batch, encoded = bridge.read(tensors, index)
            start = encoded.as_family(covariance)
            vae = bridge.as_vae()
            if covariance == "diagonal":
                refined = refine_diagonal(vae, batch, start, max_steps=max_steps)
            else:
                refined = refine_natural(vae, batch, start, **(THOROUGH | {"max_steps": max_steps}))
            found = compare(vae, batch, refined, start, n_draws)
            refined, found = _never_worse(refined, start, found)
            for name, values in found.items():
                columns.setdefault(name, []).append(values)
            parts.append(refined)
            encoders.append(encoded)

    out = target(adata, copy)
    keys.clear(out)
    write_posterior(out, key_added, moments(parts, covariance), default=SCVI)
    encoder = moments(encoders, "diagonal")
    out.obsm[keys.variance] = out.obsm[keys.scale] ** 2
    out.obsm[keys.encoder] = encoder["mean"]
    out.obsm[keys.encoder_scale] = encoder["scale"]
    for name, column in columns.items():
        out.obs[keys.obs[name]] = _array(torch.cat(column))
    out.uns[keys.uns] = {"params": _params(model, covariance, max_steps, n_draws)}
    return out if copy else None


@isolated
@torch.random.fork_rng(devices=[])  # scvi-tools draws by torch's own generator
def hand_back(model: Any, *, key: str | None = None) -> None:
    """Let scvi-tools use the refined posteriors: its latents, expression and tests come from them.

    Calls the model's ``minify_adata`` with the slots that :func:`refine` wrote to ``model.adata``,
    keeping counts: scvi-tools then reads q from there in place of its encoder. This replaces
    ``model.adata`` by a copy; the AnnData that it was before stays as it is, and
    ``model.adata = adata; model.module.minified_data_type = None`` undoes the call.

    Parameters
    ----------
    model
        As given to :func:`refine`, with ``adata=None``.
    key
        The ``key_added`` of that call.

    Returns
    -------
    None. ``get_latent_representation``, ``get_normalized_expression`` and
    ``differential_expression`` of ``model`` use the refined posteriors from then on.

    Raises
    ------
    ValueError
        ``model.adata`` has no refined posteriors, or full covariances, which scvi-tools cannot
        hold.

    Examples
    --------
    >>> import scvi
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scvi.model.SCVI.setup_anndata(adata)
    >>> model = scvi.model.SCVI(adata, gene_likelihood="nb")
    >>> model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    >>> scuvae.external.scvi.refine(model)
    >>> scuvae.external.scvi.hand_back(model)
    >>> model.minified_data_type
    'latent_posterior_parameters_with_counts'
    """
    keys = Keys.of(key, SCVI)
    check_model(model)
    for slot in (keys.mean, keys.variance):
        if slot not in model.adata.obsm:
            raise ValueError(
                f"model.adata.obsm[{slot!r}] does not exist: call scuvae.external.scvi.refine("
                f"model{'' if key is None else f', key_added={key!r}'}) first"
            )
    if keys.covariance in model.adata.obsm:
        raise ValueError(
            f"model.adata.obsm[{keys.covariance!r}] holds full covariances, scvi-tools only "
            "variances: call refine with covariance='diagonal'"
        )
    model.minify_adata(
        "latent_posterior_parameters_with_counts",
        use_latent_qzm_key=keys.mean,
        use_latent_qzv_key=keys.variance,
    )


def _cells_at_once(bridge: Bridge, device: torch.device) -> int:
    numbers = _NUMBERS.get(device.type, _NUMBERS["cpu"])
    if device.type == "cpu" and bridge.in_blocks:
        numbers *= 2  # these are never written out for all draws, so that caches set no limit
    return min(max(numbers // (2 * bridge.n_latent * bridge.n_vars), 16), 4096)


def _never_worse(
    refined: Gaussian, start: Gaussian, found: dict[str, Tensor]
) -> tuple[Gaussian, dict[str, Tensor]]:
    """The encoder's q, with its figures, where the refined one is no better over the draws."""
    better = found["amortization_gap"] > 0
    chosen = dict(found)
    for end in ("", "_se"):
        chosen[f"elbo{end}"] = torch.where(better, found[f"elbo{end}"], found[f"elbo_encoder{end}"])
        chosen[f"amortization_gap{end}"] = found[f"amortization_gap{end}"] * better
    return select([start, refined], better.long()), chosen


def _numbered(batches: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Each batch with the rows that it holds."""
    first = 0
    for tensors in batches:
        n = len(tensors["X"])
        yield tensors, torch.arange(first, first + n)
        first += n


def _params(model: Any, covariance: str, max_steps: int, n_draws: int) -> dict[str, Any]:
    import scvi

    module = model.module
    return {
        "model": type(model).__name__,
        "gene_likelihood": str(module.gene_likelihood),
        "dispersion": str(module.dispersion),
        "covariance": covariance,
        "max_steps": max_steps,
        "n_draws": n_draws,
        "version": __version__,
        "scvi_tools": str(scvi.__version__),
    }


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float32)
