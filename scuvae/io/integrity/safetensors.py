"""Arrays and a text in one file, in safetensors' format, which no reader runs code for.

Eight bytes with the header's length, the header in JSON (each array's dtype, shape and place; a
table of strings beside them), then the arrays. Everything is checked before anything of the size
that it claims is allocated. Format: https://github.com/huggingface/safetensors#format
"""

import math
import os
import stat
from codecs import getincrementaldecoder
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scuvae.io.integrity.manifest import Damaged, from_json, to_json

DTYPES = {
    **{"BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2"},
    **{"U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"},
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# Names of a million genes take a quarter of it.
MOST_HEADER = 100 * 2**20
_MOST_ARRAYS, _MOST_BRANCHES = 10_000, 1_000_000
_TEXT = "scuvae"
_PIECE = 2**16

# How other files begin, to say what one is. A pickle of torch's is a zip.
_MAGIC = {
    b"PK\x03\x04": "a zip, as torch.save writes its pickles",
    b"\x80": "a pickle",
    b"\x89HDF": "HDF5, as .h5ad is",
}


def write(file: BinaryIO, text: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write; the same values give the same bytes."""
    header: dict[str, Any] = {"__metadata__": {_TEXT: text}}
    # The widest numbers first: so each array begins at a multiple of its own width.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    end = 0
    for name in order:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    encoded = to_json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MOST_HEADER:
        raise ValueError(f"the header would have {len(encoded)} bytes, more than {MOST_HEADER}")
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name in order:
        file.write(memoryview(np.ascontiguousarray(arrays[name]).data).cast("B"))


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The text and the arrays, or a ``Damaged`` that says what is wrong with the file."""
    # O_NONBLOCK: to open a FIFO must not wait for somebody to write to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no regular file: name a model file")
        return _read(file, status.st_size, str(path))


def _read(file: Any, size: int, where: str) -> tuple[str, dict[str, np.ndarray]]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    right = len(start) == 8 and 2 <= length <= min(size - 8, MOST_HEADER)
    header = _exactly(file, bytearray(length), where) if right else bytearray()
    if not header.startswith(b"{"):
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        what = f"no model file, or cut off: it has {size} bytes and claims a header of {length}"
        if kind is not None:
            what = f"{kind}, and not read"
        raise Damaged(f"{where} is {what}. scuvae.io.write_model writes model files")
    text, arrays = _header(header, size - 8 - length, where)
    found = {}
    for name, (dtype, shape) in arrays.items():
        array = np.empty(shape, dtype)
        if array.size:
            _exactly(file, memoryview(array.data).cast("B"), where)
        if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
            raise Damaged(f"{where} is damaged: {name!r} holds a bool that is neither 0 nor 1")
        found[name] = array
    return text, found


def _exactly(file: Any, buffer: Any, where: str) -> Any:
    view, done = memoryview(buffer), 0
    while done < len(view):
        n = file.readinto(view[done:])
        if not n:
            raise Damaged(f"{where} is cut off")
        done += n
    return buffer


def _header(
    encoded: bytearray, n_bytes: int, where: str
) -> tuple[str, dict[str, tuple[np.dtype, tuple[int, ...]]]]:
    """The text, and dtype and shape of each array in the order of their places."""
    if encoded.count(b"[") + encoded.count(b"{") > _MOST_BRANCHES:
        raise Damaged(f"{where} is no model file: its header has too many branches")
    try:
        decoded = _decoded(encoded)
    except UnicodeDecodeError:
        raise Damaged(f"{where} is damaged: its header is no UTF-8") from None
    header = from_json(decoded, f"{where}: its header")
    texts = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(texts, dict) or not isinstance(texts.get(_TEXT), str) or len(texts) != 1:
        raise Damaged(f"{where} is no model of scuvae: its header has no manifest")
    if len(header) > _MOST_ARRAYS:
        raise Damaged(f"{where} claims {len(header)} arrays, more than {_MOST_ARRAYS}")
    places = sorted((_place(name, entry, where), name) for name, entry in header.items())
    arrays, end = {}, 0
    for (start, stop, dtype, shape), name in places:
        # Without gaps and overlaps, so that the sizes add up to the file's.
        if start != end:
            raise Damaged(f"{where} is damaged: the bytes of {name!r} begin at {start}, not {end}")
        arrays[name], end = (np.dtype(dtype), shape), stop
    if end != n_bytes:
        raise Damaged(f"{where} is damaged: its arrays take {end} bytes, but it has {n_bytes}")
    return texts[_TEXT], arrays


def _decoded(encoded: bytearray) -> str:
    """By pieces: where a damaged length makes arrays a part of the header, this ends early."""
    decoder, view = getincrementaldecoder("utf-8")(), memoryview(encoded)
    pieces = [decoder.decode(view[at : at + _PIECE]) for at in range(0, len(view), _PIECE)]
    return "".join([*pieces, decoder.decode(b"", final=True)])


def _place(name: str, entry: Any, where: str) -> tuple[int, int, str, tuple[int, ...]]:
    if not name.isprintable() or name.startswith(("/", "\\")) or ".." in name or "\\" in name:
        raise Damaged(f"{where} names an array {name!r}: that is no name of a model's")
    right = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    shape, offsets = (entry["shape"], entry["data_offsets"]) if right else ([], [])
    right = right and entry["dtype"] in [*DTYPES] and _naturals(shape) and _naturals(offsets)
    if not right or len(offsets) != 2 or len(shape) > 8:
        raise Damaged(f"{where} is damaged: it describes {name!r} as {str(entry)[:100]}")
    dtype = DTYPES[entry["dtype"]]
    start, stop = offsets
    if stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
        raise Damaged(f"{where} is damaged: {name!r} of shape {shape} takes other than its bytes")
    return start, stop, dtype, tuple(shape)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
