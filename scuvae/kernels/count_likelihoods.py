"""Compiled passes over rows of logits: a count likelihood and its gradients in one go, on a CPU.

A row of logits fits a core's first cache; torch would read and write the whole block once for each
of a dozen operations. numba compiles a kernel at its first call and keeps it on disk. All work on
float32 and on rows of their own, so that no cell's result depends on the cells beside it. Indices
of nonzeros are made unsigned: of others numba asks each time whether they count from the end.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.rising_factorial import MOST_LOG_THETA, bounded
from scuvae.kernels.slopes import Slopes
from scuvae.kernels.threads import BLOCK, over_rows
from scuvae.kernels.vector_math import exact, exp, f32, largest, log1p, sums


@sums
def _exponentials(row: Any, out: Any) -> Any:
    """e^(η − max η) into ``out``; max η, the sum, and a zero that is NaN if any η is no number."""
    total, check = f32(0.0), f32(0.0)
    top = largest(row)
    for g in range(len(row)):
        check += row[g] * f32(0.0)
        out[g] = exp(row[g] - top)
        total += out[g]
    return top, total, check


@sums
def _zero_counts(share: Any, scale: Any, theta: Any, inverse: Any, slope: Any, logs: Any) -> Any:
    """A negative binomial row as if all counts were zero: its log p and its slopes' sum.

    Fills ``slope`` with −θμ/(θ+μ), the slope in ln μ, and ``logs`` with log1p(μ/θ).
    """
    value, total = f32(0.0), f32(0.0)
    for g in range(len(share)):
        mu = share[g] * scale
        ratio = mu * inverse[g]
        rest = f32(1.0) / (f32(1.0) + ratio)
        logs[g] = log1p(ratio, rest)
        slope[g] = -mu * rest
        value -= theta[g] * logs[g]
        total += slope[g]
    return value, total


@sums
def _inflate(
    logit: Any, theta: Any, logs: Any, slope: Any, slope_logit: Any, pi: Any, factor: Any
) -> Any:
    """Such a row inflated: its log p but for :func:`_logarithms`, and its slopes' sum.

    With o the log odds of a dropout against a zero of the count, ln p is max(logit, −θ log1p(μ/θ))
    − max(logit, 0) and the logarithm of ``factor``, (1 + e^-|o|) / (1 + e^-|logit|). Fills also
    ``slope_logit``, P(dropout | zero) − π, and ``pi``.
    """
    value, total = f32(0.0), f32(0.0)
    for g in range(len(logs)):
        drop = theta[g] * logs[g]
        odds = drop + logit[g]
        given, prior = exp(-abs(odds)), exp(-abs(logit[g]))
        above, below = f32(1.0) + given, f32(1.0) + prior
        inverse = f32(1.0) / (above * below)
        kept = below * inverse * (given if odds > f32(0.0) else f32(1.0))
        pi[g] = above * inverse * (f32(1.0) if logit[g] > f32(0.0) else prior)
        factor[g] = above * above * inverse
        slope_logit[g] = f32(1.0) - kept - pi[g]
        slope[g] *= kept
        value += max(logit[g], -drop) - max(logit[g], f32(0.0))
        total += slope[g]
    return value, total


@sums
def _logarithms(factor: Any) -> Any:
    """Σ ln of numbers in [½, 2], four at a time."""
    value, n = f32(0.0), len(factor) // 4
    for g in range(n):
        product = factor[g] * factor[g + n] * factor[g + 2 * n] * factor[g + 3 * n]
        value += log1p(product - f32(1.0), f32(1.0) / product)
    for g in range(4 * n, len(factor)):
        value += log1p(factor[g] - f32(1.0), f32(1.0) / factor[g])
    return value


@sums
def _thin(logs: Any, slope_logit: Any, pi: Any) -> None:
    """What a zero of the count brings, times the chance that it is one."""
    for g in range(len(logs)):
        logs[g] *= f32(1.0) - slope_logit[g] - pi[g]


@sums
def _through_softmax(slope: Any, share: Any, scale: Any) -> None:
    for g in range(len(slope)):
        slope[g] -= share[g] * scale


@sums
def _summed_through_softmax(
    slope: Any, share: Any, scale: Any, theta: Any, logs: Any, weight: Any, sums: Any, of_theta: Any
) -> None:
    """As above, with sums of slopes over rows: of those in η, and in ln θ, which are minus those
    in ln μ and −θ ``logs``."""
    for g in range(len(slope)):
        of_theta[g] -= weight * (slope[g] + theta[g] * logs[g])
        slope[g] -= share[g] * scale
        sums[g] += weight * slope[g]


@sums
def _of_logits(
    first: int, last: int, col: Any, value: Any, constant: Any, eta: Any, log_scale: Any
) -> Any:
    """Σ x ln μ and the constants, over the nonzeros of a row."""
    total = f32(0.0)
    for k in range(first, last):
        total += value[k] * (eta[np.uint32(col[k])] + log_scale) + constant[k]
    return total


@exact
def _add(total: Any, weight: Any, row: Any) -> None:
    for g in range(len(row)):
        total[g] += weight * row[g]


# --- likelihoods ----------------------------------------------------------------------------------


@exact
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
    weight: Any,
    log_theta: Any,
    logits: Any,
    inflated: bool,
    keep: bool,
    out: Any,
    slopes: Any,
    size_slopes: Any,
    eta_sums: Any,
    theta_sums: Any,
    logit_sums: Any,
    logit_slopes: Any,
) -> None:
    # There is room for the slopes and sums that are asked for, or for both of η's and ln θ's.
    n_genes, n_cells = eta.shape[1], len(starts) - 1
    theta = bounded(log_theta)
    inverse = f32(1.0) / theta
    tiny = log_theta.min() < -MOST_LOG_THETA
    share, logs, slope_row = np.empty(n_genes, f32), np.empty(n_genes, f32), np.empty(n_genes, f32)
    logit_row, pi, factor = np.empty(n_genes, f32), np.empty(n_genes, f32), np.empty(n_genes, f32)
    for r in range(first, last):
        cell = r % n_cells
        begin, end = np.uint64(starts[cell]), np.uint64(starts[cell + 1])
        slope = slopes[r] if keep else slope_row
        slope_logit = logit_slopes[r] if len(logit_slopes) else logit_row
        logit = logits[r % len(logits)] if inflated else eta[r]
        top, total, check = _exponentials(eta[r], share)
        scale = size[r] / total
        log_scale = f32(math.log(size[r]) - math.log(total) - top)
        # From logits, which survive where a share of the softmax does not, and before slopes
        # overwrite them.
        found = check + _of_logits(begin, end, col, value, constant, eta[r], log_scale)
        of_zeros, slope_sum = _zero_counts(share, scale, theta, inverse, slope, logs)
        if inflated:
            of_zeros, slope_sum = _inflate(logit, theta, logs, slope, slope_logit, pi, factor)
        for k in range(begin, end):
            g = np.uint32(col[k])
            x, theta_logs = value[k], theta[g] * logs[g]
            # −θμ/(θ+μ), the slope of a zero but for its inflation; ``part`` is μ/(θ+μ).
            if inflated:
                mu = share[g] * scale
                of_zero = -mu / (f32(1.0) + mu * inverse[g])
            else:
                of_zero = slope[g]
            log1p_at, part = logs[g], -of_zero * inverse[g]
            if tiny and log_theta[g] < -MOST_LOG_THETA:
                log_ratio = math.log(share[g] * scale) - log_theta[g]
                log1p_at = log_ratio if log_ratio > f32(15.0) else math.log1p(math.exp(log_ratio))
                part = f32(1.0) / (f32(1.0) + math.exp(-log_ratio))
            found -= x * log1p_at
            if inflated:
                found -= max(theta_logs + logit[g], f32(0.0))
                factor[g] = max(pi[g], f32(1.0) - pi[g])
                slope_logit[g] = -pi[g]
            new = of_zero + x * (f32(1.0) - part)
            slope_sum += new - slope[g]
            slope[g] = new
            # What sums of slopes in ln θ will make of it: θ times it, and the slope in ln μ.
            logs[g] -= (x + constant_slope[k]) * inverse[g]
        if inflated:
            found += _logarithms(factor)
        out[r] = found + of_zeros
        if keep:
            size_slopes[r] = slope_sum
        if len(theta_sums):
            if inflated:
                _thin(logs, slope_logit, pi)
            block = r // BLOCK
            sums = eta_sums[block], theta_sums[block]
            _summed_through_softmax(slope, share, slope_sum / total, theta, logs, weight[r], *sums)
        elif keep:
            _through_softmax(slope, share, slope_sum / total)
        if len(logit_sums):
            _add(logit_sums[r // BLOCK], weight[r], slope_logit)


@exact
def _poisson(
    first: int,
    last: int,
    eta: Any,
    starts: Any,
    col: Any,
    value: Any,
    constant: Any,
    size: Any,
    weight: Any,
    keep: bool,
    out: Any,
    slopes: Any,
    size_slopes: Any,
    eta_sums: Any,
) -> None:
    share = np.empty(eta.shape[1], f32)
    for r in range(first, last):
        cell = r % (len(starts) - 1)
        begin, end = np.uint64(starts[cell]), np.uint64(starts[cell + 1])
        top, total, check = _exponentials(eta[r], share)
        log_scale = math.log(size[r]) - math.log(total) - top
        found, counts = check - size[r], f32(0.0)
        for k in range(begin, end):
            found += value[k] * (eta[r, np.uint32(col[k])] + log_scale) - constant[k]
            counts += value[k]
        out[r] = found
        if keep:
            slopes[r] = f32(0.0)
            for k in range(begin, end):
                slopes[r, np.uint32(col[k])] = value[k]
            size_slopes[r] = counts - size[r]
            _through_softmax(slopes[r], share, counts / total)
        if len(eta_sums):
            _add(eta_sums[r // BLOCK], weight[r], slopes[r])


# --- from torch -----------------------------------------------------------------------------------


def negative_binomial(
    eta: Tensor,
    starts: Tensor,
    col: Tensor,
    value: Tensor,
    constant: Tensor,
    constant_slope: Tensor,
    size: Tensor,
    weight: Tensor,
    log_theta: Tensor,
    logit: Tensor | None,
    *,
    keep: bool,
    spare: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Slopes | None]:
    """log p of every row of ``eta``, (rows, genes), and with ``keep`` its slopes.

    Row r is a draw for cell r modulo the cells; ``size`` and ``weight`` are (rows,). ``logit`` is
    (genes,), or (rows, genes). Slopes in η take its place with ``spare``. ``wanted`` or not are the
    sum of slopes in η, and those in ln θ and the logit.
    """
    out, none = eta.new_empty(len(eta)), eta.new_empty(0, 0)
    slope, size_slope = _room(eta, keep, spare)
    of_each = logit is not None and logit.dim() > 1
    summed = keep and any(wanted[:2])
    sums = _sums(eta, summed), _sums(eta, summed)
    of_logit = keep and logit is not None and wanted[2]
    logit_sum = _sums(eta, of_logit and not of_each)
    each_logit = torch.empty_like(eta) if of_logit and of_each else none
    arrays = (starts, col, value, constant, constant_slope, size, weight, log_theta)
    logits = none if logit is None else logit.view(-1, eta.shape[1])
    room = (slope, size_slope, *sums, logit_sum, each_logit)
    over_rows(_negative_binomial, eta, *arrays, logits, logit is not None, keep, out, *room)
    if not keep:
        return out, None
    eta_sum, theta_sum = (
        _added(part) if want else None for part, want in zip(sums, wanted, strict=False)
    )
    own_logit = each_logit if of_each else _added(logit_sum)
    return out, Slopes(slope, size_slope, eta_sum, (theta_sum, own_logit)[: len(wanted) - 1])


def poisson(
    eta: Tensor,
    starts: Tensor,
    col: Tensor,
    value: Tensor,
    constant: Tensor,
    size: Tensor,
    weight: Tensor,
    *,
    keep: bool,
    spare: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Slopes | None]:
    """As :func:`negative_binomial`, without parameters of its own."""
    out, room = eta.new_empty(len(eta)), _room(eta, keep, spare)
    eta_sum = _sums(eta, keep and wanted[0])
    over_rows(_poisson, eta, starts, col, value, constant, size, weight, keep, out, *room, eta_sum)
    return out, Slopes(*room, _added(eta_sum)) if keep else None


def _room(eta: Tensor, keep: bool, spare: bool) -> tuple[Tensor, Tensor]:
    """Room for the slopes of each row in η and in ln ℓ."""
    if not keep:
        return eta.new_empty(0, 0), eta.new_empty(0)
    return eta if spare else torch.empty_like(eta), eta.new_empty(len(eta))


def _sums(eta: Tensor, wanted: bool) -> Tensor:
    """Room for sums over each block of rows."""
    return eta.new_zeros(-(-len(eta) // BLOCK) if wanted else 0, eta.shape[1])


def _added(sums: Tensor) -> Tensor | None:
    return sums.sum(0) if len(sums) else None
