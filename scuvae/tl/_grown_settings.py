"""What a fit that goes on from another takes from it, and what it does not."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np

from scuvae.inference.posteriors import POSTERIORS
from scuvae.inference.training.settings import INFERENCE, Settings, epochs_for, scheme_of
from scuvae.io.fit_state import Fit
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.priors import Prior
from scuvae.runtime import logger

# Of the epochs that a fit from the start has: tests/benchmarks/growing.py. Smaller steps as well
# were .2 nats better where new cells are like the known, and 1.7 worse where a batch is new.
_EPOCHS = 0.3
# What is the model's own, by the names of tl.fit's arguments.
_OF_MODEL = (
    *("amortized", "likelihood", "dispersion", "prior", "n_latent", "n_hidden", "n_layers"),
    *("covariance", "mask_var", "batch_key", "categorical_covariate_keys"),
    *("continuous_covariate_keys", "size_factor_key", "optimizer", "local_step", "kl_weight"),
)
OF_TRAINING = (
    *("validation_fraction", "max_epochs", "batch_size", "learning_rate", "n_samples", "dropout"),
)
# Settings of an encoder that was distilled, and of what the reference's cells alone say.
_OF_ENCODER = ("has_encoder", "encoder_input", "encoder_covariates", "distilled")
_DROPPED = ("format", "new_batches", "new_levels", "processes", "rng", "mask_var")


def given_of(function: Callable[..., Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that are not at their defaults."""
    defaults = {name: one.default for name, one in signature(function).parameters.items()}
    return {
        name: value
        for name, value in asked.items()
        if isinstance(value, np.ndarray) or value != defaults[name]
    }


def check_agreement(fit: Fit, given: Mapping[str, Any]) -> None:
    """Raise where an argument, other than at its default, is not what the reference has."""
    for name in _OF_MODEL:
        if name not in given:
            continue
        asked, known = given[name], fit.params.get(name)
        if _plain(name, asked) != _plain(name, known):
            raise ValueError(
                f"{name}={_shown(asked)}, but the reference was fitted with "
                f"{name}={_shown(known)}: what makes the model comes from the reference. Leave "
                "it out, or fit anew without reference="
            )


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = [str(part) for part in value]
    return repr(value) if not isinstance(value, np.ndarray) else "an array"


def _plain(name: str, value: Any) -> Any:
    """A value by which to tell whether two arguments say the same."""
    if isinstance(value, Likelihood | Prior | np.generic):
        value = value.item() if isinstance(value, np.generic) else value.name
    if value is None:
        return {"prior": "standard_normal", "dispersion": "gene"}.get(name)
    if name == "amortized":
        return scheme_of(value)
    if name == "likelihood" and value in LIKELIHOODS:
        return LIKELIHOODS[value].name
    if name.endswith("_keys"):
        return [str(part) for part in value] or None
    return id(value) if isinstance(value, np.ndarray) else value


def settings_for(fit: Fit, n_obs: int, given: Mapping[str, Any]) -> Settings:
    """How to train on with so many cells: shorter than from the start."""
    params = fit.params
    asked: dict[str, Any] = {name: params[name] for name in ("n_latent", "n_hidden", "n_layers")}
    asked |= {name: params[name] for name in ("optimizer", "local_step", "kl_weight")}
    asked |= {"likelihood": "auto", "covariance": params["covariance"]}
    asked |= {"validation_fraction": 0.1, "n_samples": 1, "dropout": float(params["dropout"])}
    asked |= dict.fromkeys(("max_epochs", "batch_size", "learning_rate"))
    asked |= {name: given[name] for name in OF_TRAINING if name in given}
    found = Settings.resolve(n_obs, amortized=_scheme(params), **asked)
    if asked["max_epochs"] is None:
        n_training = n_obs * (1 - found.validation_fraction)
        epochs = max(5, round(_EPOCHS * epochs_for(n_training, found.batch_size)))
        found = replace(found, max_epochs=epochs)
    return replace(found, linear_path=bool(params.get("linear_path", False)))


def _scheme(params: Mapping[str, Any]) -> bool | str:
    """The scheme that a fit is trained by; one with a distilled encoder has none without it."""
    scheme = scheme_of(params["amortized"])
    if scheme not in POSTERIORS:
        logger.info("the reference's encoder was distilled, and is not taken over")
        return False
    return next((name for name in INFERENCE if INFERENCE[name] == scheme), scheme)


def fine_tuned_params(params: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The reference's, with those of the present training."""
    dropped: tuple[str, ...] = _DROPPED
    if params["amortized"] not in (settings.amortized, scheme_of(settings.amortized)):
        dropped += _OF_ENCODER
    kept = {name: value for name, value in params.items() if name not in dropped}
    return {**kept, **settings.__dict__}
