"""What ``--json`` writes."""

import argparse
import json
import math
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae import __version__
from scuvae._keys import Keys
from scuvae.io.fit_state import read_entry
from scuvae.io.fit_summary import summary_of


def report(
    args: argparse.Namespace, adata: AnnData, arguments: dict[str, Any], seconds: float
) -> str:
    """The call, a summary of the fit that it made or used, and that fit's history."""
    # Of a fit, --key is about its reference.
    key = arguments.get("key_added") or (args.command != "fit" and arguments.get("key")) or None
    said: dict[str, Any] = {
        "command": args.command,
        "version": __version__,
        "input": [*map(str, args.input)] if isinstance(args.input, list) else str(args.input),
        "reference": _path(getattr(args, "reference", None)),
        "output": _path(getattr(args, "output", None)),
        "table": _path(getattr(args, "table", None)),
        "arguments": arguments,
        "seconds": round(seconds, 3),
        "n_obs": adata.n_obs,
        "n_vars": adata.n_vars,
    }
    said = {name: value for name, value in said.items() if value is not None}
    try:
        history = read_entry(adata, key)["history"]
        said["fit"] = summary_of(adata, key).to_dict()
        said["history"] = {"epoch": list(history.index), **history.to_dict("list")}
    except ValueError:  # labels and novelty are of a reference, not of a fit in the output
        pass
    said |= _results(adata, args.command, key)
    return json.dumps(_plain(said), indent=2, allow_nan=False) + "\n"


def _results(adata: AnnData, command: str, key: str | None) -> dict[str, Any]:
    """What there is of cells, and the tables of the verb that was called."""
    keys = Keys.of(None if command in ("rank-genes", "neighbors") else key)
    found: dict[str, Any] = {"cells": {}}
    for name in keys.obs.values():
        if name in adata.obs:
            found["cells"][name] = _described(adata.obs[name])
    check = adata.uns.get(keys.predictive_check)
    if command == "check predictive" and isinstance(check, pd.DataFrame):
        ratio = check["total_ratio"] if "total_ratio" in check else check["mean"]
        found["farthest_genes"] = ratio.reindex(_farthest(check)).to_dict()
    if command == "check calibration":
        table = adata.uns[keys.calibration]["coverage"]
        found["coverage"] = {"level": list(table.index), **table.to_dict("list")}
    if command == "rank-genes":
        table = adata.uns["rank_genes_groups" if key is None else key]
        false = table["expected_fdr"]
        found["genes_at_fdr_05"] = {g: int((false[g] < 0.05).sum()) for g in false.dtype.names}
    return found


def _described(values: pd.Series) -> dict[str, Any]:
    if not pd.api.types.is_numeric_dtype(values):
        return {str(name): int(n) for name, n in values.value_counts(dropna=False).items()}
    numbers = values.to_numpy(float)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return {"mean": None}
    low, median, high = np.percentile(numbers, (5, 50, 95))
    return {"mean": numbers.mean(), "percentile_5": low, "median": median, "percentile_95": high}


def _farthest(check: pd.DataFrame) -> list[str]:
    """The twenty genes whose totals, or means, are farthest from what is expected."""
    if "total_ratio" in check:
        off = np.abs(np.log(check["total_ratio"].to_numpy(float)))
    else:
        off = np.abs(check["mean"] - check["mean_predicted"]).to_numpy(float)
    return list(check.index[np.argsort(-off, kind="stable")[:20]])


def _path(value: Any) -> str | None:
    return None if value is None else str(value)


def _plain(value: Any) -> Any:
    """Numbers and containers that JSON has; what is not finite is null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
