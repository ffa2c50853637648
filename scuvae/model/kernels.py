"""Compiled passes over rows of logits: a count likelihood and its gradients in one go, on a CPU.

A row of logits fits a core's first cache; torch would read and write the whole block once for each
of a dozen operations. numba compiles a kernel at its first call and keeps it on disk. All work on
float32 and on rows of their own, so that no cell's result depends on the cells beside it.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

_f = np.float32
_i = np.int32
# Rows that are worth a thread of their own: 2^17 logits take it .2 ms.
_NUMBERS = 2**17
# Dispersions beyond e^±60 act as these: all is Poisson there, or all zero, and nothing overflows.
_MOST_LOG_THETA = _f(60.0)
_TABLE = 16


# numba can be told to interpret, as a debugger would have it.
ENABLED = not numba.config.DISABLE_JIT


# --- elementary functions, written so that LLVM makes vectors of them -----------------------------


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


def _compiled(**options: Any) -> Callable[[Any], Any]:
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
_sums = _compiled(fastmath={"reassoc", "contract", "nsz"})
_exact = _compiled(fastmath={"contract"})


@_exact
def _exp(x: Any) -> Any:
    """e^x for x ≤ 88, at least e^-87: to 1e-7 (Cephes' polynomial on [−½ ln 2, ½ ln 2])."""
    x = max(x, _f(-87.0))
    n = np.floor(x * _f(1.44269504) + _f(0.5))
    whole = _i(n)
    r = (x - n * _f(0.693359375)) + n * _f(2.12194440e-4)
    y = _f(1.9875691500e-4)
    y = y * r + _f(1.3981999507e-3)
    y = y * r + _f(8.3334519073e-3)
    y = y * r + _f(4.1665795894e-2)
    y = y * r + _f(1.6666665459e-1)
    y = y * r + _f(5.0000001201e-1)
    y = y * r * r + r + _f(1.0)
    return y * _as_float(_i(_i(whole + _i(127)) << _i(23)))


@_exact
def _log1p(x: Any, inverse: Any) -> Any:
    """ln(1 + x) for x ≥ 0 to 1.3e-7, given 1/(1 + x); the rounding of 1 + x is put right."""
    u = _f(1.0) + x
    lost = (x - (u - _f(1.0))) * inverse
    bits = _as_bits(u)
    exponent = _i(_i(bits - _i(0x3F3504F3)) >> _i(23))
    r = _as_float(_i(bits - _i(exponent << _i(23)))) - _f(1.0)  # in [√½ − 1, √2 − 1]
    square = r * r
    y = _f(7.0376836292e-2)
    y = y * r + _f(-1.1514610310e-1)
    y = y * r + _f(1.1676998740e-1)
    y = y * r + _f(-1.2420140846e-1)
    y = y * r + _f(1.4249322787e-1)
    y = y * r + _f(-1.6668057665e-1)
    y = y * r + _f(2.0000714765e-1)
    y = y * r + _f(-2.4999993993e-1)
    y = y * r + _f(3.3333331174e-1)
    n = _f(exponent)
    y = y * r * square + n * _f(-2.12194440e-4) - _f(0.5) * square
    return r + y + n * _f(0.693359375) + lost


# --- rows -----------------------------------------------------------------------------------------


@_exact
def _ordered(bits: Any) -> Any:
    """A float's bits as an integer that sorts as the float does, and back again."""
    return _i(bits ^ _i(_i(bits >> _i(31)) & _i(0x7FFFFFFF)))


@_sums
def _largest(row: Any) -> Any:
    """max η by way of integers: LLVM makes no vectors of a maximum of floats."""
    top = _ordered(_as_bits(row[0]))
    for g in range(len(row)):
        top = max(top, _ordered(_as_bits(row[g])))
    return _as_float(_ordered(top))


@_sums
def _exponentials(row: Any, out: Any) -> Any:
    """e^(η − max η) into ``out``; max η, the sum, and a zero that is NaN if any η is no number."""
    total, check = _f(0.0), _f(0.0)
    for g in range(len(row)):
        check += row[g] * _f(0.0)
    top = _largest(row)
    for g in range(len(row)):
        out[g] = _exp(row[g] - top)
        total += out[g]
    return top, total, check


@_sums
def _zero_counts(
    share: Any, scale: Any, theta: Any, inverse: Any, slope: Any, slope_theta: Any, log1p: Any
) -> Any:
    """A negative binomial row as if all counts were zero: its log p and its slopes' sum.

    Fills ``slope`` with −θμ/(θ+μ), the slope in ln μ, ``slope_theta`` with that in ln θ, and
    ``log1p`` with log1p(μ/θ).
    """
    value, total = _f(0.0), _f(0.0)
    for g in range(len(share)):
        mu = share[g] * scale
        ratio = mu * inverse[g]
        rest = _f(1.0) / (_f(1.0) + ratio)
        log1p[g] = _log1p(ratio, rest)
        drop = theta[g] * log1p[g]
        slope[g] = -mu * rest
        slope_theta[g] = mu * rest - drop
        value -= drop
        total += slope[g]
    return value, total


@_sums
def _inflate(
    logit: Any, theta: Any, log1p: Any, slope: Any, slope_theta: Any, kept: Any, excess: Any
) -> Any:
    """What zero inflation changes in such a row: its log p and its slopes' sum.

    ``kept`` is P(no dropout | zero), ``excess`` ln P(zero)/P(zero of the count), but for ln(1−π).
    """
    value, total = _f(0.0), _f(0.0)
    for g in range(len(log1p)):
        odds = theta[g] * log1p[g] + logit[g]
        small = _exp(-abs(odds))
        inverse = _f(1.0) / (_f(1.0) + small)
        excess[g] = max(odds, _f(0.0)) + _log1p(small, inverse)
        kept[g] = small * inverse if odds > _f(0.0) else inverse
        slope[g] *= kept[g]
        slope_theta[g] *= kept[g]
        value += excess[g]
        total += slope[g]
    return value, total


@_sums
def _spared(logit: Any, kept: Any) -> Any:
    """A row's Σ ln(1−π), and in place of ``kept`` its slopes in the logits: 1 − kept − π."""
    value = _f(0.0)
    for g in range(len(logit)):
        small = _exp(-abs(logit[g]))
        inverse = _f(1.0) / (_f(1.0) + small)
        value -= max(logit[g], _f(0.0)) + _log1p(small, inverse)
        kept[g] = _f(1.0) - kept[g] - (inverse if logit[g] > _f(0.0) else small * inverse)
    return value


@_sums
def _through_softmax(slope: Any, share: Any, scale: Any) -> None:
    for g in range(len(slope)):
        slope[g] -= share[g] * scale


# --- Γ(x+θ) / (Γ(θ) θˣ x!), as in ``rising.py`` ---------------------------------------------------


@_exact
def _stirling(y: float) -> tuple[float, float]:
    r = 1 / y
    square = r * r
    value = r * (1 / 12 - square * (1 / 360 - square / 1260))
    return value, -square * (1 / 12 - square * (3 / 360 - square * (5 / 1260)))


@_exact
def _rising_at(x: float, theta: float) -> tuple[float, float]:
    """Of any one count, in float64: shifted up by four, then Stirling's series."""
    upper, top = theta + 4, theta + 4 + x
    log1p_top = math.log1p(x / upper)
    (s_top, slope_top), (s_upper, slope_upper) = _stirling(top), _stirling(upper)
    c = (top - 0.5) * log1p_top - x + s_top - s_upper + x * math.log1p(4 / theta)
    slope = log1p_top - (top - 0.5) * x / (upper * top) + slope_top - slope_upper
    slope -= x * 4 / (theta * upper)
    for i in range(4):
        c -= math.log1p(x / (theta + i))
        slope += x / ((theta + i) * (theta + i + x))
    return c - math.lgamma(x + 1), theta * slope


@_exact
def _rising(value: Any, col: Any, log_theta: Any, out: Any, out_slope: Any) -> None:
    n_genes = len(log_theta)
    theta = _bounded(log_theta)
    inverse = _f(1.0) / theta
    # Counts are small whole numbers: row j has Σ_{i<j} log1p(i/θ) − ln j!, then come its slopes.
    table, slopes = np.zeros((_TABLE, n_genes), _f), np.zeros((_TABLE, n_genes), _f)
    for j in range(1, _TABLE):
        _next(table[j - 1], slopes[j - 1], _f(j - 1), _f(math.log(j)), inverse, table[j], slopes[j])
    for k in range(len(value)):
        g, whole = col[k], int(value[k])
        if whole < _TABLE and whole == value[k]:
            out[k], out_slope[k] = table[whole, g], slopes[whole, g]
        else:
            c, slope = _rising_at(float(value[k]), float(theta[g]))
            out[k], out_slope[k] = _f(c), _f(slope)


@_exact
def _next(
    below: Any, below_slope: Any, i: Any, log_next: Any, inverse: Any, row: Any, slope: Any
) -> None:
    for g in range(len(row)):
        ratio = i * inverse[g]
        rest = _f(1.0) / (_f(1.0) + ratio)
        row[g] = below[g] + (_log1p(ratio, rest) - log_next)
        slope[g] = below_slope[g] - ratio * rest


@_exact
def _bounded(log_theta: Any) -> Any:
    """θ, (genes,)."""
    return np.exp(np.minimum(np.maximum(log_theta, -_MOST_LOG_THETA), _MOST_LOG_THETA))


# --- likelihoods ----------------------------------------------------------------------------------


@_exact
def _negative_binomial(
    first: int,
    last: int,
    eta: Any,
    starts: Any,
    col: Any,
    value: Any,
    constant: Any,
    constant_slope: Any,
    size: Any,
    log_theta: Any,
    logits: Any,
    inflated: bool,
    keep: bool,
    out: Any,
    slopes: Any,
    size_slopes: Any,
    theta_slopes: Any,
    logit_slopes: Any,
) -> None:
    # There is room for the slopes that are asked for.
    keep_theta, keep_logit = len(theta_slopes) > 0, len(logit_slopes) > 0
    n_genes, n_cells = eta.shape[1], len(starts) - 1
    theta = _bounded(log_theta)
    inverse = _f(1.0) / theta
    share, log1p = np.empty(n_genes, _f), np.empty(n_genes, _f)
    slope_row, theta_row = np.empty(n_genes, _f), np.empty(n_genes, _f)
    kept_row, excess = np.empty(n_genes, _f), np.empty(n_genes, _f)
    for r in range(first, last):
        cell = r % n_cells
        slope = slopes[r] if keep else slope_row
        slope_theta = theta_slopes[r] if keep_theta else theta_row
        top, total, check = _exponentials(eta[r], share)
        scale = size[r] / total
        log_scale = math.log(size[r]) - math.log(total) - top
        # From logits, which survive where a share of the softmax does not, and before slopes
        # overwrite them.
        at_nonzeros = check
        for k in range(starts[cell], starts[cell + 1]):
            at_nonzeros += value[k] * (eta[r, col[k]] + log_scale) + constant[k]
        found, slope_sum = _zero_counts(share, scale, theta, inverse, slope, slope_theta, log1p)
        kept = logit_slopes[r] if keep_logit else kept_row
        if inflated:
            logit = logits[r % len(logits)]
            more, slope_sum = _inflate(logit, theta, log1p, slope, slope_theta, kept, excess)
            found += more
        for k in range(starts[cell], starts[cell + 1]):
            g = col[k]
            mu = share[g] * scale
            ratio = mu * inverse[g]
            rest = _f(1.0) / (_f(1.0) + ratio)
            log1p_at, part = log1p[g], ratio * rest
            if log_theta[g] < -_MOST_LOG_THETA:
                log_ratio = math.log(mu) - log_theta[g]
                log1p_at = log_ratio if log_ratio > _f(15.0) else math.log1p(math.exp(log_ratio))
                part = _f(1.0) / (_f(1.0) + math.exp(-log_ratio))
            found -= value[k] * log1p_at
            if inflated:
                found -= excess[g]
                kept[g] = _f(1.0)
            new = value[k] * (_f(1.0) - part) - mu * rest
            slope_sum += new - slope[g]
            slope[g] = new
            slope_theta[g] = mu * rest - theta[g] * log1p[g] + constant_slope[k] + value[k] * part
        if inflated:
            found += _spared(logits[r % len(logits)], kept)
        out[r] = found + at_nonzeros
        if keep:
            size_slopes[r] = slope_sum
            _through_softmax(slope, share, slope_sum / total)


@_exact
def _poisson(
    first: int,
    last: int,
    eta: Any,
    starts: Any,
    col: Any,
    value: Any,
    constant: Any,
    size: Any,
    keep: bool,
    out: Any,
    slopes: Any,
    size_slopes: Any,
) -> None:
    share = np.empty(eta.shape[1], _f)
    for r in range(first, last):
        cell = r % (len(starts) - 1)
        top, total, check = _exponentials(eta[r], share)
        log_scale = math.log(size[r]) - math.log(total) - top
        found, counts = check - size[r], _f(0.0)
        for k in range(starts[cell], starts[cell + 1]):
            found += value[k] * (eta[r, col[k]] + log_scale) - constant[k]
            counts += value[k]
        out[r] = found
        if keep:
            slopes[r] = _f(0.0)
            for k in range(starts[cell], starts[cell + 1]):
                slopes[r, col[k]] = value[k]
            size_slopes[r] = counts - size[r]
            _through_softmax(slopes[r], share, counts / total)


@_sums
def _dot(a: Any, b: Any) -> Any:
    total = _f(0.0)
    for g in range(len(a)):
        total += a[g] * b[g]
    return total


@_exact
def _times(a: Any, b: Any, out: Any) -> None:
    for g in range(len(a)):
        out[g] = a[g] * b[g]


@_exact
def _gram(first: int, last: int, weight: Any, rows: Any, out: Any) -> None:
    n_rows = rows.shape[1]
    weighted = np.empty(rows.shape[2], _f)
    for i in range(first, last):
        for k in range(n_rows):
            _times(rows[i, k], weight[i], weighted)
            for j in range(k + 1):
                out[i, k, j] = out[i, j, k] = _dot(weighted, rows[i, j])


@_exact
def _gather(starts: Any, col: Any, value: Any, rows: Any) -> tuple[Any, Any, Any]:
    new_starts = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        new_starts[i + 1] = new_starts[i] + starts[rows[i] + 1] - starts[rows[i]]
    new_col, new_value = np.empty(new_starts[-1], col.dtype), np.empty(new_starts[-1], value.dtype)
    for i in range(len(rows)):
        first, last = new_starts[i], new_starts[i + 1]
        at = starts[rows[i]]
        new_col[first:last] = col[at : at + last - first]
        new_value[first:last] = value[at : at + last - first]
    return new_starts, new_col, new_value


# --- from torch -----------------------------------------------------------------------------------


def rising(value: Tensor, col: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`scuvae.model.rising.rising`."""
    out, slope = torch.empty_like(value), torch.empty_like(value)
    _rising(*map(_array, (value, col, log_theta, out, slope)))
    return out, slope


def negative_binomial(
    eta: Tensor,
    starts: Tensor,
    col: Tensor,
    value: Tensor,
    constant: Tensor,
    constant_slope: Tensor,
    size: Tensor,
    log_theta: Tensor,
    logit: Tensor | None,
    *,
    keep: bool,
    spare: bool,
    keep_theta: bool = True,
    keep_logit: bool = True,
) -> tuple[Tensor | None, ...]:
    """log p of every row of ``eta``, (rows, genes), and with ``keep`` its slopes.

    Row r is a draw for cell r modulo the cells; ``size`` is (rows,). ``logit`` is (genes,), or
    (rows, genes). Slopes are in η, (rows, genes), in place of η with ``spare``; in ln ℓ, (rows,);
    in ln θ and, zero-inflated, in the logit, (rows, genes): None for those that are not to be kept.
    """
    out, none = eta.new_empty(len(eta)), eta.new_empty(0, 0)
    slope, size_slope = _room(eta, keep, spare)
    wanted = keep and keep_theta, keep and keep_logit and logit is not None
    own = [torch.empty_like(eta) if want else none for want in wanted]
    arrays = (starts, col, value, constant, constant_slope, size, log_theta)
    logits = none if logit is None else logit.view(-1, eta.shape[1])
    room = (slope, size_slope, *own)
    _run(_negative_binomial, eta, *arrays, logits, logit is not None, keep, out, *room)
    if not keep:
        return (out,)
    slopes = (part if want else None for part, want in zip(own, wanted, strict=True))
    return out, slope, size_slope, *slopes


def poisson(
    eta: Tensor,
    starts: Tensor,
    col: Tensor,
    value: Tensor,
    constant: Tensor,
    size: Tensor,
    *,
    keep: bool,
    spare: bool,
) -> tuple[Tensor, ...]:
    """As :func:`negative_binomial`, with slopes in η and in ln ℓ alone."""
    out, room = eta.new_empty(len(eta)), _room(eta, keep, spare)
    _run(_poisson, eta, starts, col, value, constant, size, keep, out, *room)
    return (out, *room) if keep else (out,)


def _room(eta: Tensor, keep: bool, spare: bool) -> tuple[Tensor, Tensor]:
    """Room for the slopes of each row in η and in ln ℓ."""
    if not keep:
        return eta.new_empty(0, 0), eta.new_empty(0)
    return eta if spare else torch.empty_like(eta), eta.new_empty(len(eta))


def gram(rows: Tensor, weight: Tensor) -> Tensor:
    """R diag(w) Rᵀ of each cell's rows R, (cells, rows, genes), and weights w, (cells, genes)."""
    out = rows.new_empty(*rows.shape[:2], rows.shape[1])
    _run(_gram, weight, rows, out)
    return out


def gather(
    starts: Tensor, col: Tensor, value: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a CSR matrix, as its three arrays."""
    first, second, third = _gather(*map(_array, (starts, col, value, rows)))
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)


def _array(argument: Any) -> Any:
    return argument.detach().numpy() if isinstance(argument, Tensor) else argument


def _run(kernel: Any, eta: Tensor, *arguments: Any) -> None:
    """A kernel over all rows, by as many threads as torch may use where there is work for them."""
    n_rows = len(eta)
    arrays = [_array(argument) for argument in (eta, *arguments)]
    n_threads = min(torch.get_num_threads(), eta.numel() // _NUMBERS, n_rows)
    if n_threads < 2:
        kernel(0, n_rows, *arrays)
        return
    ends = [n_rows * i // n_threads for i in range(n_threads + 1)]
    list(_pool(n_threads).map(lambda a, b: kernel(a, b, *arrays), ends[:-1], ends[1:]))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "scuvae")


if hasattr(os, "register_at_fork"):  # threads do not outlive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
