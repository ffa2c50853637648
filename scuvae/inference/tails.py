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


def combine(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """−Σ ln P(score at least so high) over scores and their references, in nats (Fisher 1925)."""
    return -torch.stack([log_tail(score, reference) for score, reference in parts]).sum(0)


def log_tail(score: Tensor, reference: Tensor) -> Tensor:
    """ln of the share of reference cells with a score at least so high, (cells,), below 0.

    Between reference cells by interpolation; above the highest tenth the tail is exponential with
    their mean excess (generalised Pareto of shape 0: Pickands, Annals of Statistics 1975), so
    that scores go on telling cells apart where no reference cell is left.
    """
    ordered = reference.sort().values
    n = len(ordered)
    n_tail = max(2, round(_TAIL * n))
    threshold = ordered[n - n_tail - 1]
    excess = (ordered[n - n_tail :] - threshold).mean().clamp_min(_TINY)
    # P(score ≥ ordered[k]) of a further cell of the same kind is (n − k) / (n + 1).
    share = (n - torch.arange(n).to(ordered)) / (n + 1)
    right = torch.searchsorted(ordered, score).clamp(1, n - 1)
    low, high = ordered[right - 1], ordered[right]
    part = ((score - low) / (high - low).clamp_min(_TINY)).clamp(0, 1)
    body = torch.lerp(share[right - 1], share[right], part).log()
    tail = share[n - n_tail - 1].log() - (score - threshold) / excess
    under = (score - ordered[0]) / reference.std().clamp_min(_TINY)
    body = torch.where(under < 0, share[0].log() * under.exp(), body)  # towards certainty
    return torch.where(score > threshold, tail, body)
