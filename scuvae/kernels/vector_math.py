"""Elementary functions for compiled kernels, written so that LLVM makes vectors of them.

numba calls the C library for exponentials and logarithms, one number at a time: ten times as long.
Everything is float32. numba's cache on disk knows the file of a kernel, not of what it calls: after
an edit here, touch the files that import it.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

f32 = np.float32
i32 = np.int32


@intrinsic
def _as_float(typing: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def _as_bits(typing: Any, number: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), code


def compiled(**options: Any) -> Callable[[Any], Any]:
    """``numba.njit`` with a cache on disk where there is a place for one."""

    def wrap(function: Any) -> Any:
        settings = {"error_model": "numpy", "nogil": True, **options}
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:  # neither this folder nor the user's own can be written to
            return numba.njit(**settings)(function)

    return wrap


# Sums may be taken in any order, which vectors need. The elementary functions rely on the order of
# theirs, and must say so: what a function leaves open it inherits from its caller.
sums = compiled(fastmath={"reassoc", "contract", "nsz"})
exact = compiled(fastmath={"contract"})


@exact
def exp(x: Any) -> Any:
    """e^x for x ≤ 88, at least e^-87: to 1e-7 (Cephes' polynomial on [−½ ln 2, ½ ln 2])."""
    x = max(x, f32(-87.0))
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    whole = i32(n)
    r = (x - n * f32(0.693359375)) + n * f32(2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * r + f32(1.3981999507e-3)
    y = y * r + f32(8.3334519073e-3)
    y = y * r + f32(4.1665795894e-2)
    y = y * r + f32(1.6666665459e-1)
    y = y * r + f32(5.0000001201e-1)
    y = y * r * r + r + f32(1.0)
    return y * _as_float(i32(i32(whole + i32(127)) << i32(23)))


@exact
def log1p(x: Any, inverse: Any) -> Any:
    """ln(1 + x) for x > −1 to 1.3e-7, given 1/(1 + x); the rounding of 1 + x is put right."""
    u = f32(1.0) + x
    lost = (x - (u - f32(1.0))) * inverse
    bits = _as_bits(u)
    exponent = i32(i32(bits - i32(0x3F3504F3)) >> i32(23))
    r = _as_float(i32(bits - i32(exponent << i32(23)))) - f32(1.0)  # in [√½ − 1, √2 − 1]
    square = r * r
    y = f32(7.0376836292e-2)
    y = y * r + f32(-1.1514610310e-1)
    y = y * r + f32(1.1676998740e-1)
    y = y * r + f32(-1.2420140846e-1)
    y = y * r + f32(1.4249322787e-1)
    y = y * r + f32(-1.6668057665e-1)
    y = y * r + f32(2.0000714765e-1)
    y = y * r + f32(-2.4999993993e-1)
    y = y * r + f32(3.3333331174e-1)
    n = f32(exponent)
    y = y * r * square + n * f32(-2.12194440e-4) - f32(0.5) * square
    return r + y + n * f32(0.693359375) + lost


@exact
def _ordered(bits: Any) -> Any:
    """A float's bits as an integer that sorts as the float does, and back again."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & i32(0x7FFFFFFF)))


@sums
def largest(row: Any) -> Any:
    """max η by way of integers: LLVM makes no vectors of a maximum of floats."""
    top = _ordered(_as_bits(row[0]))
    for g in range(len(row)):
        top = max(top, _ordered(_as_bits(row[g])))
    return _as_float(_ordered(top))
