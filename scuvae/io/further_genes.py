"""Further genes of a fit in ``uns``, and the cells over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn

from scuvae.batches import Cells
from scuvae.io.fit_state import Fit, read_entry
from scuvae.io.genes import match
from scuvae.io.integrity.manifest import Damaged
from scuvae.model.extended_model import ExtendedModel, joined, width_of
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood

SLOT = "further"


@dataclass(frozen=True)
class Extended:
    """A fit with its further genes: ``var_names`` are the fitted and then these."""

    fit: Fit
    var_names: pd.Index
    model: ExtendedModel

    @property
    def n_fitted(self) -> int:
        return len(self.fit.var_names)

    def cells(self, adata: AnnData, fitted: Cells, device: torch.device) -> Cells:
        """The cells over all these genes; what is expected of their total is as over the fitted."""
        # As the fit sees them, but over more genes.
        wide = Fit(self.fit.params, self.var_names, self.model, self.fit.missing)  # type: ignore[arg-type]
        known = self.var_names.difference(self.fit.missing)
        matched = match(adata, wide, device=device, genes=known)
        observed = matched.cells.observed
        cells = Cells(
            matched.cells.source,
            size_factor=fitted.size_factor,
            covariates=fitted.covariates,
            observed=observed,
        )
        cells.size_of_all = fitted.size_of_all
        return cells

    def places(self, adata: AnnData, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        """Columns of ``adata`` with further genes, ascending, and these genes' numbers."""
        position = self.var_names.get_indexer(adata.var_names.astype(str))
        columns = np.flatnonzero(position >= self.n_fitted)
        return columns, position[columns]


def read_further(adata: AnnData, key: str | None, fit: Fit) -> Extended | None:
    """What :func:`scuvae.tl.extend_genes` added to the fit; None for nothing."""
    entry = read_entry(adata, key).get(SLOT)
    return None if entry is None else extended_of(entry, fit)


def extended_of(entry: Mapping[str, Any], fit: Fit) -> Extended:
    """A fit with the further genes that its ``uns`` has."""
    names = pd.Index([str(name) for name in entry["var_names"]])
    where = f"adata.uns[...][{SLOT!r}]"
    width = width_of(fit.model.decoder)
    output: nn.Linear = nn.utils.skip_init(nn.Linear, width, len(names))
    arrays = {name: torch.as_tensor(np.array(a)) for name, a in entry["output"].items()}
    expected = {name: value.shape for name, value in output.state_dict().items()}
    if {name: value.shape for name, value in arrays.items()} != expected:
        raise Damaged(f"{where} is no layer of {len(names)} genes: call scuvae.tl.extend_genes")
    if not names.is_unique or len(names.intersection(fit.var_names)):
        raise Damaged(f"{where} names a gene twice: call scuvae.tl.extend_genes")
    output.load_state_dict(arrays)
    further = likelihood_of(fit, len(names))
    own = dict(further.named_parameters())
    for name, value in entry.get("likelihood", {}).items():
        tensor = torch.as_tensor(np.array(value))
        if name not in own or tensor.shape != own[name].shape:
            raise Damaged(f"{where}['likelihood'][{name!r}] is none: call scuvae.tl.extend_genes")
        setattr(further, name, nn.Parameter(tensor))
    both = likelihood_of(fit, len(fit.var_names) + len(names))
    likelihood = joined(fit.model.likelihood, further, both)
    model = ExtendedModel(fit.model, output, likelihood).eval().requires_grad_(False)
    return Extended(fit, fit.var_names.append(names), model)


def likelihood_of(fit: Fit, n_vars: int) -> Likelihood:
    """One like the fit's, of so many genes."""
    return LIKELIHOODS[fit.model.likelihood.name](n_vars)


def further_entry(
    names: pd.Index, layers: list[nn.Linear], fitted: list[Likelihood]
) -> dict[str, Any]:
    """For ``uns``: what some genes after others were found to have."""

    def all_of(parts: list[torch.Tensor]) -> np.ndarray:
        return torch.cat(parts).detach().cpu().numpy().astype(np.float32)

    own = [dict(likelihood.named_parameters()) for likelihood in fitted]
    return {
        "var_names": np.array(names, dtype=object),
        "output": {
            "weight": all_of([layer.weight for layer in layers]),
            "bias": all_of([layer.bias for layer in layers]),
        },
        "likelihood": {name: all_of([one[name] for one in own]) for name in own[0]},
    }
