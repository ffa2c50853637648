"""What a fit is, in some lines: on what, how, how good, and what can be done with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from pandas.api.types import is_numeric_dtype

from scuvae._keys import DEFAULT, Keys
from scuvae.io.fit_state import read_entry

# Numbers a cell that say how good a fit is, by the verb that writes them.
_MEASURES = {
    "elbo": "ELBO",
    "log_evidence": "importance-weighted bound",
    "amortization_gap": "amortization gap",
}


@dataclass(frozen=True)
class FitSummary:
    """A fit's summary, as :func:`scuvae.get.fit` hands it out; ``print`` shows it.

    Attributes
    ----------
    key
        The fit's name.
    numbers
        All that is shown, as strings, numbers, lists and dicts; what :meth:`to_dict` copies.
    """

    key: str
    numbers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """``numbers`` as a new dict, for JSON and tables."""
        return {"key": self.key, **self.numbers}

    def rows(self) -> list[tuple[str, str]]:
        """Titles and lines."""
        n = self.numbers
        rows = [("on", _on(n)), ("model", _model(n)), ("inference", _inference(n))]
        rows += [("training", _training(n)), ("held out", _held_out(n))]
        if n["measures"]:
            rows.append(("all cells", _measures(n["measures"])))
        rows.append(("written", ", ".join(n["slots"]) or "nothing but the model"))
        return [*rows, *(("next" if i == 0 else "", line) for i, line in enumerate(_next(self)))]

    def __repr__(self) -> str:
        lines = [f"scuvae fit {self.key!r}, made by version {self.numbers['version']}"]
        return "\n".join([*lines, *(f"  {name:<10}  {text}" for name, text in self.rows())])

    def _repr_html_(self) -> str:
        head, *_ = repr(self).splitlines()
        rows = "".join(
            f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
            f'<td style="text-align:left">{_code(text) if code else escape(text)}</td></tr>'
            for name, text, code in (
                (name, text, name in ("next", "", "written")) for name, text in self.rows()
            )
        )
        return f"<table><caption>{escape(head)}</caption>{rows}</table>"


def summary_of(adata: AnnData, key: str | None) -> FitSummary:
    """The summary of one of the fits in ``adata``."""
    keys, entry = Keys.of(key), read_entry(adata, key)
    params, history = _plain(entry["params"]), entry["history"]
    state = entry["state"]
    genes, latent = entry.get("genes"), entry.get("latent", {})
    covariates = ("batch_key", "categorical_covariate_keys", "continuous_covariate_keys")
    data = ("layer", "mask_var", "size_factor_key", *covariates)
    scale = np.asarray(adata.obsm[keys.scale], float) if keys.scale in adata.obsm else None
    numbers = {
        "version": str(params.get("version", "before 0.1")),
        "n_obs": adata.n_obs,
        "n_vars": len(entry["var_names"]),
        "projected": genes is not None,
        "n_missing": 0 if genes is None else len(np.atleast_1d(genes.get("missing", []))),
        "data": {name: params[name] for name in data if params.get(name) is not None},
        "likelihood": str(params["likelihood"]),
        "dispersion": str(params.get("dispersion", "gene")),
        "prior": str(params.get("prior", "standard_normal")),
        "n_latent": int(params["n_latent"]),
        "n_active": int(latent["n_active"]) if "n_active" in latent else None,
        "n_hidden": int(params["n_hidden"]),
        "n_layers": int(params["n_layers"]),
        "inference": _scheme(params.get("amortized", False)),
        "covariance": str(params.get("covariance", "diagonal")),
        "encoder": any(str(name).split(".")[0] == "encoder" for name in state),
        "epochs": len(history),
        "max_epochs": int(params.get("max_epochs", len(history))),
        "early_stopping": bool(params.get("early_stopping", False)),
        **_best(history),
        "training_elbo": _last(history, "elbo"),
        "rng": params.get("rng"),
        "posterior_scale": None if scale is None else float(np.median(scale)),
        "measures": _means(adata, keys),
        "slots": _slots(adata, keys),
        "embedded": keys.embed in adata.obsm,
    }
    return FitSummary(keys.uns, numbers)


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in params.items()}


def _scheme(amortized: Any) -> str:
    return {"False": "unamortized", "True": "amortized"}.get(str(amortized), str(amortized))


def _best(history: pd.DataFrame) -> dict[str, Any]:
    """The best held-out ELBO and its epoch, and whether it still rose at the end."""
    held_out = history.get("validation_elbo", pd.Series(dtype=float)).dropna()
    if held_out.empty:
        return {"held_out_elbo": None, "best_epoch": None}
    return {"held_out_elbo": float(held_out.max()), "best_epoch": int(held_out.idxmax())}


def _last(history: pd.DataFrame, column: str) -> float | None:
    return float(history[column].iloc[-1]) if column in history and len(history) else None


def _means(adata: AnnData, keys: Keys) -> dict[str, float]:
    found = {}
    for name in _MEASURES:
        if keys.obs[name] in adata.obs and is_numeric_dtype(adata.obs[keys.obs[name]]):
            found[name] = float(np.nanmean(adata.obs[keys.obs[name]].to_numpy(float)))
    return found


def _slots(adata: AnnData, keys: Keys) -> list[str]:
    slots = [f'obsm["{name}"]' for name in keys.obsm if name in adata.obsm]
    slots += [f'layers["{name}"]' for name in keys.denoised if name in adata.layers]
    return slots + [f'obs["{name}"]' for name in keys.obs.values() if name in adata.obs]


def _on(n: dict[str, Any]) -> str:
    what = f"{n['n_obs']:,} cells × {n['n_vars']:,} genes"
    if n["n_obs"] == 0:
        what = f"{n['n_vars']:,} genes; no cells are kept with a model"
    if n["n_missing"]:
        what += f", {n['n_missing']:,} of them not observed"
    data = dict(n["data"])
    layer = data.pop("layer", None)
    where = "X" if layer is None else f'layers["{layer}"]'
    told = "".join(f", {name}={_said(value)}" for name, value in data.items())
    return f"{what}, values of {where}{told}"


def _said(value: Any) -> str:
    return repr(value if not isinstance(value, list) else [str(v) for v in value])


def _model(n: dict[str, Any]) -> str:
    used = "" if n["n_active"] is None else f" ({n['n_active']} in use)"
    layers = f"{n['n_layers']} hidden layer{'s' if n['n_layers'] > 1 else ''} of {n['n_hidden']}"
    decoder = layers if n["n_layers"] else "a linear decoder"
    each = "" if n["dispersion"] == "gene" else f" ({n['dispersion']} dispersion)"
    return (
        f"{n['likelihood']} likelihood{each}, {n['prior']} prior, {n['n_latent']} latent dimensions"
        f"{used}, {decoder}"
    )


def _inference(n: dict[str, Any]) -> str:
    what = f"{n['inference']}, {n['covariance']} covariance"
    what += ", with an encoder" if n["encoder"] else ", no encoder"
    if n["posterior_scale"] is not None:
        what += f"; posterior scales {n['posterior_scale']:.2f} (median; 1 is the prior's)"
    return what


def _training(n: dict[str, Any]) -> str:
    elbo = n["training_elbo"]
    end = "" if elbo is None else f", ELBO {elbo:.1f} nats per cell on training cells"
    return f"{n['epochs']} epochs of at most {n['max_epochs']}{end}"


def _held_out(n: dict[str, Any]) -> str:
    if n["held_out_elbo"] is None:
        return "no cells: nothing says how good the fit is on others"
    text = f"ELBO {n['held_out_elbo']:.1f} nats per cell, at its best in epoch {n['best_epoch']}"
    if n["best_epoch"] >= n["max_epochs"] - 1:
        text += "; it still rose at the end: raise max_epochs"
    return text


def _measures(measures: dict[str, float]) -> str:
    said = [f"{_MEASURES[name]} {value:.1f}" for name, value in measures.items()]
    return ", ".join(said) + " nats per cell (means)"


def _next(summary: FitSummary) -> list[str]:
    """Calls that make sense now."""
    n, key = summary.numbers, summary.key
    if n["n_obs"] == 0:
        return ["scuvae.tl.project(new_cells, model)"]
    named = "" if key == DEFAULT else f", key={key!r}"
    calls = []
    if n["embedded"]:
        slot = Keys.of(None if key == DEFAULT else key).embed
        calls.append(f'sc.pp.neighbors(adata, use_rep="{slot}"); sc.tl.umap(adata)')
    if "elbo" not in n["measures"]:
        calls.append(f"scuvae.tl.score(adata{named})")
    if n["encoder"] and "amortization_gap" not in n["measures"] and not n["n_missing"]:
        calls.append(f"scuvae.tl.amortization_gap(adata{named})")
    if not n["projected"]:
        calls.append(f"scuvae.pl.loss(adata{'' if key == DEFAULT else f', keys={key!r}'})")
        calls.append(f"scuvae.tl.predictive_check(adata{named})")
    return calls


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
