"""tl.fit(reference=): cells added to a finished fit."""

import copy as copying
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae import __version__
from scuvae._checks import flag
from scuvae._keys import Keys
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.mapping.covariate_columns import with_design
from scuvae.inference.refinement.refine import step_options
from scuvae.inference.training.distributed import ALONE
from scuvae.inference.training.held_out import hold_out
from scuvae.inference.training.loop import train
from scuvae.io import inputs
from scuvae.io.fit_state import read_entry, read_fit, sealed
from scuvae.io.genes import match, warn_of_empty
from scuvae.io.model_arrays import model_from_arrays
from scuvae.io.slots import components_of, gaussian_of, read_moments
from scuvae.runtime import logger, memory_of, random_state, resolve_device
from scuvae.tl._checkpoint import kept_in
from scuvae.tl._embed import placed
from scuvae.tl._fit_slots import FitSlots, in_use, split_of
from scuvae.tl._grown_settings import OF_TRAINING, check_agreement, fine_tuned_params, settings_for
from scuvae.tl._known_cells import check_genes, check_same_cells, note_of, rows_in
from scuvae.tl._project import read_reference
from scuvae.tl._projection import polished, project_cells, projected
from scuvae.tl._trained import begun, ended

# Cells whose stored q are read at once.
_AT_ONCE = 8192


def check_call(reference: object, fine_tune: bool, key: str | None, n_processes: int) -> None:
    """Raise for what only a call with a reference can mean, and for what none can."""
    flag("fine_tune", fine_tune)
    if reference is None and (fine_tune or key is not None):
        what = "fine_tune=True" if fine_tune else f"key={key!r}"
        remedy = "" if fine_tune else ", or key_added= to name the fit that is made"
        raise ValueError(f"{what} is about the reference's fit: pass reference=" + remedy)
    if reference is not None and n_processes > 1:
        raise ValueError(
            f"reference= is for one process, and there are {n_processes}: start it without "
            "torchrun, or find posteriors of parts of the new cells with tl.project"
        )


class Growth:
    """A reference and the cells that are to be in the fit, matched by name.

    Parameters
    ----------
    adata
        Cells of the reference, new ones, or both.
    reference, key, layer, device, fine_tune
        As :func:`scuvae.tl.fit` takes them.
    given
        Arguments of that function that are not at their defaults.
    """

    def __init__(
        self,
        adata: AnnData,
        reference: AnnData | str | PathLike[str],
        key: str | None,
        layer: str | None,
        device: str,
        given: Mapping[str, Any],
        *,
        fine_tune: bool = False,
    ) -> None:
        self.adata, self.key, self.given, self.fine_tune = adata, key, given, fine_tune
        self.source = read_reference(reference, key)
        self.fit = read_fit(self.source, key)
        self.entry = copying.deepcopy(read_entry(self.source, key))
        check_agreement(self.fit, given)
        inputs.check_unique_genes(adata)
        check_genes(adata, self.fit)
        # Numbers of the cells' rows in the reference, -1 for new ones.
        self.old = rows_in(adata, self.source, key, self.fit)
        self.known, self.new = np.flatnonzero(self.old >= 0), np.flatnonzero(self.old < 0)
        if not len(self.new) and not fine_tune:
            raise ValueError(
                f"all {adata.n_obs} cells of adata are in the reference: there is none to add. "
                "fine_tune=True trains the fit on with them"
            )
        if "check_values" in given:
            self.fit.params["check_values"] = given["check_values"]
        self.where = resolve_device(device)
        extend = bool(self.fit.design.categorical)
        self.matched = match(adata, self.fit, layer, self.where, extend=extend)
        check_same_cells(adata, self.source, self.fit, self.matched, self.old)
        self.moments = read_moments(self.source, key) if len(self.known) else {}
        self.covariance = str(self.fit.params["covariance"])
        self.options = step_options(str(self.fit.params["local_step"]), None, self.fit.params)
        if layer is not None:
            self.entry["params"]["layer"] = layer

    def slots(self, **training: Any) -> FitSlots:
        """What the fit of all cells leaves; ``training`` is of :meth:`fine_tuned`."""
        if self.fine_tune:
            return self.fine_tuned(**training)
        unused = [name for name in OF_TRAINING if name in self.given]
        unused += ["checkpoint"] * (training["checkpoint"] is not None)
        if unused:
            logger.warning(
                "nothing is trained with fine_tune=False: %s= has no part in it", "=, ".join(unused)
            )
        return self.frozen()

    # --- the decoder frozen -----------------------------------------------------------------------

    def frozen(self) -> FitSlots:
        """Known cells' posteriors as they are, and those of new ones as ``tl.project`` has them."""
        cells, entry, new = self.matched.cells, self.entry, self.new
        if self.moments:
            self.covariance = "full" if "covariance" in self.moments else "diagonal"
        entry.pop("genes", None)
        found = project_cells(
            self.adata,
            self.fit,
            entry,
            self.matched,
            self.covariance,
            rows=torch.as_tensor(new, device=self.where),
            polish=polished(self.fit),
            **self.options,
        )
        warn_of_empty(self.fit, cells, "they say nothing about z", stacklevel=7)
        q = {}
        for name, values in found.q.items():
            q[name] = cells.room(values.shape[1])
            q[name][new] = values
            if self.moments:
                q[name][self.known] = self.moments[name][self.old[self.known]]
        coordinates = None
        if found.coordinates is not None:
            coordinates = np.empty((self.adata.n_obs, found.coordinates.shape[1]), np.float32)
            coordinates[new] = found.coordinates
            coordinates[self.known] = self._places(found.model, q["mean"])
        components = components_of(q, found.model.prior)
        entry |= {"latent": in_use(q), "reference": note_of(self.entry, self.old, fine_tune=False)}
        split = split_of(self._split() == "validation", added=self._undecided())
        return FitSlots(q, sealed(entry), coordinates, components, split)

    def _places(self, model: Any, mean: np.ndarray) -> np.ndarray:
        """Known cells' places in the map."""
        slot = Keys.of(self.key).embed
        if slot in self.source.obsm:
            return np.asarray(self.source.obsm[slot])[self.old[self.known]]
        covariates = self.matched.covariates
        if covariates is not None:
            covariates = covariates.part(torch.as_tensor(self.known, device=self.where))
        z = torch.as_tensor(mean[self.known], device=self.where)
        return placed(model, z, self.entry["embed"], covariates)

    # --- the decoder trained on -------------------------------------------------------------------

    def fine_tuned(
        self,
        *,
        early_stopping: bool,
        checkpoint: str | PathLike[str] | None,
        checkpoint_every: float,
        rng: int | np.random.Generator | None,
        progress: bool | None,
    ) -> FitSlots:
        """Everything trained further, from the reference's decoder and the posteriors at hand."""
        cells, fit = self.matched.cells, self.fit
        settings = settings_for(fit, self.adata.n_obs, self.given)
        settings.check_memory(self.adata.n_obs, len(fit.var_names), memory_of(self.where))
        held_out = self._held_out(settings.validation_fraction)
        params = fine_tuned_params(self.entry["params"], settings)
        n_vars = len(fit.var_names)
        fit = replace(fit, model=model_from_arrays(params, self.entry["state"], n_vars))
        params |= {
            "early_stopping": early_stopping,
            "device": self.where.type,
            "version": __version__,
            "torch_version": version("torch").split("+")[0],
            "anndata_version": version("anndata"),
        }
        if isinstance(rng, int | np.integer):
            params["rng"] = int(rng)
        note = note_of(self.entry, self.old, fine_tune=True)
        with random_state(rng, self.where) as generator:
            # What new levels add is learnt with the rest, from the mean of the known.
            told = self.matched.covariates
            model = fit.model if told is None else with_design(fit.model, told.design)
            model = model.to(self.where)
            params |= model.design.to_params()
            keeper = None
            if checkpoint is not None:
                columns = self.adata.var_names.astype(str).get_indexer(fit.var_names)
                about = params | {"reference": note["digest"]}
                of = (self.adata, columns, about, cells, told, ALONE)
                keeper = kept_in(checkpoint, checkpoint_every, *of)

            def begin(training: torch.Tensor) -> Iterator[tuple[torch.Tensor, Gaussian]]:
                return self._begin(model, training)

            with begun(
                *(model, cells, held_out, settings),
                early_stopping=early_stopping,
                seed=int(generator.integers(2**63)),
                keeper=keeper,
                progress=progress,
                begin=begin,
            ) as start:
                history = train(**start.arguments)
            epochs, q = ended(start, history)
        about = {
            "params": params,
            "history": epochs,
            "var_names": np.array(fit.var_names, object),
            "reference": note,
        }
        return FitSlots.of(model, q, about, told, cells.size_factor, split_of(held_out))

    def _begin(self, model: Any, training: torch.Tensor) -> Iterator[tuple[torch.Tensor, Gaussian]]:
        """Stored q of known cells, then the best under the reference's decoder of new ones."""
        known = torch.as_tensor(self.old[training.cpu().numpy()] >= 0, device=self.where)
        for index in training[known].split(_AT_ONCE) if known.any() else ():
            rows = self.old[index.cpu().numpy()]
            stored = gaussian_of({name: values[rows] for name, values in self.moments.items()})
            yield index, stored.as_family(self.covariance).to(self.where)
        if known.all():
            return
        cells, rest = self.matched.cells, training[~known]
        for batch, q in projected(model, cells, self.covariance, rows=rest, **self.options):
            yield batch.index, q

    # --- who is held out --------------------------------------------------------------------------

    def _split(self) -> np.ndarray:
        """What the reference says of each cell; "" of new ones."""
        names = np.full(self.adata.n_obs, "", object)
        slot = Keys.of(self.key).obs["split"]
        if slot in self.source.obs:
            theirs = inputs.obs_column(self.source, slot).astype(str).to_numpy()
            names[self.known] = theirs[self.old[self.known]]
        return names

    def _undecided(self) -> np.ndarray:
        """Cells that the decoder has neither been trained on nor judged by."""
        return ~np.isin(self._split(), ["train", "validation"])

    def _held_out(self, fraction: float) -> np.ndarray:
        """Those that were, and so many of the others."""
        if not fraction:
            return np.zeros(self.adata.n_obs, bool)
        held_out = self._split() == "validation"
        others = np.flatnonzero(self._undecided())
        held_out[others] = hold_out(len(others), fraction)
        return held_out
