"""What several test files share: small data, small fits, and proofs that nothing was touched."""

import hashlib
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse as sp

from scuvae import tl
from scuvae.inference.training.settings import INFERENCE
from scuvae.model.likelihoods import LIKELIHOODS

# The registries: a new entry is tested without an edit here.
LIKELIHOOD_NAMES = list(dict.fromkeys(kind.name for kind in LIKELIHOODS.values()))
SCHEMES = list(INFERENCE)
# Verbs that take a fitted reference beside adata.
WITH_REFERENCE = ("novelty", "project", "transfer_labels")

# Verbs that return a table and leave adata alone, and that are for some fits only.
TABLES, OF_SOME_FITS = ("compare_n_latent", "decode"), ("loadings", "extend_genes")
VERBS = [name for name in tl.__all__ if name not in TABLES + OF_SOME_FITS]

# Verbs that take a column of groups there.
WITH_GROUPS = ("rank_genes",)


def verb_of(name: str) -> Callable[..., Any]:
    """A verb of tl, told the column of groups where it takes one."""
    verb = getattr(tl, name)
    return partial(verb, groupby="cell_type") if name in WITH_GROUPS else verb


N_OBS, N_VARS, N_LATENT = 60, 40, 3
SMALL: dict[str, Any] = {"n_latent": N_LATENT, "n_hidden": 8, "max_epochs": 3, "batch_size": 32}


def unsealed(adata: AnnData, key: str = "scuvae") -> dict[str, Any]:
    """The fit's entry as earlier versions wrote it, without digests; it may be changed by hand."""
    entry = adata.uns[key]
    entry.pop("manifest", None)
    entry["params"].pop("format", None)
    return entry


def small_counts(n_obs: int = N_OBS, n_vars: int = N_VARS, seed: int = 0) -> AnnData:
    """Counts with two strong programmes, two batches, and a mask over the genes."""
    rng = np.random.default_rng(seed)
    z, w = rng.normal(size=(n_obs, 2)), rng.normal(size=(2, n_vars))
    x = rng.poisson(3 * np.exp(np.clip(z @ w, -3, 3))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["b0", "b1"], n_obs), categories=["b1", "b0"]),
            "expected": x.sum(1) + 1,
            "cell_type": pd.Categorical(np.where(z[:, 0] > 0, "up", "down")),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame(
        {"highly_variable": np.arange(n_vars) % 3 != 0}, index=[f"gene{i}" for i in range(n_vars)]
    )
    return AnnData(x, obs=obs, var=var)


def small_data(likelihood: str, **shape: int) -> AnnData:
    """Values that the likelihood can have."""
    adata = small_counts(**shape)
    support = LIKELIHOODS[likelihood].support
    if support == "real":
        adata.X = np.log1p(adata.X) - 1
    elif support == "binary":
        adata.X = (adata.X > 2).astype(np.float32)
    return adata


def small_fit(adata: AnnData, **options: Any) -> AnnData:
    """``adata`` itself, fitted in a few epochs."""
    tl.fit(adata, **{**SMALL, **options})
    return adata


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def fingerprint(value: Any) -> Any:
    """A nested picture of all that ``value`` holds, to the byte; equal pictures, equal values."""
    if isinstance(value, AnnData):
        slots = ("obs", "var", "uns", "obsm", "varm", "layers", "obsp", "varp")
        picture = {slot: fingerprint(getattr(value, slot)) for slot in slots}
        raw = None if value.raw is None else fingerprint(value.raw.X)
        flags = (value.is_view, value.isbacked, value.shape)
        return {**picture, "X": fingerprint(value.X), "raw": raw, "flags": flags}
    if isinstance(value, pd.DataFrame):
        columns = [fingerprint(value.iloc[:, i]) for i in range(value.shape[1])]
        return {"index": fingerprint(value.index), "columns": columns, "order": list(value)}
    if isinstance(value, pd.Series | pd.Index):
        # Pickles differ for equal strings that are one object here and two there.
        items = [fingerprint(item) for item in value.tolist()]
        levels = value.cat.categories if hasattr(value, "cat") else []
        return str(value.dtype), value.name, items, list(levels)
    if sp.issparse(value):
        value = value if value.format in ("csr", "csc") else value.tocsr()
        arrays = [fingerprint(a) for a in (value.data, value.indices, value.indptr)]
        return type(value).__name__, value.shape, arrays
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return "object", value.shape, [fingerprint(item) for item in value.ravel()]
        mask = fingerprint(value.mask) if isinstance(value, np.ma.MaskedArray) else None
        data = np.ascontiguousarray(np.asarray(value)).tobytes()
        layout = (value.strides, value.flags.writeable)
        return type(value).__name__, str(value.dtype), value.shape, layout, digest(data), mask
    if isinstance(value, Mapping):
        return {name: fingerprint(value[name]) for name in value}
    if value is None or isinstance(value, str | int | float | bool | np.generic):
        return type(value).__name__, repr(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # on disk
        return fingerprint(value.to_memory() if hasattr(value, "to_memory") else value[()])
    return type(value).__name__, id(value)


def random_states() -> tuple[str, str, str]:
    """The global random states of torch, numpy and the standard library."""
    return (
        digest(torch.get_rng_state().numpy().tobytes()),
        digest(pickle.dumps(np.random.get_state())),  # noqa: NPY002
        digest(pickle.dumps(random.getstate())),
    )


@contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """The body leaves every value, and the global random states, as they were to the byte."""
    before, states = [fingerprint(value) for value in values], random_states()
    yield
    assert [fingerprint(value) for value in values] == before
    assert random_states() == states


def posterior_of(adata: AnnData, key: str = "X_scuvae") -> dict[str, np.ndarray]:
    """The obsm slots of a fit."""
    names = (key, f"{key}_scale", f"{key}_covariance")
    return {name: np.asarray(adata.obsm[name]) for name in names if name in adata.obsm}


def assert_same_posterior(a: AnnData, b: AnnData, *, atol: float = 0.0) -> None:
    first, second = posterior_of(a), posterior_of(b)
    assert list(first) == list(second)
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=0, atol=atol, err_msg=name)


def assert_alike(found: Any, expected: Any, *, atol: float, where: str = "") -> None:
    """Nested results that are equal, but for roundings of their numbers."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            if name == "manifest":  # digests of numbers that are equal but for roundings
                continue
            assert_alike(found[name], value, atol=atol, where=f"{where}[{name!r}]")
    elif isinstance(expected, pd.DataFrame):
        assert fingerprint(found.index) == fingerprint(expected.index), where
        assert_alike(*(dict(frame.items()) for frame in (found, expected)), atol=atol, where=where)
    elif getattr(getattr(expected, "dtype", None), "kind", "") == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol, err_msg=where)
    else:
        assert fingerprint(found) == fingerprint(expected), where
