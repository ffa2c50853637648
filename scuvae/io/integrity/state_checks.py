"""Whether settings, gene names and arrays make a model: before any of it is built."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from scuvae import __version__
from scuvae._checks import one_of, real, whole
from scuvae._errors import near
from scuvae._random import using
from scuvae.distributions.gaussian import COVARIANCES
from scuvae.io.integrity.manifest import Damaged
from scuvae.io.model_arrays import build_model
from scuvae.model.covariates import Design
from scuvae.model.likelihoods import LIKELIHOODS
from scuvae.model.likelihoods.by_level import DISPERSIONS
from scuvae.model.priors import PRIORS

# What ``params`` may hold. What is not here this version would leave out of account: a new setting
# gets an entry, and one that changes what the others mean a new ``manifest.FORMAT``.
_NEEDED = {
    *("amortized", "likelihood", "n_latent", "n_hidden", "n_layers", "covariance", "local_step"),
    *("kl_weight", "dropout"),
}
SETTINGS = _NEEDED | {
    *("format", "version", "torch_version", "anndata_version", "device", "rng"),
    *("layer", "mask_var", "batch_key", "batches", "new_batches", "new_levels", "size_factor_key"),
    *("categorical_covariate_keys", "categorical_covariate_levels", "categorical_covariate_sizes"),
    *("continuous_covariate_keys", "continuous_covariate_means", "continuous_covariate_scales"),
    *("prior", "has_encoder", "encoder_input", "encoder_covariates", "linear_path", "distilled"),
    *("covariate_slopes", "processes", "dispersion"),
    *("validation_fraction", "max_epochs", "batch_size", "learning_rate", "optimizer", "n_samples"),
    *("early_stopping", "check_values"),
}


def check_settings(params: Mapping[str, Any], where: str) -> None:
    """Raise for a likelihood or a setting that this version does not know, or a value of none."""
    version = params.get("version", "an unknown version")
    by = f"{where}['params'], written by scuvae {version}"
    known: dict[str, Mapping[str, Any]] = {"likelihood": LIKELIHOODS, "prior": PRIORS}
    for what, registry in known.items():
        name, plural = params.get(what), f"{what}s"
        if name is not None and (not isinstance(name, str) or name not in registry):
            raise ValueError(
                f"{by}: the fit's {what} is {name!r}, which is not registered: set scuvae.model."
                f"{plural}.{plural.upper()}[{name!r}] to its class. {near(name, registry)}"
            )
    unknown = sorted(name for name in params if name.split("/")[0] not in SETTINGS)
    if unknown:
        raise ValueError(
            f"{by}: the setting {unknown[0]!r}, {params[unknown[0]]!r}, is not known to scuvae "
            f"{__version__}: read the fit with the version that wrote it, or fit again"
        )
    lacking = sorted(_NEEDED - set(params))
    if lacking:
        raise Damaged(f"{by}: it lacks the setting {lacking[0]!r}: fit again")
    try:
        for setting in ("n_latent", "n_hidden"):
            whole(setting, params[setting])
        whole("n_layers", params["n_layers"], at_least=0)
        one_of("covariance", params["covariance"], COVARIANCES)
        real("kl_weight", params["kl_weight"], above=0.0)
        real("dropout", params["dropout"], low=0.0, below=1.0)
        one_of("dispersion", params.get("dispersion", "gene"), DISPERSIONS)
        if params.get("dispersion") == "gene-batch" and not params.get("batches"):
            raise ValueError("dispersion='gene-batch' of a fit without batches")
        if not isinstance(params["amortized"], bool | str):
            raise TypeError(f"amortized={params['amortized']!r}")
        if not isinstance(params["local_step"], str):
            raise TypeError(f"local_step={params['local_step']!r}")
        names = params.get("batches", [])
        if not isinstance(names, list) or len(set(names)) < len(names):
            raise ValueError("batches are no list of names, or one is there twice")
    except (TypeError, ValueError) as error:
        raise Damaged(f"{by}: {error}") from None


def checked_names(names: Any, where: str) -> list[str]:
    """Gene names, if they are a list of strings, each there once."""
    if not isinstance(names, list) or not names:
        raise Damaged(f"{where}['var_names'] is no list of gene names: read an undamaged copy")
    if len(set(names)) < len(names):
        raise Damaged(f"{where}['var_names'] names a gene twice: read an undamaged copy")
    return names


def check_state(
    params: Mapping[str, Any], arrays: Mapping[str, np.ndarray], n_vars: int, where: str
) -> None:
    """Raise unless the arrays are those that a model of these settings has, and finite.

    Nothing of the size that the settings claim is allocated.
    """
    state = {path.removeprefix("state/"): a for path, a in arrays.items() if path[:6] == "state/"}
    largest = sum(array.size for array in state.values())
    for setting, most in [
        ("n_layers", len(state)),
        ("n_hidden", largest if params["n_layers"] else np.inf),
        ("n_latent", largest),
    ]:
        if params[setting] > most:
            raise Damaged(
                f"{where}['params'][{setting!r}] is {params[setting]}, but ['state'] has "
                f"{len(state)} arrays of {largest} numbers: read an undamaged copy"
            )
    expected = _expected(dict(params), n_vars)
    gone, odd = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if gone or odd:
        what = f"lacks {gone[0]!r}" if gone else f"has {odd[0]!r}, which no such model has"
        raise Damaged(
            f"{where}['state'], written by scuvae {params.get('version')}, {what}: read an "
            "undamaged copy, or fit again"
        )
    for path, (shape, dtype) in expected.items():
        array = state[path]
        fits = array.shape == shape
        if path.startswith("likelihood/"):  # it may have chosen one value for each gene, or for all
            fits = fits or set(array.shape) <= {1, n_vars, *shape}
        if path.startswith("prior/"):  # as many components as the instance had
            fits = fits or array.shape[1:] == shape[1:]
        if not fits or array.dtype != dtype:
            raise Damaged(
                f"{where}['state']: {path!r} is {array.dtype} of shape {array.shape}, but the "
                f"model's is {dtype} of shape {shape}: read an undamaged copy, or fit again"
            )
    for path, array in arrays.items():
        if not path.startswith("history/") and not np.isfinite(array).all():
            raise Damaged(f"{where}: {path!r} holds values that are not finite: fit again")
    embed = {path.removeprefix("embed/"): a for path, a in arrays.items() if path[:6] == "embed/"}
    if {"centre", "components"} <= set(embed):
        centre, components = embed["centre"].shape, embed["components"].shape
        if centre != (n_vars,) or len(components) != 2 or n_vars not in components:
            raise Damaged(
                f"{where}['embed'] has shapes {centre} and {components} for {n_vars} genes: read "
                "an undamaged copy, or fit again"
            )
    _check_alignment(embed, params, where)


def _check_alignment(embed: dict[str, np.ndarray], params: Mapping[str, Any], where: str) -> None:
    """Raise where a map's alignment over covariates is none of such a model."""
    found = {p.removeprefix("alignment/"): a.shape for p, a in embed.items() if "/" in p}
    if not found:
        return
    kinds, n_latent = np.shape(embed.get("alignment/weight", ()))[:2], int(params["n_latent"])
    n_columns = Design.from_params(params).n_columns
    expected = {
        "weight": kinds,
        "centre": (*kinds, n_latent),
        "effect": (*kinds, n_columns, n_latent),
        "factor": (*kinds[:1], n_latent, n_latent),
        "size": (*kinds[:1], n_columns),
    }
    if found != expected:
        raise Damaged(
            f"{where}['embed']['alignment'] has shapes {found} for {n_latent} latent dimensions "
            f"and {n_columns} columns of covariates: read an undamaged copy, or fit again"
        )


def _expected(params: dict[str, Any], n_vars: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of such a model."""
    with using(torch.Generator()):
        likelihood = LIKELIHOODS[params["likelihood"]](n_vars)  # perhaps not ours: as it is
        with torch.device("meta"):
            model = build_model(params, n_vars, likelihood)
    found = {}
    for part, module in model.named_children():
        for name, tensor in module.state_dict().items():
            dtype = torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype
            found[f"{part}/{name}"] = (tuple(tensor.shape) or (1,), dtype)
    return found
