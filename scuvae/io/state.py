"""A fit in ``uns``: the model as plain arrays, and back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae._errors import near
from scuvae._keys import DEFAULT, Keys
from scuvae.model import LIKELIHOODS, VAE, Decoder, Encoder, Likelihood
from scuvae.model.gaussian import pack, unpack


def build_model(params: dict[str, Any], n_vars: int, likelihood: Likelihood | None = None) -> VAE:
    """The VAE that ``params`` describe, freshly initialised from torch's current random state."""
    n_latent = int(params["n_latent"])
    n_hidden, n_layers = int(params["n_hidden"]), int(params["n_layers"])
    if likelihood is None:
        likelihood = LIKELIHOODS[str(params["likelihood"])](n_vars)
    # The decoder first: the same seed starts it alike with an encoder and without.
    decoder = Decoder(
        n_latent,
        n_vars,
        n_covariates=len(params.get("batches", ())),
        dropout=float(params["dropout"]),
        linear_path=bool(params.get("linear_path", False)),
        n_hidden=n_hidden,
        n_layers=n_layers,
    )
    encoder = None
    if params["amortized"]:  # True, "semi" or, by tl.to_encoder, "distilled"
        encoder = Encoder(
            n_vars,
            n_latent,
            covariance=str(params["covariance"]),
            inputs=_encoder_input(params, likelihood),
            n_hidden=n_hidden,
            n_layers=n_layers,
        )
    return VAE(decoder, likelihood, encoder)


def _encoder_input(params: dict[str, Any], likelihood: Likelihood) -> str:
    """How values enter the encoder; fits of before it was recorded had log(1 + x) of counts."""
    return str(params.get("encoder_input", "log1p" if likelihood.counts else "values"))


def model_to_arrays(model: VAE) -> dict[str, dict[str, np.ndarray]]:
    """Every parameter and buffer by part and name, on the CPU."""
    return {
        part: {
            # A single number would come back from a file as a scalar.
            name: np.atleast_1d(tensor.detach().cpu().numpy().copy())
            for name, tensor in module.state_dict().items()
        }
        for part, module in model.named_children()
    }


def model_from_arrays(params: dict[str, Any], state: dict[str, Any], n_vars: int) -> VAE:
    """The inverse of :func:`model_to_arrays`, in evaluation mode."""
    # Initial values are overwritten: they must not cost the caller random numbers.
    with torch.random.fork_rng(devices=[]):
        model = build_model(params, n_vars)
    for part, module in model.named_children():
        arrays = {name: torch.as_tensor(np.array(a)) for name, a in state[part].items()}
        if part == "likelihood":
            for name, value in arrays.items():
                setattr(module, name, nn.Parameter(value))
        else:
            module.load_state_dict(arrays)
    return model.eval()


@dataclass(frozen=True)
class Fit:
    """A fit as read from ``uns``.

    ``missing`` names those of its genes that a projection's posteriors are not conditioned on.
    """

    params: dict[str, Any]
    var_names: pd.Index
    model: VAE
    missing: pd.Index

    @property
    def layer(self) -> str | None:
        layer = self.params.get("layer")
        return None if layer is None else str(layer)

    @property
    def batch_key(self) -> str | None:
        key = self.params.get("batch_key")
        return None if key is None else str(key)

    @property
    def batches(self) -> list[str]:
        return [str(name) for name in self.params.get("batches", ())]

    @property
    def size_factor_key(self) -> str | None:
        key = self.params.get("size_factor_key")
        return None if key is None else str(key)


def read_entry(adata: AnnData, key: str | None) -> dict[str, Any]:
    """``adata.uns[key]`` of a fit, or an error that says which call is missing."""
    name = Keys.of(key).uns
    entry = adata.uns.get(name)
    if not _holds_fit(entry):
        fits = [
            k for k, v in adata.uns.items() if hasattr(v, "keys") and {"params", "state"} <= set(v)
        ]
        known = f" {near(name, fits)}" if fits else ""
        argument = "" if name == DEFAULT else f", key_added={name!r}"
        raise ValueError(
            f"adata.uns[{name!r}] holds no fit: run scuvae.tl.fit(adata{argument}) first.{known}"
        )
    return dict(entry)


def _holds_fit(entry: Any) -> bool:
    return hasattr(entry, "keys") and {"params", "history", "state"} <= set(entry.keys())


def read_missing(adata: AnnData, key: str | None) -> pd.Index:
    """Names of the genes that the projection under ``key``, if there is one, did without."""
    entry = adata.uns.get(Keys.of(key).uns)
    report = entry.get("genes", {}) if _holds_fit(entry) else {}
    return pd.Index([str(name) for name in report.get("missing", ())], dtype=object)


def read_fit(adata: AnnData, key: str | None) -> Fit:
    entry = read_entry(adata, key)
    params = {name: _plain(value) for name, value in entry["params"].items()}
    var_names = pd.Index([str(name) for name in entry["var_names"]])
    model = model_from_arrays(params, entry["state"], len(var_names))
    return Fit(params, var_names, model, read_missing(adata, key))


def _plain(value: Any) -> Any:
    """Files hand back numpy scalars and arrays where Python's own went in."""
    if isinstance(value, np.generic):
        return value.item()
    return value


def read_posterior(adata: AnnData, key: str | None) -> Distribution:
    """q of every cell from ``obsm``, on the CPU."""
    read_entry(adata, key)
    keys = Keys.of(key)
    for slot in (keys.mean, keys.scale):
        if slot not in adata.obsm:
            raise ValueError(
                f"adata.obsm[{slot!r}] is gone: fit again, or refit its cells with tl.project"
            )
    mean = torch.as_tensor(np.array(adata.obsm[keys.mean], np.float32))
    if keys.covariance in adata.obsm:
        packed = torch.as_tensor(np.array(adata.obsm[keys.covariance], np.float64))
        lower = unpack(packed, mean.shape[1])
        covariance = lower + lower.tril(-1).mT
        tril, failed = torch.linalg.cholesky_ex(covariance)
        if failed.any():
            # float32 has rounded a very long, thin covariance past positive definiteness.
            longest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
            jitter = 1e-6 * longest * torch.eye(mean.shape[1], dtype=torch.float64)
            bad = (failed > 0)[:, None, None]
            tril = torch.linalg.cholesky(torch.where(bad, covariance + jitter, covariance))
        tril = tril.float()
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    scale = torch.as_tensor(np.array(adata.obsm[keys.scale], np.float32))
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def moments(parts: Iterable[Distribution], covariance: str) -> dict[str, np.ndarray]:
    """Means, scales and, where it is full, packed covariances of q, over parts of the cells.

    A part at a time: factors and covariances of all cells at once would outweigh their table.
    """
    found: dict[str, list[np.ndarray]] = {"mean": [], "scale": []}
    if covariance == "full":
        found["covariance"] = []
    for q in parts:
        found["mean"].append(_array(q.mean))
        found["scale"].append(_array(q.stddev))
        if covariance == "full":
            if isinstance(q, MultivariateNormal):
                matrix = q.covariance_matrix
            else:
                matrix = torch.diag_embed(q.variance)
            found["covariance"].append(_array(pack(matrix)))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def write_posterior(
    adata: AnnData, key: str | None, values: dict[str, np.ndarray], default: str = DEFAULT
) -> None:
    """The :func:`moments` of every cell's q into ``obsm``, in place of those of an earlier fit."""
    keys = Keys.of(key, default)
    slots = {"mean": keys.mean, "scale": keys.scale, "covariance": keys.covariance}
    for name, slot in slots.items():
        if slot in adata.obsm:
            del adata.obsm[slot]
        if name in values:
            adata.obsm[slot] = values[name]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=np.float32)
