"""A score against its distribution over reference cells: residuals, and tail probabilities."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this share of the reference cells the tail is taken for exponential.
_TAIL = 0.1
# A covariate that varies by less says nothing but rounding, in its own units.
_CONSTANT = 1e-3
# E ln |N(0, 1)| = −(γ + ln 2)/2: what the log of a residual's size is below that of its scale.
_LOG_HALF_NORMAL = -0.6351814227
_TINY = 1e-12
# Reference cells of like depth: a kernel of this standard deviation in ranks, 0 to 1, but one that
# at least so many cells lie within.
_WIDTH, _FEWEST_ALIKE = 0.1, 20
# Cells whose weights are held at once.
_CHUNK = 512


@dataclass(frozen=True)
class Residual:
    """A score less its regression on covariates over reference cells, in standard deviations.

    The log of the scale is itself linear in the first covariate, within the reference's range.
    """

    centre: Tensor
    unit: Tensor
    location: Tensor
    scale: Tensor
    range: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, score: Tensor, covariates: Tensor) -> tuple["Residual", Tensor]:
        """The regression, and the reference cells' own residuals, each as if it were left out.

        Parameters
        ----------
        score
            Of the reference cells, (cells,), float64.
        covariates
            Of the same cells, (cells, covariates).
        """
        spread = covariates.std(0)
        unit = torch.where(spread > _CONSTANT, spread, torch.inf)
        self = cls(
            covariates.mean(0),
            unit,
            score.new_zeros(covariates.shape[1] + 1),
            score.new_zeros(2),
            (covariates[:, 0].amin(), covariates[:, 0].amax()),
        )
        design = self._design(covariates)
        inverse = torch.linalg.pinv(design)
        # Leaving cell i out of a linear regression divides its residual by 1 − h_i.
        leverage = (design * inverse.T).sum(1).clamp_max(0.99)
        residual = (score - design @ (inverse @ score)) / (1 - leverage)
        some = design[:, :2]
        log_size = residual.abs().clamp_min(_TINY * (1 + score.abs().mean())).log()
        slopes = torch.linalg.pinv(some) @ (log_size - _LOG_HALF_NORMAL)
        # One number, since residuals are not quite normal: the standardised ones have variance 1.
        variance = (residual / (some @ slopes).exp()).square().mean()
        slopes[0] += 0.5 * variance.clamp_min(_TINY).log()
        found = cls(self.centre, unit, inverse @ score, slopes, self.range)
        return found, residual / (some @ slopes).exp()

    def __call__(self, score: Tensor, covariates: Tensor) -> Tensor:
        """Standardised residuals of any cells, (cells,); near N(0, 1) for reference cells."""
        residual = score - self._design(covariates) @ self.location
        inside = covariates.clone()
        inside[:, 0] = inside[:, 0].clamp(*self.range)
        return residual / (self._design(inside)[:, :2] @ self.scale).exp()

    def _design(self, covariates: Tensor) -> Tensor:
        scaled = (covariates - self.centre) / self.unit
        return torch.cat([torch.ones_like(scaled[:, :1]), scaled], 1)


def standardised(score: Tensor, reference: Tensor) -> Tensor:
    """Distance from the reference cells' mean, in their standard deviations."""
    return (score - reference.mean()) / reference.std().clamp_min(_TINY)


@dataclass(frozen=True)
class DepthWeights:
    """What each reference cell weighs in the tails of each cell: more, the closer their depths.

    A Gaussian kernel over the depths' ranks among the reference cells, so that cells at the ends
    are compared with those at the ends, and cells beyond them too. Of few reference cells, all
    weigh about the same; of equal depths, they do exactly.
    """

    rank: Tensor
    reference: Tensor
    width: float
    itself: bool

    @classmethod
    def of(cls, depth: Tensor, reference: Tensor) -> "DepthWeights":
        """For cells of some depths, (cells,), and the reference's, (reference cells,).

        The reference cells' own, where ``depth is reference``, leave each itself out: then they
        are compared with others, as cells that are none of them are.
        """
        width = max(_WIDTH, _FEWEST_ALIKE / len(reference))
        ranks = _ranks(depth, reference), _ranks(reference, reference)
        return cls(*ranks, width, depth is reference)

    def __call__(self, rows: Tensor) -> Tensor:
        """Weights in (0, 1] of the reference cells for some cells, (rows, reference cells)."""
        apart = (self.rank[rows].unsqueeze(1) - self.reference) / self.width
        weight = (-0.5 * apart.square()).exp()
        if self.itself:
            weight[torch.arange(len(rows)), rows] = 0.0
        return weight


def _ranks(values: Tensor, reference: Tensor) -> Tensor:
    """Shares of the reference below each value, ties in the middle."""
    ordered = reference.sort().values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto).to(values) / (2 * len(ordered))


def combine(parts: Iterable[tuple[Tensor, Tensor]], weights: DepthWeights | None = None) -> Tensor:
    """−Σ ln P(score at least so high) over scores and their references, in nats (Fisher 1925)."""
    return -torch.stack([log_tail(score, reference, weights) for score, reference in parts]).sum(0)


def log_tail(score: Tensor, reference: Tensor, weights: DepthWeights | None = None) -> Tensor:
    """ln of the share of reference cells with a score at least so high, (cells,), below 0.

    Between reference cells by interpolation; above the highest tenth the tail is exponential with
    their mean excess (generalised Pareto of shape 0: Pickands, Annals of Statistics 1975), so
    that scores go on telling cells apart where no reference cell is left. With ``weights`` a
    reference cell counts for a cell by its weight there.
    """
    order = reference.argsort()
    parts = []
    for rows in torch.arange(len(score)).split(_CHUNK):
        weight = reference.new_ones(len(rows), len(order)) if weights is None else weights(rows)
        parts.append(_log_tail(score[rows], reference[order], weight[:, order]))
    return torch.cat(parts) if parts else score.clone()


def _log_tail(score: Tensor, ordered: Tensor, weight: Tensor) -> Tensor:
    n = len(ordered)
    # The weight of the reference cells from each one upwards, and of those above it.
    upwards = weight.flip(1).cumsum(1).flip(1)
    total = upwards[:, :1]
    # P(score ≥ ordered[k]) of a further cell of the same kind: (n − k) / (n + 1) of equal weights.
    share = upwards / (total + 1)
    n_tail = max(2, round(_TAIL * n))
    above = upwards - weight
    enough = above >= (1 - _TINY) * n_tail / n * total
    start = enough.sum(1, keepdim=True).clamp(1, n - 1) - 1
    threshold = ordered[start.squeeze(1)]
    beyond = weight * (ordered - threshold.unsqueeze(1)).clamp_min(0)
    excess = beyond.sum(1) / above.gather(1, start).squeeze(1).clamp_min(_TINY)
    at_start = share.gather(1, start).squeeze(1)
    tail = at_start.log() - (score - threshold) / excess.clamp_min(_TINY)

    right = torch.searchsorted(ordered, score).clamp(1, n - 1)
    low, high = ordered[right - 1], ordered[right]
    part = ((score - low) / (high - low).clamp_min(_TINY)).clamp(0, 1)
    before, after = (share.gather(1, k.unsqueeze(1)).squeeze(1) for k in (right - 1, right))
    body = torch.lerp(before, after, part).log()
    under = (score - ordered[0]) / ordered.std().clamp_min(_TINY)
    body = torch.where(under < 0, share[:, 0].log() * under.exp(), body)  # towards certainty
    return torch.where(score > threshold, tail, body)
