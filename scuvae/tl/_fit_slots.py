"""The slots of a fit: made at once, then written at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._keys import Keys
from scuvae.inference.evaluation.latent_dimensions import latent_dimensions
from scuvae.io.fit_state import sealed
from scuvae.io.model_arrays import model_to_arrays
from scuvae.io.slots import components_of, parts_of, write_components, write_posterior
from scuvae.model import VAE
from scuvae.model.covariates import Covariates
from scuvae.tl._embed import common_total, new_map, posterior_scale


@dataclass(frozen=True)
class FitSlots:
    """What a fit leaves.

    Attributes
    ----------
    q
        The moments of every cell's posterior.
    entry
        For ``uns``, sealed.
    coordinates
        The map; None where there is none.
    components
        As :func:`scuvae.io.slots.components_of` has them.
    split
        ``train``, ``validation`` or ``added``; None where nothing is known of it.
    """

    q: dict[str, np.ndarray]
    entry: dict[str, Any]
    coordinates: np.ndarray | None
    components: np.ndarray | None
    split: Any = None

    @classmethod
    def of(
        cls,
        model: VAE,
        q: dict[str, np.ndarray],
        about: Mapping[str, Any],
        covariates: Covariates | None,
        size_factor: torch.Tensor,
        split: Any = None,
    ) -> "FitSlots":
        """With a map of its own; ``about`` is what ``uns`` has beside model and map."""
        where = next(model.parameters()).device
        components = components_of(q, model.prior)
        mean = torch.as_tensor(q["mean"], device=where)
        coordinates, basis = new_map(model, mean, covariates, common_total(size_factor))
        found = {"state": model_to_arrays(model), "embed": basis, "latent": in_use(q)}
        return cls(q, sealed({**about, **found}), coordinates, components, split)

    def write(self, out: AnnData, key: str | None) -> None:
        """In place of all of an earlier fit of that name."""
        keys = Keys.of(key)
        scale = posterior_scale(self.q["scale"])
        keys.clear(out)
        write_posterior(out, key, self.q)
        if self.split is not None:
            out.obs[keys.obs["split"]] = self.split
        out.uns[keys.uns] = self.entry
        write_components(out, key, self.components)
        if self.coordinates is not None:
            out.obsm[keys.embed] = self.coordinates
        out.obs[keys.obs["scale"]] = scale


def split_of(held_out: np.ndarray, added: np.ndarray | None = None) -> pd.Categorical:
    """``train`` and ``validation``; ``added``: cells that came when the decoder was finished."""
    codes, categories = held_out.astype(np.int8), ["train", "validation"]
    if added is not None:
        codes[added], categories = 2, [*categories, "added"]
    return pd.Categorical.from_codes(codes, categories)


def in_use(q: dict[str, np.ndarray]) -> dict[str, Any]:
    """How much each latent dimension is used, for ``uns``."""
    found = latent_dimensions(torch.as_tensor(q["mean"]), parts_of(q))
    numbers = {name: values.numpy() for name, values in found._asdict().items()}
    return {**numbers, "n_active": found.n_active}
