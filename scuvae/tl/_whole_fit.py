"""A fit of fitted and further genes alike, made of one that was extended."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._keys import Keys
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.refinement.refine import LOCAL_STEPS, step_options
from scuvae.inference.training.gene_totals import DENOISING_DRAWS, GeneTotals
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import Fit, sealed
from scuvae.io.further_genes import SLOT, Extended
from scuvae.io.genes import cells_of
from scuvae.io.model_arrays import model_to_arrays
from scuvae.io.slots import components_of, gaussian_of, write_components, write_posterior
from scuvae.runtime import CHUNK
from scuvae.tl._embed import common_total, new_map, posterior_scale
from scuvae.tl._fit import in_use
from scuvae.tl._refine import better

# Settings of an encoder, which the whole fit has not, and of a mask that named the fitted genes.
_DROPPED = ("mask_var", "has_encoder", "encoder_input", "encoder_covariates", "distilled")
_DRAWS = 8


class WholeFit:
    """What is to be written of it.

    Posteriors start from the fit's own and take natural steps, the decoder frozen, with the counts
    of all genes; intercepts then give back each gene's total.

    Parameters
    ----------
    adata
        With the fit.
    fit, entry
        As read, and its ``uns``.
    extended
        The fit with its further genes.
    stored
        The fit's posteriors, on the device.
    """

    def __init__(
        self, adata: AnnData, fit: Fit, entry: dict[str, Any], extended: Extended, stored: Gaussian
    ) -> None:
        where = stored.mean.device
        params = {name: value for name, value in entry["params"].items() if name not in _DROPPED}
        params["amortized"] = False
        model = extended.model.whole().to(where)
        cells = cells_of(adata, Fit(params, extended.var_names, model, fit.missing), device=where)
        covariance = stored.family
        options = step_options("natural", None, fit.params)
        options = LOCAL_STEPS["natural"].thorough | options | {"n_samples": _DRAWS}
        self.q = better(model, cells, stored, covariance, options)
        found = gaussian_of(self.q)
        totals = GeneTotals(model, DENOISING_DRAWS)
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            totals.add(batch, found[batch.index.cpu()].to(where))
        totals.give_back()
        self.components = components_of(self.q, model.prior)
        mean = torch.as_tensor(self.q["mean"], device=where)
        told = match_covariates(adata, fit.design)
        self.map, basis = new_map(model, mean, told, common_total(cells.size_factor))
        rest = {name: value for name, value in entry.items() if name != SLOT}
        names = np.array(extended.var_names, dtype=object)
        state = model_to_arrays(model)
        latent = in_use(self.q)
        self.entry = sealed(
            {**rest, "params": params, "var_names": names, "state": state, "embed": basis}
            | {"latent": latent}
        )

    def write(self, out: AnnData, key_added: str, split: pd.Series | None) -> None:
        """Into the slots of ``key_added``."""
        keys = Keys.of(key_added)
        keys.clear(out)
        write_posterior(out, key_added, self.q)
        out.uns[keys.uns] = self.entry
        out.obsm[keys.embed] = self.map
        out.obs[keys.obs["scale"]] = posterior_scale(self.q["scale"])
        write_components(out, key_added, self.components)
        if split is not None:
            out.obs[keys.obs["split"]] = split
