"""Where results go, and the posteriors in them."""

import copy as copying
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._keys import DEFAULT, Keys
from scuvae.batches.spill import release
from scuvae.distributions.gaussian import Gaussian, unpack
from scuvae.io.fit_state import read_entry
from scuvae.model.priors import Prior


def target(adata: AnnData, copy: bool) -> AnnData:
    """What to write to, once the results are there: a copy of a backed AnnData is in memory."""
    if not copy:
        return adata
    return adata.to_memory(copy=True) if adata.isbacked else adata.copy()


def read_posterior(adata: AnnData, key: str | None) -> Gaussian:
    """q of every cell from ``obsm``, on the CPU."""
    return gaussian_of(read_moments(adata, key))


def read_moments(adata: AnnData, key: str | None) -> dict[str, np.ndarray]:
    """The :func:`moments` of every cell's q as ``obsm`` has them, checked."""
    n_latent = int(read_entry(adata, key)["params"]["n_latent"])
    keys = Keys.of(key)
    widths = {keys.mean: n_latent, keys.scale: n_latent}
    for slot in widths:
        if slot not in adata.obsm:
            raise ValueError(
                f"adata.obsm[{slot!r}] is gone: fit again, or refit its cells with tl.project"
            )
    if keys.covariance in adata.obsm:
        widths[keys.covariance] = n_latent * (n_latent + 1) // 2
    for slot, width in widths.items():
        _check_moments(adata, slot, width, positive=slot == keys.scale)
    slots = {"mean": keys.mean, "scale": keys.scale, "covariance": keys.covariance}
    return {name: np.asarray(adata.obsm[s]) for name, s in slots.items() if s in adata.obsm}


def gaussian_of(values: dict[str, np.ndarray]) -> Gaussian:
    """q of cells' :func:`moments`, on the CPU."""
    mean = torch.as_tensor(np.array(values["mean"], np.float32))
    if "covariance" not in values:
        return Gaussian(mean, torch.as_tensor(np.array(values["scale"], np.float32)))
    packed = torch.as_tensor(np.array(values["covariance"], np.float64))
    lower = unpack(packed, mean.shape[1])
    covariance = lower + lower.tril(-1).mT
    tril, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        # float32 has rounded a very long, thin covariance past positive definiteness.
        longest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
        jitter = 1e-6 * longest * torch.eye(mean.shape[1], dtype=torch.float64)
        bad = (failed > 0)[:, None, None]
        tril, failed = torch.linalg.cholesky_ex(torch.where(bad, covariance + jitter, covariance))
        if failed.any():
            raise ValueError(
                f"the covariances of {int((failed > 0).sum())} cells' posteriors in adata.obsm are "
                "no covariances, not positive definite: refit these cells with tl.project"
            )
    return Gaussian(mean, tril.float())


# Cells whose factors are made at once: all together they would outweigh their table.
_CHUNK = 4096


def parts_of(values: dict[str, np.ndarray]) -> Iterator[Gaussian]:
    """:func:`gaussian_of` some cells after others, in order."""
    for first in range(0, len(values["mean"]), _CHUNK):
        yield gaussian_of({name: a[first : first + _CHUNK] for name, a in values.items()})
        release()


def components_of(values: dict[str, np.ndarray], prior: Prior) -> np.ndarray | None:
    """The chances that each cell is of each of the prior's components, where it has any."""
    prior = copying.deepcopy(prior).cpu()
    parts = []
    for q in parts_of(values):
        found = prior.responsibilities(q)
        if found is None:
            return None
        parts.append(found)
    return torch.cat(parts).numpy()


def write_components(adata: AnnData, key: str | None, share: np.ndarray | None) -> None:
    """The :func:`components_of` cells, and the likeliest, but those that no cell is of."""
    if share is None:
        return
    keys = Keys.of(key)
    there = np.flatnonzero(share.any(0))
    adata.obsm[keys.components] = np.ascontiguousarray(share[:, there], np.float32)
    likeliest = share[:, there].argmax(1)
    adata.obs[keys.obs["component"]] = pd.Categorical.from_codes(likeliest, there.astype(str))


def _check_moments(adata: AnnData, slot: str, width: int, *, positive: bool) -> None:
    """Raise unless a slot is what a posterior's moments can be."""
    held, remedy = adata.obsm[slot], "refit its cells with tl.project"
    if np.ma.is_masked(held):
        raise ValueError(f"adata.obsm[{slot!r}] is a masked array with masked values: {remedy}")
    values = np.asarray(held)
    if values.shape != (adata.n_obs, width) or values.dtype.kind not in "fiu":
        raise ValueError(
            f"adata.obsm[{slot!r}] is {values.dtype} of shape {values.shape}, but the fit's has "
            f"shape {(adata.n_obs, width)}: {remedy}"
        )
    bad = ~np.isfinite(values) | ((values <= 0) if positive else False)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        kind = "finite and positive" if positive else "finite"
        raise ValueError(
            f"adata.obsm[{slot!r}] is {values[row, column]:g} at cell {adata.obs_names[row]!r}, "
            f"not {kind}: {remedy}"
        )


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
