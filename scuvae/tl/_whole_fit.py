"""A fit of fitted and further genes alike, made of one that was extended."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.refinement.refine import LOCAL_STEPS, step_options
from scuvae.inference.training.gene_totals import DENOISING_DRAWS, GeneTotals
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import Fit
from scuvae.io.further_genes import SLOT, Extended
from scuvae.io.genes import cells_of
from scuvae.io.slots import gaussian_of
from scuvae.runtime import CHUNK
from scuvae.tl._fit_slots import FitSlots
from scuvae.tl._refine import better

# Settings of an encoder, which the whole fit has not, and of a mask that named the fitted genes.
_DROPPED = ("mask_var", "has_encoder", "encoder_input", "encoder_covariates", "distilled")
_DRAWS = 8


def whole_fit(
    adata: AnnData,
    fit: Fit,
    entry: dict[str, Any],
    extended: Extended,
    stored: Gaussian,
    split: pd.Series | None,
) -> FitSlots:
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
    split
        Which of the cells are held out, where that is known.
    """
    where = stored.mean.device
    params = {name: value for name, value in entry["params"].items() if name not in _DROPPED}
    params["amortized"] = False
    model = extended.model.whole().to(where)
    cells = cells_of(adata, Fit(params, extended.var_names, model, fit.missing), device=where)
    covariance = stored.family
    options = step_options("natural", None, fit.params)
    options = LOCAL_STEPS["natural"].thorough | options | {"n_samples": _DRAWS}
    q = better(model, cells, stored, covariance, options)
    found = gaussian_of(q)
    totals = GeneTotals(model, DENOISING_DRAWS)
    for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
        totals.add(batch, found[batch.index.cpu()].to(where))
    totals.give_back()
    rest = {name: value for name, value in entry.items() if name != SLOT}
    names = np.array(extended.var_names, dtype=object)
    about = {**rest, "params": params, "var_names": names}
    told = match_covariates(adata, fit.design)
    return FitSlots.of(model, q, about, told, cells.size_factor, split)
