"""Pareto k-hat: how heavy the tail of importance weights is, from the weights themselves.

The largest weights are fitted with a generalized Pareto distribution by the quasi-Bayesian
estimator of Zhang & Stephens (Technometrics 2009), with the weak prior towards ½ of Vehtari,
Simpson, Gelman, Yao & Gabry (JMLR 2024): below .5 an importance-weighted mean has a finite
variance, above .7 it is not to be relied on.
"""

import math

import torch
from torch import Tensor

# The fewest tail weights that say anything of their shape.
_FEWEST = 5
_PRIOR_WEIGHT = 10


def tail_size(n_samples: int) -> int:
    """How many of the largest weights make up the tail: min(S/5, 3√S)."""
    return math.ceil(min(n_samples / 5, 3 * math.sqrt(n_samples)))


def pareto_k(log_weight: Tensor) -> Tensor:
    """k-hat of log weights (draws, cells), (cells,); NaN for fewer than 21 draws.

    0 where all weights are equal: there is no tail.
    """
    n = tail_size(len(log_weight))
    if n < _FEWEST or n >= len(log_weight):
        return torch.full_like(log_weight[0], math.nan)
    largest = (log_weight - log_weight.amax(0)).double().exp()
    largest = largest.topk(n + 1, dim=0).values.flip(0)  # rising
    excess = (largest[1:] - largest[0]).T
    flat = excess[:, -1] <= 1e-12
    k, _ = fit_generalized_pareto(torch.where(flat[:, None], torch.ones_like(excess), excess))
    k = (n * k + 0.5 * _PRIOR_WEIGHT) / (n + _PRIOR_WEIGHT)
    return torch.where(flat, 0.0, k).to(log_weight.dtype)


def fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale, (rows,) each, of each row of ``excess``, (rows, n), sorted and rising.

    Zhang & Stephens: a grid of b = −shape/scale, for each the best shape, averaged by their
    profile likelihood. The shape is positive for heavy tails.
    """
    n = excess.shape[-1]
    n_grid = 30 + int(math.sqrt(n))
    steps = torch.arange(1, n_grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[:, int(n / 4 + 0.5) - 1].clamp_min(torch.finfo(excess.dtype).tiny)
    b = (1 - (n_grid / (steps - 0.5)).sqrt()) / (3 * quartile.unsqueeze(-1))
    b = b + 1 / excess[:, -1:]
    shape = torch.log1p(-b.unsqueeze(-1) * excess.unsqueeze(-2)).mean(-1)
    profile = n * ((-b / shape).log() - shape - 1)
    b = (b * profile.nan_to_num(-math.inf).softmax(-1)).sum(-1, keepdim=True)
    shape = torch.log1p(-b * excess).mean(-1)
    return shape, -shape / b.squeeze(-1)
