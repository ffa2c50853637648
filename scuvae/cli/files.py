"""The files that commands read and write. Nothing heavy is imported before they are known."""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from scuvae._replacing import (
    checked_target,
    free_bytes,
    replacing,
    temporary,
    unreachable,
)
from scuvae.cli.messages import one_line
from scuvae.cli.paths import SUFFIXES

if TYPE_CHECKING:
    from anndata import AnnData


def checked_output(output: Path, *inputs: Path) -> Path:
    """The file that ``output`` names, links followed, or an error before any work."""
    for path in inputs:
        checked_input(path)
    if why := unreachable(output):
        raise ValueError(f"{output}: {why}: name another file")
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        # A .zarr store is a folder: writing into it, or replacing one that holds the input, counts.
        within = target.is_relative_to(source) or source.is_relative_to(target)
        if within or (target.exists() and target.samefile(source)):
            raise ValueError(f"{output} would overwrite {path}, which is read: name another output")
    zarr = target.suffix == ".zarr"
    store = any((target / name).is_file() for name in (".zgroup", "zarr.json"))
    if zarr and target.exists() and not store:
        raise ValueError(f"{output} exists and is no zarr store: name another output")
    return checked_target(output, folder=zarr)


def checked_input(path: Path) -> None:
    """Raise unless a file or folder is there; to open a FIFO would wait for somebody to write."""
    if why := unreachable(path):
        raise ValueError(f"{path}: {why}")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a FIFO or device: name a file")


def unclobbered(args: argparse.Namespace, targets: dict[str, Path]) -> None:
    """With --no-clobber, raise if one of the outputs is there."""
    for name, target in targets.items():
        if args.no_clobber and os.path.lexists(target):
            raise ValueError(f"{getattr(args, name)} exists, and stays as it is (--no-clobber)")


def files_of(sources: Sequence[Path]) -> list[Path]:
    """Files as they are; of a folder, and of a collection of annbatch's, what lies in it."""
    found: list[Path] = []
    for path in sources:
        checked_input(path)
        parts = [path]
        if path.is_dir() and path.suffix != ".zarr":
            parts = [part for part in path.iterdir() if part.suffix in SUFFIXES]
            if not parts:
                raise ValueError(f"{path}: a folder without {' and '.join(SUFFIXES)} files")
        elif path.is_dir() and not _is_anndata(path):
            parts = [part for part in path.iterdir() if _is_anndata(part)] or parts
        found += sorted(parts, key=lambda part: [_number(piece) for piece in _pieces(part.name)])
    for number, path in enumerate(found):
        if any(path.samefile(other) for other in found[:number]):
            raise ValueError(f"{path} is named twice: its cells would count twice")
    return found


def _pieces(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _number(piece: str) -> tuple[int, str]:
    return (int(piece), "") if piece.isdecimal() else (0, piece)  # part_2 before part_10


def _is_anndata(store: Path) -> bool:
    """Whether a folder is a zarr store of one AnnData."""
    for name in ("zarr.json", ".zattrs"):
        try:
            said = json.loads((store / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return bool(said.get("attributes", said).get("encoding-type") == "anndata")
    return False


def joined(paths: Sequence[Path], *, backed: bool) -> "AnnData":
    """The cells of several files over the genes that all have; ``obs["file"]`` says whose."""
    import anndata

    if backed:
        for name in ("dask", "xarray"):
            if find_spec(name) is None:
                raise ValueError(
                    f"several files whose matrices stay on disk need {name}: "
                    "pip install 'scuvae[disk]'"
                )
        parts = [_reading(anndata.experimental.read_lazy, path) for path in paths]
    else:
        parts = [read(path) for path in paths]
    names = [path.stem for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    taken = [set(part.obs_names) for part in parts]
    unique = len(set.union(*taken)) == sum(part.n_obs for part in parts)
    adata = anndata.concat(
        dict(zip(names, parts, strict=True)),
        merge="same",
        label=None if any("file" in part.obs for part in parts) else "file",
        index_unique=None if unique else "-",
    )
    if not adata.n_vars:
        raise ValueError(
            f"{paths[0]} and the others have no gene in common: are names of one kind?"
        )
    return adata


def _without_matrices(adata: "AnnData", target: Path) -> None:
    """Write what a fit of matrices on disk has made: they stay where they are."""
    import anndata
    import numpy as np

    obs = adata.obs.to_memory() if hasattr(adata.obs, "to_memory") else adata.obs
    var = adata.var.to_memory() if hasattr(adata.var, "to_memory") else adata.var
    obsm = {name: value for name, value in adata.obsm.items() if isinstance(value, np.ndarray)}
    write(anndata.AnnData(obs=obs, var=var, obsm=obsm, uns=dict(adata.uns)), target)


def opened(
    args: argparse.Namespace, output: Path, *, fitted: bool = False
) -> tuple["AnnData", Callable[["AnnData", Path], None]]:
    """The input, and what writes it with the results: a large one's matrices stay on disk.

    ``fitted``: the input holds a fit, which is read as well.
    """
    if isinstance(args.input, list):
        many = _are_many(args)
        adata = joined(args.input, backed=many)
        if many:
            return adata, _without_matrices
        check_writing(adata, output)
        return adata, write
    path, like = args.input, args.input.suffix == output.suffix
    if args.backed and not like:
        raise ValueError(f"--backed copies the input: name an output that ends in {path.suffix}")
    from scuvae.io.backed_files import add_backed, bytes_of, open_backed, write_backed

    if not _stays_on_disk(args, output):
        adata = read(path)
        check_writing(adata, output)
        return adata, write
    needed, free = bytes_of(path), free_bytes(output.parent)
    if needed > free:
        raise OSError(
            f"no space for {output}: it needs more than {needed:,} bytes, and {free:,} are free on "
            f"{output.parent}. Make room there, or name another output"
        )

    def copy(adata: "AnnData", target: Path) -> None:
        with replacing(target) as new:
            if fitted:
                add_backed(adata, path, new)
            else:
                write_backed(adata, path, new, getattr(args, "key_added", None))

    return _reading(partial(open_backed, slots=fitted), path), copy


def read_slots(args: argparse.Namespace) -> "AnnData":
    """The input, for a command that does not write it: a large one's matrices stay on disk."""
    from scuvae.io.backed_files import is_large, open_backed

    path = args.input
    # A path that is not there: the reader says so.
    if args.backed or (path.exists() and is_large(path)):
        return _reading(partial(open_backed, slots=True), path)
    return read(path)


def reading(args: argparse.Namespace) -> "AnnData":
    """The input alone, as :func:`opened` has it: for those processes that write nothing."""
    if isinstance(args.input, list):
        return joined(args.input, backed=_are_many(args))
    from scuvae.io.backed_files import open_backed

    if _stays_on_disk(args, args.output):
        return _reading(open_backed, args.input)
    return read(args.input)


def _are_many(args: argparse.Namespace) -> bool:
    """Whether the matrices of several files stay on disk."""
    from scuvae.io.backed_files import LARGE, bytes_of

    return bool(args.backed) or sum(map(bytes_of, args.input)) >= LARGE


def _stays_on_disk(args: argparse.Namespace, output: Path) -> bool:
    from scuvae.io.backed_files import is_large

    return args.backed or (args.input.suffix == output.suffix and is_large(args.input))


def read(path: Path) -> "AnnData":
    import anndata

    checked_input(path)
    zarr = path.suffix == ".zarr" or path.is_dir()
    return _reading(anndata.read_zarr if zarr else anndata.read_h5ad, path)


def _reading(how: Callable[[Path], "AnnData"], path: Path) -> "AnnData":
    checked_input(path)
    try:
        return how(path)
    except Exception as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def check_writing(adata: "AnnData", target: Path) -> None:
    """Raise before any work if the file system has no room, or ``adata`` has what no file takes."""
    from scuvae.io.file_sizes import without_values

    _check_space(adata, target)
    with temporary(target) as folder:
        for slot, part in without_values(adata):
            try:
                _write(part, folder / f"{slot.replace('/', '_')}{target.suffix}")
            except Exception as error:
                notes = " ".join(getattr(error, "__notes__", ()))
                raise ValueError(
                    f"adata.{slot} cannot be written to {target.name}: {one_line(error)} {notes}"
                ) from error


def _check_space(adata: "AnnData", target: Path) -> None:
    from scuvae.io.file_sizes import bytes_written

    needed, free = bytes_written(adata, target.suffix), free_bytes(target.parent)
    if needed > free:
        raise OSError(
            f"no space for {target}: it needs at least {needed:,} bytes, and {free:,} are free on "
            f"{target.parent}. Make room there, or name another output"
        )


def write(adata: "AnnData", target: Path) -> None:
    """Write beside ``target`` and rename, so that it is the old file or the new, never a part."""
    try:
        _check_space(adata, target)  # HDF5 does not bear to run out of it
        with replacing(target) as new:
            _write(adata, new)
    except (OSError, RuntimeError) as error:  # HDF5's are of both kinds
        from scuvae.io.file_sizes import bytes_written

        needed, free = bytes_written(adata, target.suffix), free_bytes(target.parent)
        kept = "; the old file is as it was" if target.exists() else ""
        raise OSError(
            f"cannot write {target}: {one_line(error)}. It needs about {needed:,} bytes, and "
            f"{free:,} are free on {target.parent}{kept}"
        ) from error


def write_text(text: str, target: Path) -> None:
    with replacing(target) as new:
        new.write_text(text, encoding="utf-8")


def _write(adata: "AnnData", path: Path) -> None:
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
