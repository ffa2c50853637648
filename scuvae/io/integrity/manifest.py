"""What a fit says of itself: its format, and a digest of each array and of each setting.

An entry of ``uns`` is a tree of plain values. Here it is two flat tables, numbers in arrays and all
else as JSON, by their paths (``"state/decoder/layers.0.weight"``, ``"params/n_latent"``). The
manifest has a SHA-256 of each; it lies in ``uns`` beside the fit, and in model files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from scuvae import __version__

# 1: fits of 0.1.0 and before, which had no manifest. A change of what an entry means is a new one.
FORMAT = 2

_PARTS = {"format", "version", "settings", "arrays", "sha256"}


class Damaged(ValueError):
    """What is read is not what was written; the message says where."""


def flat(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings, as JSON has them, and arrays of numbers, by path; order and dtypes are canonical.

    A path ends in ``/`` where a branch is empty.
    """
    settings: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for path, value in sorted(_leaves(entry, ()), key=itemgetter(0)):
        plain = _plain(path, value)
        (arrays if isinstance(plain, np.ndarray) else settings)[path] = plain
    return settings, arrays


def nested(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The entry that :func:`flat` took apart."""
    entry: dict[str, Any] = {}
    for path, value in [*settings.items(), *arrays.items()]:
        *branches, name = path.split("/")
        place = entry
        for branch in branches:
            place = place.setdefault(branch, {})
            if not isinstance(place, dict):
                raise Damaged(f"{path!r} lies below another value")
        if not name:
            continue
        if name in place:
            raise Damaged(f"{path!r} is there twice")
        place[name] = np.array(value, dtype=object) if isinstance(value, list) else value
    if isinstance(entry.get("history"), dict):
        entry["history"] = _table(entry["history"])
    return entry


def _table(parts: dict[str, Any]) -> pd.DataFrame:
    columns = parts.pop("columns", None)
    shapes = {np.shape(value) for value in parts.values()}
    alike = len(shapes) <= 1 and all(len(shape) == 1 for shape in shapes)
    if not isinstance(columns, np.ndarray) or set(columns) != set(parts) or not alike:
        raise Damaged("'history' is no table")
    table = pd.DataFrame({name: parts[name] for name in columns})
    return table.set_axis(pd.RangeIndex(len(table), name="epoch"))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, pd.DataFrame):
        # No digest is of their numbers, since every reader can tell what they are.
        if list(value.index) != list(range(len(value))) or value.index.name not in (None, "epoch"):
            where = "/".join(path)
            raise Damaged(f"{where!r} is damaged: its rows are not numbered 0, 1, 2, ... by epoch")
        yield "/".join((*path, "columns")), [str(name) for name in value]
        for name in value:
            yield "/".join((*path, str(name))), value[name].to_numpy()
    elif isinstance(value, pd.Series):
        raise Damaged(f"{'/'.join(path)!r} is a Series")
    elif isinstance(value, Mapping) or hasattr(value, "keys"):
        if not len(value):
            yield "/".join((*path, "")), True
        for name in value:
            if not isinstance(name, str) or not name or "/" in name:
                where = "/".join(path)
                raise Damaged(f"{where!r} has the key {name!r}: keys are strings without '/'")
            yield from _leaves(value[name], (*path, name))
    else:
        yield "/".join(path), value


def _plain(path: str, value: Any) -> Any:
    """A number, string, bool, list of strings, or an array of numbers as any file hands it back."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        raise Damaged(f"{path!r} is {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    if array.ndim == 0:
        raise Damaged(f"{path!r} is a {type(value).__name__}")
    if array.dtype.kind in "OUST" and array.ndim == 1:
        names = [name.decode() if isinstance(name, bytes) else name for name in array.tolist()]
        if not all(isinstance(name, str) for name in names):
            odd = next(name for name in names if not isinstance(name, str))
            raise Damaged(f"{path!r} holds {odd!r} among strings")
        return [str(name) for name in names]
    if array.dtype.kind not in "biuf":
        raise Damaged(f"{path!r} is a {type(value).__name__} of dtype {array.dtype}")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    # A store that leaves out chunks of zeros hands −0 back as 0. Copied only where there is one: a
    # file is read within twice its size.
    with np.errstate(invalid="ignore"):  # damage may look like a signalling NaN
        if array.dtype.kind == "f" and np.any(np.signbit(array) & (array == 0)):
            return array + array.dtype.type(0)
    return array


def made(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The manifest of what :func:`flat` gave."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "settings": {path: digest(to_json(value).encode()) for path, value in settings.items()},
        "arrays": {path: described(array) for path, array in arrays.items()},
    }
    return {**manifest, "sha256": digest(to_json(manifest).encode())}


def described(array: np.ndarray) -> dict[str, Any]:
    data = memoryview(array.data).cast("B") if array.size else b""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": digest(data)}


def digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def check(
    manifest: Any, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str
) -> None:
    """Raise unless each setting and array is the one that the manifest describes.

    ``where`` names what is read, in messages.
    """
    check_manifest(manifest, where)
    version = manifest["version"]
    remedy = f"scuvae {version} wrote another one (digest mismatch). Read an undamaged copy, or fit"
    gone = (set(manifest["settings"]) - set(settings)) | (set(manifest["arrays"]) - set(arrays))
    if gone:
        raise Damaged(f"{where} lacks {min(gone)!r}, which scuvae {version} wrote there")
    for path, value in settings.items():
        written = manifest["settings"].get(path)
        if written is None:
            raise Damaged(f"{where} has {path!r}, which scuvae {version} did not write there")
        if written != digest(to_json(value).encode()):
            raise Damaged(f"{where}: {path!r} is damaged: it is {_short(value)}, but {remedy}")
    for path, array in arrays.items():
        written = manifest["arrays"].get(path)
        if written is None:
            raise Damaged(f"{where} has {path!r}, which scuvae {version} did not write there")
        found = described(array)
        for part in ("shape", "dtype", "sha256"):
            if found[part] != written[part]:
                text = (
                    "its values are others" if part == "sha256" else f"its {part} is {found[part]}"
                )
                raise Damaged(f"{where}: {path!r} is damaged: {text}, but {remedy}")


def check_manifest(manifest: Any, where: str) -> None:
    """Raise where it is of a newer format, or no manifest that was written so."""
    if not isinstance(manifest, dict):
        raise Damaged(f"{where}: its manifest is damaged")
    number, version = manifest.get("format"), manifest.get("version")
    if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
        raise ValueError(
            f"{where} has format {number}, written by scuvae {version}; this is scuvae "
            f"{__version__}, which reads formats up to {FORMAT}: update scuvae"
        )
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    whole = set(manifest) == _PARTS and manifest["sha256"] == digest(to_json(rest).encode())
    if not whole or number != FORMAT:
        raise Damaged(f"{where}: its manifest is damaged (digest mismatch)")


def to_json(value: Any) -> str:
    """Compact, in ASCII, keys sorted: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes, where: str) -> Any:
    """Parsed, or an error in words: also for a key that is there twice, NaN, and deep nesting."""
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=_refused, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Damaged(f"{where} is damaged: {why}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text} is beyond a float64")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
