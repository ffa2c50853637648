"""Checks of arguments: each error names the argument, the value found and the remedy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Parameter
from numbers import Integral, Real
from os import PathLike, curdir, fspath
from os.path import exists, isabs
from typing import Any, ParamSpec, TypeVar

import numpy as np

from scuvae._errors import near
from scuvae._replacing import unreachable

P = ParamSpec("P")
R = TypeVar("R")

# What counts as a size: beyond it no array goes.
_LARGEST = 2**62


def whole(name: str, value: object, *, at_least: int = 1) -> int:
    """``value`` as an int; bools, floats and strings are refused."""
    # numpy's durations are registered as whole numbers.
    if isinstance(value, bool | np.timedelta64) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}: pass a whole number >= {at_least}"
        )
    if value < at_least:
        raise ValueError(f"{name}={value!r}: pass a whole number >= {at_least}")
    if int(value) > _LARGEST:
        raise ValueError(f"{name}={value!r}: pass a whole number of at most {_LARGEST}")
    return int(value)


def real(
    name: str,
    value: object,
    *,
    above: float | None = None,
    low: float = -math.inf,
    below: float = math.inf,
) -> float:
    """``value`` as a finite float with ``value > above``, ``low <= value < below``."""
    allowed = f"> {above}" if above is not None else f">= {low}"
    if below < math.inf:
        allowed += f" and < {below}"
    if isinstance(value, bool | np.timedelta64) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass a number {allowed}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    too_low = number <= above if above is not None else number < low
    if not math.isfinite(number) or too_low or number >= below:
        raise ValueError(f"{name}={value!r}: pass a finite number {allowed}")
    return number


def called_right(
    parameters: Mapping[str, Parameter], name: str, args: Sequence[object], kwargs: Iterable[str]
) -> None:
    """A call with an argument that ``parameters`` do not have: said with the one that was meant."""
    known = [p for p in parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    first = [p.name for p in known if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(first):
        example = next((p.name for p in known if p.name not in first), "key")
        raise TypeError(
            f"{name}() takes {' and '.join(first)} by position, and was given {len(args)} arguments"
            f" without a name: pass all else by name, such as {example}="
        )
    if len(known) < len(parameters):
        return
    names = {p.name for p in known} | ({"random_state"} if "rng" in parameters else set())
    for given in kwargs:
        if given not in names:
            listed = near(given, [p.name for p in known], limit=len(known))
            raise TypeError(f"{name}() has no argument {given!r}. {listed}")


def plain(value: Any) -> Any:
    """A string or truth value of numpy's, such as an element of an array, as Python's own."""
    return value.item() if isinstance(value, np.str_ | np.bool_) else value


def flag(name: str, value: object) -> bool:
    """``value``, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass True or False")
    return value


def flags(parameters: Mapping[str, Parameter], given: Mapping[str, object]) -> None:
    """Those of a call's arguments that are to be True or False, or None where that is allowed."""
    for name, value in given.items():
        kind = parameters[name].annotation if name in parameters else None
        if kind is bool or (kind == bool | None and value is not None):
            flag(name, value)


def path(name: str, value: object, what: str) -> str:
    """``value`` as the text of a path, which must be one; ``what``: what the path is to name."""
    text = fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass the path of {what}")
    if not text.strip("\0") or "\0" in text:
        raise ValueError(f"{name}={text!r} is no path: pass that of {what}")
    if why := unreachable(text):
        raise ValueError(f"{name}={text!r}: {why}. Pass the path of {what}")
    if not isabs(text) and not exists(curdir):
        raise FileNotFoundError(
            f"{name}={text!r} is relative to the present folder, which is gone: pass the whole "
            f"path of {what}"
        )
    return text


def one_of(name: str, value: object, known: Iterable[object]) -> Any:
    """``value``, which must be among ``known``."""
    known = list(known)
    # True == 1 in Python; here they are different answers.
    if not any(type(value) is type(k) and value == k for k in known):
        if isinstance(value, str):
            raise ValueError(f"{name}={value!r} is unknown. {near(value, known)}")
        raise ValueError(f"{name}={value!r}: pass one of {', '.join(map(repr, known))}")
    return value


def names(name: str, value: object) -> list[str]:
    """``value``, some strings in a list, array, index or set, as a list; one string is refused."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}: pass a list of names, or an array or "
            "index of them"
        )
    found = list(value)
    for i, item in enumerate(found):
        if not isinstance(item, str):
            raise TypeError(
                f"{name}[{i}]={item!r} is a {type(item).__name__}: pass names, such as "
                "adata.var_names, or adata.var_names[mask]"
            )
    if not found:
        raise ValueError(f"{name} is empty: pass at least one name, or None for all")
    return found


def random_generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """``rng`` itself, or a new generator from the seed; None for one that nobody can repeat."""
    if isinstance(rng, bool | np.timedelta64) or not (
        rng is None or isinstance(rng, int | np.integer | np.random.Generator)
    ):
        raise TypeError(
            f"rng={rng!r} is a {type(rng).__name__}: pass an int, a numpy.random.Generator or None"
        )
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng={rng}: a seed is not negative")
    return np.random.default_rng(rng)


def random_state_alias(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``random_state=`` stand for ``rng=``, as scanpy's users know it."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if "random_state" in kwargs:
            if "rng" in kwargs:
                raise TypeError("pass rng= or its alias random_state=, not both")
            kwargs["rng"] = kwargs.pop("random_state")
        return function(*args, **kwargs)

    return wrapper
