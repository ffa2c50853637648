"""Which values a likelihood explains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


def negative(values: Any) -> Any:
    return values < 0


def fractional(values: Any) -> Any:
    return values != np.rint(values)


def _no_bit(values: Any) -> Any:
    return (values != 0) & (values != 1)


@dataclass(frozen=True)
class Support:
    """``needs`` says in words what values should be; each of ``outside`` says of finite ones, an
    array, which are not."""

    needs: str
    outside: tuple[Callable[[Any], Any], ...] = ()


SUPPORTS: dict[str, Support] = {
    "real": Support("real numbers"),
    "counts": Support("whole counts", (negative, fractional)),
    "binary": Support("zeros and ones", (_no_bit,)),
}
