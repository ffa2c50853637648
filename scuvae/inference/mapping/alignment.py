"""What covariates do to the latent variable of cells of a kind, and cells as if told otherwise.

Decoders are told of covariates, but not all that a batch does to each kind of cell is in their
offsets: the rest is left in z. Over the cells' posterior means it is a mixture of regressions,

    z_i ~ Σ_k π_k N(c_k + W_kᵀ φ_i, Σ),    W_kj ~ N(0, t_g Σ),

with φ_i what the decoder is told of a cell (ones at its levels, standardised numbers), k kinds of
cells and t_g, for each covariate g, how much it does. π, c, Σ and t are of maximum likelihood by
expectation and maximisation, W by its mean: kinds that a level has few cells of keep what they
have. As if told φ', a cell is at z + Σ_k r_k W_kᵀ (φ' − φ), with r_k the chances that it is of k.

Cells by clusters, regressions within them: Harmony's way (Korsunsky et al., Nature Methods 2019;
new cells as Kang et al., Nature Communications 2021, place them). Here nothing rewards clusters for
being mixed, and what is taken out is shrunk by how clear it is: kinds that one batch alone has are
left where they are. What moves a kind by more than its own spread may be taken for another kind.
Of several such mixtures, with more and fewer kinds, the mean shift is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae._random import using
from scuvae.distributions.spread_out import spread_out
from scuvae.inference.mapping.embedding import evenly_spaced
from scuvae.model.covariates import Covariates, Design

# Cells that it is fitted to, and kinds.
_FEWEST_CELLS, _MOST_CELLS, _MOST_KINDS = 250, 16_384, 50
# Cells for each kind, of several mixtures whose shifts are averaged: one by itself shows borders
# of its clusters, which another seed's latent variable would have elsewhere.
CELLS_A_KIND = 60, 70, 80, 90, 100, 115, 130, 150, 175, 200
# Columns of covariates above which a kind has too few cells of a level to say anything.
LARGEST_DESIGN = 64
_ROUNDS = 15
# Starts of k-means, of which the best is kept, and rounds of each.
_STARTS, _FIRST_ROUNDS = 3, 20
_CHUNK = 2048
# Chances that are as good as none.
_TINY = 1e-4


@dataclass(frozen=True)
class Alignment:
    """Some mixtures of regressions.

    ``weight`` is (mixtures, kinds), each one's adding up to one, ``centre`` (..., kinds, latent),
    ``effect`` (..., kinds, columns, latent), ``factor`` (..., latent, latent) with
    factor factorᵀ = Σ⁻¹, and ``size`` (..., columns) t of each column's covariate.
    """

    weight: Tensor
    centre: Tensor
    effect: Tensor
    factor: Tensor
    size: Tensor

    @classmethod
    def of(cls, entry: Mapping[str, Any], like: Tensor) -> "Alignment":
        """From what :meth:`to_entry` gave, on the device of ``like`` and of its type."""
        return cls(*(torch.as_tensor(np.array(entry[name])).to(like) for name in _NAMES))

    def to_entry(self) -> dict[str, np.ndarray]:
        """As plain arrays."""
        return {name: getattr(self, name).cpu().numpy() for name in _NAMES}

    def responsibilities(self, z: Tensor, told: Tensor) -> Tensor:
        """r, (mixtures, cells, kinds), of cells at z that are told ``told``, (cells, columns)."""
        # In coordinates in which Σ is the identity.
        effect = self.effect @ self.factor.unsqueeze(1)
        left = (z @ self.factor).unsqueeze(2) - (self.centre @ self.factor).unsqueeze(1)
        left -= torch.einsum("np,mkpl->mnkl", told, effect)
        return (self.weight.log().unsqueeze(1) - 0.5 * left.square_().sum(3)).softmax(2)

    def effects(self, told: Tensor) -> Tensor:
        """What covariates add to z in each kind, (mixtures, cells, kinds, latent)."""
        return torch.einsum("np,mkpl->mnkl", told, self.effect)

    def added(self, r: Tensor, told: Tensor) -> Tensor:
        """What covariates add to z, (cells, latent), the mean over mixtures."""
        return torch.einsum("mnk,mnkl->nl", r, self.effects(told)) / len(r)

    def aligned(self, mean: Tensor, covariates: Covariates) -> Tensor:
        """Posterior means less what the cells' covariates add, (cells, latent)."""
        out = torch.empty_like(mean)
        there = covariates.to(mean.device)
        for rows in torch.arange(len(mean), device=mean.device).split(_CHUNK):
            z, told = mean[rows], there.rows(rows).to(mean)
            out[rows] = z - self.added(self.responsibilities(z, told), told)
        return out

    @torch.no_grad()
    def with_levels(self, known: Design, mean: Tensor, covariates: Covariates) -> "Alignment":
        """With further levels behind each covariate's own, what they add estimated from cells.

        ``known`` is the design so far, ``covariates`` are the cells' under one that extends it. All
        else stays: W of a new level is its mean given r, and r given W, in turn.
        """
        design = covariates.design
        parts: list[Tensor] = []
        sizes: list[Tensor] = []
        new: list[int] = []
        for number, (few, many) in enumerate(zip(known.n_levels, design.n_levels, strict=True)):
            columns = known.columns_of(number)
            part, size = self.effect[:, :, columns], self.size[:, columns]
            parts += [part, part.new_zeros(*part.shape[:2], many - few, part.shape[3])]
            sizes += [size, size[:, :1].expand(-1, many - few)]
            first = design.columns_of(number).start
            new += range(first + few, first + many)
        parts.append(self.effect[:, :, sum(known.n_levels) :])
        sizes.append(self.size[:, sum(known.n_levels) :])
        found = replace(self, effect=torch.cat(parts, 2), size=torch.cat(sizes, 1))
        index = evenly_spaced(mean, _MOST_CELLS)
        z, told = mean[index], covariates.to(mean.device).rows(index).to(mean)
        for _ in range(_ROUNDS if new else 0):
            r = found.responsibilities(z, told)
            effect = found.effect.clone()
            for column in new:
                mine = told[:, column] > 0
                others = told[mine].clone()
                others[:, column] = 0.0
                left = z[mine].unsqueeze(1) - found.centre.unsqueeze(1) - found.effects(others)
                total = r[:, mine].sum(1) + 1 / found.size[:, column, None]
                pull = torch.einsum("mnk,mnkl->mkl", r[:, mine], left)
                effect[:, :, column] = pull / total.unsqueeze(2)
            found = replace(found, effect=effect)
        return found


def aligned(mean: Tensor, saved: Mapping[str, Any], covariates: Covariates | None) -> Tensor:
    """Posterior means as a map that was ``saved`` has them: less what the cells' covariates add."""
    if covariates is None or "alignment" not in saved:
        return mean
    return Alignment.of(saved["alignment"], mean).aligned(mean, covariates)


_NAMES = ("weight", "centre", "effect", "factor", "size")


@torch.no_grad()
def fit_alignment(mean: Tensor, covariates: Covariates, metric: Tensor) -> Alignment | None:
    """Mixtures of regressions of posterior means, (cells, latent), on covariates.

    From all cells, or evenly spaced ones where there are many. ``metric``, (latent, latent), gives
    the distances by which kinds are first told apart. None where there are too few cells, or too
    many columns.
    """
    design = covariates.design
    index = evenly_spaced(mean, _MOST_CELLS)
    if len(index) < _FEWEST_CELLS or design.n_columns > LARGEST_DESIGN:
        return None
    n_kinds = [min(max(len(index) // n, 2), _MOST_KINDS) for n in CELLS_A_KIND]
    z = mean[index].cpu().double()
    told = covariates.to(mean.device).rows(index).cpu().double()
    points = z @ torch.linalg.cholesky(metric.cpu().double())
    groups = design.columns_of_each()
    mixtures = []
    for n in n_kinds:
        r = _clusters(points, n)
        size = z.new_ones(design.n_columns)
        precision = torch.linalg.inv(_within(z, r))
        for _ in range(_ROUNDS):
            found, precision = maximised(z, told, r, groups, size, precision)
            size = found.size[0]
            r = found.responsibilities(z, told)[0]
        mixtures.append(found)
    return Alignment.of(_together(mixtures).to_entry(), mean)


def _together(mixtures: list[Alignment]) -> Alignment:
    """One of several, those of fewer kinds with kinds of no weight."""
    most = max(one.weight.shape[1] for one in mixtures)
    wide = []
    for one in mixtures:
        lacks = most - one.weight.shape[1]
        weight = torch.nn.functional.pad(one.weight, (0, lacks))
        centre = torch.nn.functional.pad(one.centre, (0, 0, 0, lacks))
        effect = torch.nn.functional.pad(one.effect, (0, 0, 0, 0, 0, lacks))
        wide.append(replace(one, weight=weight, centre=centre, effect=effect))
    return Alignment(*(torch.cat([getattr(one, name) for one in wide]) for name in _NAMES))


def _clusters(points: Tensor, n: int) -> Tensor:
    """k-means, the same of the same points: (points, n) of zeros and ones."""
    found, least = torch.zeros(len(points), n).to(points), float("inf")
    with using(torch.Generator().manual_seed(0)):
        starts = [points[spread_out(points, n)] for _ in range(_STARTS)]
    for centre in starts:
        for _ in range(_FIRST_ROUNDS):
            apart, nearest = torch.cdist(points, centre).min(1)
            r = torch.nn.functional.one_hot(nearest, n).to(points)
            total = r.sum(0).unsqueeze(1)
            centre = torch.where(total > 0, r.T @ points / total.clamp_min(1), centre)
        if float(apart.square().sum()) < least:
            found, least = r, float(apart.square().sum())
    return found


def _within(z: Tensor, r: Tensor) -> Tensor:
    """The covariance within clusters, and a little of the whole one."""
    left = z - r @ (r.T @ z / r.sum(0).clamp_min(1).unsqueeze(1))
    return left.T @ left / len(z) + 1e-3 * torch.cov(z.T).reshape(z.shape[1], -1)


def maximised(
    z: Tensor, told: Tensor, r: Tensor, groups: list[slice], size: Tensor, precision: Tensor
) -> tuple[Alignment, Tensor]:
    """A step of maximisation: the mixture and Σ⁻¹.

    ``size`` and ``precision`` are those of the step before.
    """
    n, n_latent = z.shape
    n_kinds, n_columns = r.shape[1], told.shape[1]
    design = torch.cat([z.new_ones(n, 1), told], 1)
    penalty = torch.cat([z.new_full((1,), 1e-6), 1 / size]).diag()
    xx = z.new_zeros(n_kinds, 1 + n_columns, 1 + n_columns)
    xz = z.new_zeros(n_kinds, 1 + n_columns, n_latent)
    left = z.new_zeros(n_latent, n_latent)
    for k in range(n_kinds):
        mine = (r[:, k] > _TINY).nonzero().squeeze(1)
        x, y, weight = design[mine], z[mine], r[mine, k].unsqueeze(1)
        weighted = (weight * x).T
        xx[k], xz[k] = weighted @ x, weighted @ y
        left += (weight * y).T @ y
    inverse = torch.linalg.inv(xx + penalty)
    found = inverse @ xz
    variance = inverse.diagonal(dim1=1, dim2=2)[:, 1:]
    explained = found.mT @ xz
    left += (found.mT @ xx @ found - explained - explained.mT).sum(0)
    effect = found[:, 1:]
    spread = torch.einsum("kpa,ab,kpb->kp", effect, precision, effect) / n_latent + variance
    size = size.clone()
    for columns in groups:
        size[columns] = spread[:, columns].mean().clamp_min(1e-8)
    precision = torch.linalg.inv(left / n + 1e-6 * torch.eye(n_latent).to(z))
    factor = torch.linalg.cholesky(precision)
    weight = r.sum(0) + 1e-3
    parts = (weight / weight.sum(), found[:, 0], effect, factor, size)
    return Alignment(*(part.unsqueeze(0) for part in parts)), precision
