"""Two groups' counts of each gene compared, donors or cells being the replicates.

A unit is what a donor has of a group: the gene's total y over its cells, the exposure e, and the
relative variance κ of that total beyond a Poisson's that its finite number of cells gives. Given
the log ratio δ of the groups' means, y has mean e exp(β₀ + δ [in A]) and, for the spread τ² of
donors about their group, relative variance τ² + κ: negative binomial. β₀ is a stratum's, and
profiled out. Where a donor is in both groups, its own level is conditioned away: of its total
y_A + y_B the part y_A is beta-binomial, with variance 2 τ² + κ_A + κ_B of the logit.

τ² differs by gene and donors are few: its distribution over genes, on a grid, is estimated from all
of them, and what a gene says of its own is weighed against that (empirical Bayes, as limma's
moderated t: Smyth 2004, with the prior's shape left open). Tails are those of the signed root of
the likelihood ratio, good down to a few counts, averaged over the gene's τ².
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Standard deviations of donors' log means, for which the grid has weights.
SPREADS = torch.tensor(
    [0.005, 0.03, 0.06, 0.09, 0.12, 0.17, 0.24, 0.33, 0.45, 0.6, 0.85, 1.2, 1.7, 2.5]
)
# Nodes of δ about each gene's rough estimate, in its standard errors.
_NODES = torch.linspace(-6, 6, 25, dtype=torch.float64)
_NEWTON = 8
# Genes' worth of belief in each spread.
_SMOOTHING = 1.0
_GENES = 256
# Of genes' residuals: where they are cut off, where they are of other genes, and the spread of
# donors that they are measured by.
_BOUND, _REJECTED, _TYPICAL = 0.7, 2.5, 0.2
_LEAST = 1e-8


@dataclass(frozen=True)
class Units:
    """What is compared: counts, (units, genes), exposures, (units,), and extra variances.

    ``in_first`` says which units are the first group's, ``stratum`` which share a level β₀, and
    ``pair`` numbers the donors who are in both groups, −1 for the others.
    """

    counts: Tensor
    exposure: Tensor
    variance: Tensor
    in_first: Tensor
    stratum: Tensor
    pair: Tensor

    def of(self, genes: Tensor) -> "Units":
        """Some of the genes."""
        some = (self.counts[:, genes], self.variance[:, genes])
        return replace(self, counts=some[0], variance=some[1])

    def scaled(self, factor: Tensor) -> "Units":
        """With exposures times ``factor``, (units,)."""
        return replace(self, exposure=self.exposure * factor)


@dataclass(frozen=True)
class Evidence:
    """Of each gene: the estimate of δ, a standard error that says as much against zero as p does,
    ln p of δ = 0 (two-sided), and the part of δ̂'s variance that is its counts' (genes,)."""

    change: Tensor
    scale: Tensor
    log_p: Tensor
    by_counts: Tensor


class Comparison:
    """log L(δ, τ²) of some genes: the beta-binomials of pairs, the negative binomials of others."""

    def __init__(self, units: Units, genes: slice) -> None:
        y, kappa, log_e = units.counts[:, genes], units.variance[:, genes], units.exposure.log()
        first, paired = units.in_first, units.pair >= 0
        a = (paired & first).nonzero()[:, 0]
        b = (paired & ~first).nonzero()[:, 0]
        a, b = a[units.pair[a].argsort()], b[units.pair[b].argsort()]
        self.y_a, self.y_b = y[a], y[b]
        self.offset = (log_e[a] - log_e[b])[:, None]
        self.kappa_pair = kappa[a] + kappa[b]
        alone = ~paired
        self.y, self.log_e, self.kappa = y[alone], log_e[alone, None], kappa[alone]
        self.first = first[alone].to(y)[:, None]
        kinds = units.stratum[alone]
        self.strata = (kinds == kinds.unique()[:, None]).to(y)  # (strata, units)

    def log_likelihood(self, change: Tensor, spread: float) -> Tensor:
        """At ``change``, (nodes, genes), for donors' ``spread`` τ: (nodes, genes)."""
        out = torch.zeros_like(change)
        if len(self.y_a):
            out = out + self._pairs(change, spread)
        if len(self.y):
            out = out + self._others(change, spread)
        return out

    def _pairs(self, change: Tensor, spread: float) -> Tensor:
        variance = (2 * spread**2 + self.kappa_pair).clamp_min(1e-6)
        logit = self.offset + change[:, None]
        p, q = logit.sigmoid(), (-logit).sigmoid()
        alpha, beta = 1 / (variance * q), 1 / (variance * p)  # s p and s q, s = 1 / (v p q)
        n = self.y_a + self.y_b
        return (
            (self.y_a + alpha).lgamma()
            - alpha.lgamma()
            + (self.y_b + beta).lgamma()
            - beta.lgamma()
            + (alpha + beta).lgamma()
            - (n + alpha + beta).lgamma()
        ).sum(1)

    def _others(self, change: Tensor, spread: float) -> Tensor:
        phi = (spread**2 + self.kappa).clamp_min(1e-6)
        fixed = self.log_e + change[:, None] * self.first  # (nodes, units, genes)
        of = self.strata
        total, exposed = of @ self.y, of @ fixed.exp()
        level = ((total + 0.1) / exposed).log()  # (nodes, strata, genes)
        for _ in range(_NEWTON):
            mu = (fixed + of.T @ level).exp()
            weight = 1 / (1 + phi * mu)
            slope, bend = of @ ((self.y - mu) * weight), of @ (mu * weight)
            level = level + (slope / bend.clamp_min(_LEAST)).clamp(-1, 1)
            level = level.clamp_min(-40)
        mu = (fixed + of.T @ level).exp()
        shape = 1 / phi
        log_p = (
            (self.y + shape).lgamma()
            - shape.lgamma()
            + self.y * (mu * phi).clamp_min(1e-300).log()
            - (self.y + shape) * (mu * phi).log1p()
        ).sum(1)
        # Laplace's part of an integral over β₀: the profile alone makes τ² too small.
        bend = (of @ (mu / (1 + phi * mu))).clamp_min(0.1)
        return log_p - 0.5 * bend.log().sum(1)

    def rough(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        """δ from totals with half a count more, (genes,), and its error at each spread."""
        first, other = self.first, 1 - self.first
        y_a = self.y_a.sum(0) + (first * self.y).sum(0)
        y_b = self.y_b.sum(0) + (other * self.y).sum(0)
        estimates, weights = [], []
        if len(self.y_a):
            expected = (self.y_a + self.y_b).sum(0).clamp_min(1)
            p = (self.offset.sigmoid() * (self.y_a + self.y_b)).sum(0) / expected
            p = p.clamp(1e-6, 1 - 1e-6)
            logit = ((self.y_a.sum(0) + 0.5) / (self.y_b.sum(0) + 0.5)).log() - (p / (1 - p)).log()
            estimates.append(logit)
            weights.append(torch.full_like(logit, float(len(self.y_a))))
        if len(self.y):
            e = self.log_e.exp()
            ratio = ((first * self.y).sum(0) + 0.5).log() - ((other * self.y).sum(0) + 0.5).log()
            ratio = ratio - ((first * e).sum() / (other * e).sum().clamp_min(_LEAST)).log()
            estimates.append(ratio)
            weights.append(torch.full_like(ratio, 0.5 * len(self.y)))
        weight = torch.stack(weights)
        change = (torch.stack(estimates) * weight).sum(0) / weight.sum(0)
        n = weight.sum(0)
        kappa = (self.kappa_pair.sum(0) + self.kappa.sum(0)) / n.square()
        counts = 1 / (y_a + 0.5) + 1 / (y_b + 0.5)
        return change, (counts + kappa + 2 * spread[:, None] ** 2 / n).sqrt()


def composition(units: Units, n_steps: int = 20) -> Tensor:
    """By how much each unit's exposure is off for most genes: its logarithm, (units,).

    A few strong genes that change take from all others' shares. Of residuals of square roots about
    the units' common shares, which few counts do not skew: first bounded (Huber), then with no
    weight for genes that differ (Tukey's biweight).
    """
    y, kappa = units.counts, units.variance
    share = y.sum(0) / units.exposure.sum()
    log_ratio = torch.zeros_like(units.exposure)
    for step in range(n_steps):
        mu = units.exposure[:, None] * log_ratio.exp()[:, None] * share
        slope = mu / (mu + (kappa + _TYPICAL**2) * mu.square()).clamp_min(_LEAST).sqrt()
        root = (y + 0.375).sqrt() - (mu + 0.375).sqrt()
        residual = 2 * root * slope / mu.clamp_min(_LEAST).sqrt()
        if step < n_steps // 2:
            weight = (_BOUND / residual.abs().clamp_min(_LEAST)).clamp_max(1)
        else:
            weight = (1 - (residual / _REJECTED).square()).clamp_min(0).square()
        pull = (weight * residual * slope).sum(1)
        log_ratio = log_ratio + pull / (weight * slope.square()).sum(1).clamp_min(_LEAST)
        share = (y / (units.exposure * log_ratio.exp())[:, None]).mean(0)
    return log_ratio - log_ratio.mean()


def compare(units: Units, *, donors: bool) -> Evidence:
    """The evidence of each gene for a change from the second group to the first.

    ``donors``: units spread about their groups; else they are all there is, and τ² = 0.
    """
    spreads = SPREADS.double() if donors else torch.zeros(1, dtype=torch.float64)
    n_genes = units.counts.shape[1]
    parts = [
        _evaluate(Comparison(units, slice(start, start + _GENES)), spreads)
        for start in range(0, n_genes, _GENES)
    ]
    change, error, root, log_l = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    weight = _posterior_of_spread(log_l)
    log_p = (weight.log() + torch.special.log_ndtr(-root.abs())).logsumexp(0) + math.log(2)
    log_p = log_p.clamp_max(0)
    mean = (weight * change).sum(0)
    z = normal_quantile(log_p)
    # δ̂ / z, but where z says nothing.
    scale = torch.where(
        z > 0.3, mean.abs() / z.clamp_min(0.3), (weight * error.square()).sum(0).sqrt()
    )
    first = units.in_first
    by_counts = sum(1 / units.counts[side].sum(0).clamp_min(0.5) for side in (first, ~first))
    return Evidence(mean, scale.clamp_min(_LEAST), log_p, by_counts / scale.square())


def normal_quantile(log_p: Tensor) -> Tensor:
    """|z| of which a two-sided p has this logarithm, however small."""
    one_sided = log_p - math.log(2)
    z = (-2 * one_sided).sqrt()
    for _ in range(20):
        log_tail = torch.special.log_ndtr(-z)
        hazard = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - log_tail).exp()
        z = (z + (log_tail - one_sided) / hazard).clamp_min(0)
    return z


def _evaluate(comparison: Comparison, spreads: Tensor) -> tuple[Tensor, ...]:
    """At each spread δ's estimate, its error, the signed root at 0, ln ∫ L dδ; (spreads, genes)."""
    centre, widths = comparison.rough(spreads)
    rows = []
    for spread, width in zip(spreads.tolist(), widths, strict=True):
        nodes = centre + _NODES[:, None] * width
        log_l = comparison.log_likelihood(torch.cat([nodes, torch.zeros_like(nodes[:1])]), spread)
        log_l, zero = log_l[:-1], log_l[-1]
        top = log_l.argmax(0, keepdim=True).clamp(1, len(_NODES) - 2)
        low, mid, high = (log_l.gather(0, top + i)[0] for i in (-1, 0, 1))
        step = width * float(_NODES[1] - _NODES[0])
        bend = (2 * mid - low - high).clamp_min(1e-6)
        shift = (0.5 * (high - low) / bend).clamp(-1, 1)
        change = nodes.gather(0, top)[0] + shift * step
        peak = torch.maximum(mid + 0.25 * (high - low) * shift, log_l.amax(0))
        root = (2 * (peak - zero)).clamp_min(0).sqrt() * change.sign()
        rows.append((change, step / bend.sqrt(), root, log_l.logsumexp(0) + step.log()))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def _posterior_of_spread(log_l: Tensor, n_steps: int = 200) -> Tensor:
    """Weights of the spreads, (spreads, genes), under the distribution that genes have together."""
    likelihood = (log_l - log_l.amax(0)).exp()
    prior = torch.full((len(log_l), 1), 1 / len(log_l), dtype=log_l.dtype)
    for _ in range(n_steps):
        weight = prior * likelihood
        weight = weight / weight.sum(0)
        prior = weight.sum(1, keepdim=True) + _SMOOTHING
        prior = prior / prior.sum()
    weight = prior * likelihood
    return weight / weight.sum(0)
