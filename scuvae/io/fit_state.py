"""A fit in ``uns``: the model as plain arrays, and back."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._errors import near
from scuvae._keys import DEFAULT, Keys
from scuvae.io.integrity import manifest, state_checks
from scuvae.io.integrity.manifest import Damaged
from scuvae.io.model_arrays import model_from_arrays
from scuvae.model import VAE
from scuvae.model.covariates import Design

logger = logging.getLogger("scuvae")


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
    def design(self) -> Design:
        return self.model.design

    @property
    def batch_key(self) -> str | None:
        return None if self.design.batch is None else self.design.batch.key

    @property
    def batches(self) -> list[str]:
        return self.design.batches

    @property
    def size_factor_key(self) -> str | None:
        key = self.params.get("size_factor_key")
        return None if key is None else str(key)


def read_entry(adata: AnnData, key: str | None, what: str = "adata") -> dict[str, Any]:
    """``adata.uns[key]`` of a fit, checked, or an error that says which call is missing.

    ``what`` is the name of the argument, for messages.
    """
    name = Keys.of(key).uns
    entry = adata.uns.get(name)
    if not _holds_fit(entry):
        fits = [k for k, v in adata.uns.items() if _holds_fit(v)]
        known = f" {near(name, fits)}" if fits else ""
        argument = "" if name == DEFAULT else f", key_added={name!r}"
        raise ValueError(
            f"{what}.uns[{name!r}] holds no fit: run scuvae.tl.fit({what}{argument}) first.{known}"
        )
    return checked(entry, f"{what}.uns[{name!r}]")


def _holds_fit(entry: Any) -> bool:
    if not hasattr(entry, "keys"):
        return False
    return {"params", "history", "state"} <= set(entry.keys()) or "manifest" in entry


def checked(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entry of a fit, once it is known to be what was written: every reader asks here.

    Of fits without a manifest, those of format 1, only shapes and ranges can be checked.

    Parameters
    ----------
    entry
        Of ``uns``, or of a model file.
    where
        The name of what is read, for messages.

    Raises
    ------
    ValueError
        The format is newer, or a likelihood or setting is not known; the version that wrote it is
        named. As ``Damaged``: something is not what was written, or not what a model has.
    """
    rest = {name: value for name, value in entry.items() if name != "manifest"}
    try:
        settings, arrays = manifest.flat(rest)
    except Damaged as error:
        raise Damaged(f"{where}: {error}: read an undamaged copy, or fit again") from None
    params = {
        path.removeprefix("params/"): value
        for path, value in [*settings.items(), *arrays.items()]
        if path.startswith("params/")
    }
    text = entry.get("manifest")
    written = None if text is None else manifest.from_json(str(text), f"{where}['manifest']")
    if written is not None:
        manifest.check_manifest(written, where)
    elif "format" in params:
        raise Damaged(
            f"{where} has lost its manifest, which scuvae {params.get('version')} wrote there: "
            "read an undamaged copy, or fit again"
        )
    else:
        logger.info(
            "%s is of format 1 (scuvae %s), which has no digests: shapes and ranges are checked",
            where,
            params.get("version", "before 0.1"),
        )
    # First what can be named: a fit of another version is not damaged.
    state_checks.check_settings(params, where)
    if written is not None:
        manifest.check(written, settings, arrays, where)
    names = state_checks.checked_names(settings.get("var_names"), where)
    state_checks.check_state(params, arrays, len(names), where)
    return dict(entry)


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a fit with its manifest, for ``uns``."""
    found = {name: copy.copy(value) for name, value in entry.items() if name != "manifest"}
    found["params"] = {**found["params"], "format": manifest.FORMAT}
    return {**found, "manifest": manifest.to_json(manifest.made(*manifest.flat(found)))}


def read_missing(adata: AnnData, key: str | None) -> pd.Index:
    """Names of the genes that the projection under ``key``, if there is one, did without."""
    if not _holds_fit(adata.uns.get(Keys.of(key).uns)):
        return pd.Index([], dtype=object)
    return _missing(read_entry(adata, key))


def _missing(entry: Mapping[str, Any]) -> pd.Index:
    report = entry.get("genes", {})
    return pd.Index([str(name) for name in report.get("missing", ())], dtype=object)


def read_fit(adata: AnnData, key: str | None, what: str = "adata") -> Fit:
    entry = read_entry(adata, key, what)
    params = {name: _plain(value) for name, value in entry["params"].items()}
    var_names = pd.Index([str(name) for name in entry["var_names"]])
    model = model_from_arrays(params, entry["state"], len(var_names))
    return Fit(params, var_names, model, _missing(entry))


def read_extended(adata: AnnData, key: str | None, fit: Fit) -> Fit:
    """A reference's fit; with the levels that it has not seen where ``adata`` holds a projection
    on it that has estimated them."""
    entry = adata.uns.get(Keys.of(key).uns)
    if not _holds_fit(entry):
        return fit
    design = Design.from_params(entry["params"])
    if design == fit.design or not design.extends(fit.design):
        return fit
    own = read_fit(adata, key)
    if not own.var_names.equals(fit.var_names) or not _same_but_for_levels(own.model, fit.model):
        return fit
    return replace(own, missing=fit.missing)


def _same_but_for_levels(model: VAE, other: VAE) -> bool:
    """Whether all parameters of decoder and likelihood that do not depend on levels are equal."""
    for part in ("decoder", "likelihood"):
        own, known = (getattr(one, part).state_dict() for one in (model, other))
        if own.keys() != known.keys():
            return False
        shared = [name for name in own if own[name].shape == known[name].shape]
        if not all(torch.equal(own[name], known[name]) for name in shared):
            return False
    return True


def _plain(value: Any) -> Any:
    """Files hand back numpy scalars and arrays where Python's own went in."""
    if isinstance(value, np.generic):
        return value.item()
    return value
