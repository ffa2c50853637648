"""Models as plain arrays and back."""

from typing import Any

import numpy as np
import torch
from torch import nn

from scuvae._random import using
from scuvae.model import VAE, Decoder, Encoder
from scuvae.model.covariates import Design
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.likelihoods.by_level import ByLevel
from scuvae.model.priors import PRIORS, Prior


def build_model(
    params: dict[str, Any],
    n_vars: int,
    likelihood: Likelihood | None = None,
    prior: Prior | None = None,
) -> VAE:
    """The VAE that ``params`` describe, freshly initialised from torch's current random state."""
    n_latent = int(params["n_latent"])
    n_hidden, n_layers = int(params["n_hidden"]), int(params["n_layers"])
    if likelihood is None:
        likelihood = _registered("likelihood", str(params["likelihood"]), LIKELIHOODS)(n_vars)
    if prior is None:
        # Fits of before there were others have N(0, I).
        name = str(params.get("prior", "standard_normal"))
        prior = _registered("prior", name, PRIORS)(n_latent)
    design = Design.from_params(params)
    if params.get("dispersion", "gene") == "gene-batch":
        likelihood = ByLevel.of(likelihood, design.n_levels[0])
    # The decoder first: the same seed starts it alike with an encoder and without.
    decoder = Decoder(
        n_latent,
        n_vars,
        n_covariates=design.n_columns,
        dropout=float(params["dropout"]),
        linear_path=bool(params.get("linear_path", False)),
        slopes=bool(params.get("covariate_slopes", False)),
        n_hidden=n_hidden,
        n_layers=n_layers,
    )
    encoder = None
    # Fits by a scheme from outside the package say so; of the others only those of False have none.
    if params.get("has_encoder", bool(params["amortized"])):
        encoder = Encoder(
            n_vars,
            n_latent,
            covariance=str(params["covariance"]),
            inputs=encoder_input_of(params, likelihood),
            n_hidden=n_hidden,
            n_layers=n_layers,
            # Encoders of earlier versions were not told of batches.
            n_covariates=design.n_columns * bool(params.get("encoder_covariates", False)),
        )
    return VAE(decoder, likelihood, encoder, prior, design)


def _registered(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        plural = f"{what}s"
        raise ValueError(
            f"the fit's {what} is {name!r}, which is not registered: set "
            f"scuvae.model.{plural}.{plural.upper()}[{name!r}] to its class"
        )
    return known[name]


def encoder_input_of(params: dict[str, Any], likelihood: Likelihood) -> str:
    """How values enter the encoder; fits of before it was recorded had log(1 + x) of counts."""
    return str(params.get("encoder_input", "log1p" if likelihood.support == "counts" else "values"))


def model_to_arrays(model: VAE) -> dict[str, dict[str, np.ndarray]]:
    """Every parameter and buffer by part and name, on the CPU."""
    return {
        part: {
            # A single number would come back from a file as a scalar.
            name: np.atleast_1d(tensor.detach().cpu().numpy().copy())
            for name, tensor in module.state_dict().items()
        }
        for part, module in model.named_children()
        if part != "prior" or module.state_dict()  # N(0, I) has nothing to keep
    }


def model_from_arrays(params: dict[str, Any], state: dict[str, Any], n_vars: int) -> VAE:
    """The inverse of :func:`model_to_arrays`, in evaluation mode."""
    # Initial values are overwritten: they must not cost the caller random numbers.
    with using(torch.Generator()):
        model = build_model(params, n_vars)
    for part, module in model.named_children():
        if not module.state_dict():
            continue
        arrays = {name: torch.as_tensor(np.array(a)) for name, a in state.get(part, {}).items()}
        if part in ("likelihood", "prior"):  # as many numbers as the instance had
            for name, value in arrays.items():
                learnt = name in dict(module.named_parameters())
                owner, _, own = name.rpartition(".")
                part_of = module.get_submodule(owner)
                setattr(part_of, own, nn.Parameter(value) if learnt else value)
        else:
            module.load_state_dict(arrays)
    return model.eval()
