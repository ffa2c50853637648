"""Files whose matrices stay on disk: opened, and written anew with what a call has added."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse as sp

from scuvae._keys import Keys

# Bytes from which on matrices stay on disk by default.
LARGE = 2**30


def bytes_of(path: Path) -> int:
    """Those of a file, or of all in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def is_large(path: Path) -> bool:
    return bytes_of(path) >= LARGE


# What is not a matrix of cells and genes, and fits memory.
_SLOTS = ("uns", "obsm", "varm", "obsp", "varp")


def open_backed(path: Path, *, slots: bool = False) -> AnnData:
    """An AnnData whose matrices, X and layers, are those of an .h5ad file or a .zarr store.

    Of the rest it has ``obs`` and ``var``, and with ``slots`` all. Other than anndata's backed mode
    it leaves layers on disk too, and opens .zarr. The file stays open for as long as its matrices
    are in use.
    """
    file = _opened(path, "r")
    layers = file.get("layers", {})
    rest = {name: read_elem(file[name]) for name in _SLOTS if slots and name in file}
    return AnnData(
        **rest,
        X=_matrix(file["X"]) if "X" in file else None,
        obs=read_elem(file["obs"]),
        var=read_elem(file["var"]),
        layers={name: _matrix(layers[name]) for name in layers},
    )


def write_backed(adata: AnnData, source: Path, target: Path, key: str | None) -> None:
    """A copy of ``source`` with all that ``adata``, opened from there, has got since.

    ``key`` names a fit, of which nothing that the file has outlives the new one.
    """
    with _copied(source, target) as file:
        keys = Keys.of(key)
        for group, slots in (
            ("obsm", keys.obsm),
            ("uns", (keys.uns, keys.calibration, keys.predictive_check)),
            ("layers", keys.denoised),
        ):
            for slot in slots:
                if group in file and slot in file[group]:
                    del file[group][slot]
        write_elem(file, "obs", adata.obs)
        for group, values in (("obsm", adata.obsm), ("uns", adata.uns)):
            if group not in file:
                write_elem(file, group, {})
            for name, value in values.items():
                write_elem(file[group], name, value)


def add_backed(adata: AnnData, source: Path, target: Path) -> None:
    """A copy of ``source`` with what a verb made of ``adata``, opened from there with its slots.

    X and the layers that are on disk are as they were; layers in memory are new.
    """
    with _copied(source, target) as file:
        for name in ("obs", *_SLOTS):
            if name in file:
                del file[name]
            write_elem(file, name, adata.obs if name == "obs" else dict(getattr(adata, name)))
        new = {
            name: layer
            for name, layer in adata.layers.items()
            if isinstance(layer, np.ndarray) or sp.issparse(layer)
        }
        if new and "layers" not in file:
            write_elem(file, "layers", {})
        for name, layer in new.items():
            write_elem(file["layers"], name, layer)


@contextmanager
def _copied(source: Path, target: Path) -> Iterator[Any]:
    """A copy, open to be changed."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    file = _opened(target, "r+")
    try:
        yield file
    finally:
        if hasattr(file, "close"):
            file.close()
    if target.is_dir():
        import zarr

        # A store may say in one place what it holds: in the copy that says what it held.
        if getattr(zarr.open_group(str(source), mode="r").metadata, "consolidated_metadata", None):
            zarr.consolidate_metadata(str(target))


def _opened(path: Path, mode: Literal["r", "r+"]) -> Any:
    if path.is_dir():
        import zarr

        return zarr.open_group(str(path), mode=mode, use_consolidated=False)
    import h5py

    return h5py.File(path, mode)


def _matrix(node: Any) -> Any:
    """What stands for a matrix on disk."""
    return sparse_dataset(node) if hasattr(node, "keys") else node
