"""Model files: a fit without its cells, in one file that holds arrays and text alone."""

from os import PathLike
from pathlib import Path

import pandas as pd
from anndata import AnnData

from scuvae._adata import check_type
from scuvae._checks import path as checked_path
from scuvae._keys import DEFAULT
from scuvae._replacing import checked_target, free_bytes, replacing
from scuvae.io.fit_state import checked, read_entry, sealed
from scuvae.io.integrity import manifest, safetensors
from scuvae.io.integrity.manifest import Damaged
from scuvae.runtime import isolated

_PARTS = {"manifest", "settings"}


@isolated
def write_model(path: str | PathLike[str], adata: AnnData, *, key: str | None = None) -> None:
    """Write a fit's model to a file: what :func:`scuvae.tl.project` needs, and no cells.

    The file is in safetensors' format: arrays of numbers, and a manifest in JSON with the format's
    number, the versions that wrote it, arguments, gene names, and a SHA-256 of each array and
    setting. Nothing in it is code. The same fit gives the same bytes. An earlier file of that name
    is replaced once the new one is complete.

    Parameters
    ----------
    path
        Where to; by custom ``model.scuvae``.
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected onto a fit.
    key
        The fit's ``key_added``; None for the default.

    Returns
    -------
    None.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or a damaged one; ``path`` is a folder or device, or
        lies in a folder that is not there or cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:].copy()
    >>> scuvae.tl.fit(old, max_epochs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scuvae.io.write_model(f"{folder}/model.scuvae", old)
    ...     scuvae.tl.project(new, f"{folder}/model.scuvae")
    >>> new.obsm["X_scuvae"].shape
    (100, 10)
    """
    entry = read_entry(check_type(adata), key)
    # What a projection did without is its cells' affair, not the model's.
    entry = sealed({name: part for name, part in entry.items() if name != "genes"})
    written = manifest.from_json(entry.pop("manifest"), "the manifest")
    settings, arrays = manifest.flat(entry)
    text = manifest.to_json({"manifest": written, "settings": settings})
    target = checked_target(checked_path("path", path, "a file"))
    needed = len(text) + sum(array.nbytes for array in arrays.values())
    try:
        with replacing(target) as new, open(new, "wb") as file:
            safetensors.write(file, text, arrays)
    except OSError as error:
        raise OSError(
            f"cannot write {target}: {error.strerror}. It needs about {needed:,} bytes, and "
            f"{free_bytes(target.parent):,} are free on {target.parent}"
        ) from error


@isolated
def read_model(path: str | PathLike[str]) -> AnnData:
    """Read a model file, as a reference for whatever takes one.

    Sizes are checked before anything is allocated, digests before anything is believed. Nothing
    is imported, unpickled or run: a likelihood is one that is registered here, by its name.

    Parameters
    ----------
    path
        A file of :func:`write_model`.

    Returns
    -------
    An AnnData without cells: the fit's genes are its ``var_names``, ``uns["scuvae"]`` holds the
    fit. :func:`scuvae.tl.project` takes it as ``reference``, :func:`scuvae.get.model` and
    :func:`scuvae.get.history` read it.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no model file, a damaged one, or of a newer format; its likelihood is not registered,
        or a setting not known. What and the version that wrote it are named.

    Examples
    --------
    >>> import tempfile
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scuvae.io.write_model(f"{folder}/model.scuvae", adata)
    ...     reference = scuvae.io.read_model(f"{folder}/model.scuvae")
    >>> reference.shape
    (0, 765)
    """
    return read_as(Path(checked_path("path", path, "a file of io.write_model")), DEFAULT)


def is_hdf5(path: Path) -> bool:
    """Whether a file is one that ``anndata.read_h5ad`` is to be asked about."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def read_as(path: Path, name: str) -> AnnData:
    """As :func:`read_model`, the fit in ``uns[name]``."""
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: name a file of io.write_model")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: name a file of io.write_model")
    text, arrays = safetensors.read(path)
    parts = manifest.from_json(text, f"{path}: its manifest")
    if not isinstance(parts, dict) or set(parts) != _PARTS:
        raise Damaged(f"{path} is no model of scuvae: its manifest has other parts")
    written, settings = parts["manifest"], parts["settings"]
    manifest.check_manifest(written, str(path))
    if not isinstance(settings, dict) or not all(map(_is_setting, settings.values())):
        raise Damaged(f"{path} is damaged: its settings are no settings")
    try:
        entry = manifest.nested(settings, arrays)
    except Damaged as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    entry = checked({**entry, "manifest": manifest.to_json(written)}, str(path))
    names = pd.Index([str(name) for name in entry["var_names"]])
    obs, var = pd.DataFrame(index=pd.Index([], dtype=object)), pd.DataFrame(index=names)
    return AnnData(obs=obs, var=var, uns={name: entry})


def _is_setting(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str | bool | int | float)
