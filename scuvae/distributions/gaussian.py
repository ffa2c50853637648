"""The Gaussian q(z) of cells: its draws, its density, its families, its unconstrained parameters.

``raw`` parametrises the scale: L numbers through softplus for a diagonal covariance, or the
L(L+1)/2 entries of a lower-triangular factor C, row by row, with softplus on its diagonal, for a
full one (Σ = C Cᵀ). Its width alone tells the two apart (with L = 1 they are one).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.nn import functional as F

from scuvae.kernels.dispatch import asks_gradient, compiled

COVARIANCES = ("full", "diagonal")

# The smallest scale: KL and log q stay finite in float32.
_MIN_SCALE = 1e-6
_LOG_2PI = math.log(2 * math.pi)


def n_scale_parameters(n_latent: int, covariance: str) -> int:
    return n_latent * (n_latent + 1) // 2 if covariance == "full" else n_latent


class Gaussian(Distribution):
    """N(m, C Cᵀ) of every cell, batch shape (..., cells), event shape (latent,).

    Parameters
    ----------
    mean
        m, (..., cells, latent).
    factor
        The lower-triangular C, (..., cells, latent, latent): the family ``"full"``. Or standard
        deviations, of the shape of the mean: ``"diagonal"``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        self.loc, self.factor = mean, factor
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    @classmethod
    def of(cls, mean: Tensor, raw: Tensor) -> "Gaussian":
        """From means, (cells, latent), and unconstrained parameters of their scale."""
        n_latent = mean.shape[-1]
        if raw.shape[-1] == n_latent:
            return cls(mean, F.softplus(raw).clamp_min(_MIN_SCALE))
        return cls(mean, _factor(raw, n_latent))

    @property
    def full(self) -> bool:
        return self.factor.dim() > self.loc.dim()

    @property
    def family(self) -> str:
        """``"full"`` or ``"diagonal"``: its covariance's."""
        return "full" if self.full else "diagonal"

    @property
    def raw(self) -> Tensor:
        """The parameters that :meth:`of` turns into its scale."""
        if not self.full:
            return _inverse_softplus(self.factor)
        diagonal = _inverse_softplus(self.factor.diagonal(dim1=-2, dim2=-1))
        return pack(self.factor.tril(-1) + torch.diag_embed(diagonal))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.factor.square().sum(-1) if self.full else self.factor.square()

    @property
    def stddev(self) -> Tensor:
        return self.variance.sqrt() if self.full else self.factor

    @property
    def scale_tril(self) -> Tensor:
        """C, also of a diagonal one."""
        return self.factor if self.full else torch.diag_embed(self.factor)

    @property
    def covariance_matrix(self) -> Tensor:
        return self.factor @ self.factor.mT if self.full else torch.diag_embed(self.variance)

    @property
    def precision_matrix(self) -> Tensor:
        """Λ = (C Cᵀ)⁻¹."""
        if self.full:
            return torch.cholesky_inverse(self.factor)
        return torch.diag_embed(self.variance.reciprocal())

    @property
    def log_det(self) -> Tensor:
        """ln |C|, (..., cells)."""
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1) if self.full else self.factor
        return diagonal.log().sum(-1)

    def draw(self, points: Tensor) -> Tensor:
        """m + C ε: the draws that points of N(0, I) stand for, (samples, 1 or cells, latent)."""
        return self.loc + self.spread(points)

    def draw_own(self, noise: Tensor) -> Tensor:
        """The same for points of each cell's own, (..., cells, latent), compiled if possible."""
        mean, factor = self.loc, self.factor
        plain = self.full and mean.dim() == 2 and compiled(mean)
        if not plain or asks_gradient(mean, factor):
            return self.draw(noise)
        from scuvae.kernels.gaussian import draw as compiled_draw

        return compiled_draw(mean.detach().contiguous(), factor.detach().contiguous(), noise)

    def spread(self, points: Tensor) -> Tensor:
        """C ε: where draws lie around the mean."""
        if self.full:
            return (self.factor @ points.unsqueeze(-1)).squeeze(-1)
        return self.factor * points

    def whiten(self, z: Tensor) -> Tensor:
        """C⁻¹ (z − m): the points that draws stand for."""
        left = z - self.loc
        if not self.full:
            return left / self.factor
        factor = self.factor.expand(*left.shape, left.shape[-1])
        return torch.linalg.solve_triangular(factor, left.unsqueeze(-1), upper=False).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_of_points(self.whiten(value))

    def log_prob_of_points(self, points: Tensor) -> Tensor:
        """ln q of the draws that points of N(0, I) stand for, (..., cells)."""
        return -0.5 * (points.square() + _LOG_2PI).sum(-1) - self.log_det

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        points = self.loc.new_empty(self._extended_shape(torch.Size(sample_shape))).normal_()
        return self.draw(points)

    def entropy(self) -> Tensor:
        return 0.5 * self.loc.shape[-1] * (1 + _LOG_2PI) + self.log_det

    def __getitem__(self, rows: Any) -> "Gaussian":
        """Of some cells."""
        return Gaussian(self.loc[rows], self.factor[rows])

    def moved(self, by: Tensor) -> "Gaussian":
        """The same scale around other means."""
        return Gaussian(self.loc + by, self.factor)

    def detach(self) -> "Gaussian":
        return Gaussian(self.loc.detach(), self.factor.detach())

    def to(self, like: Tensor | torch.device | torch.dtype) -> "Gaussian":
        """On a device, or of a type of numbers."""
        return Gaussian(self.loc.to(like), self.factor.to(like))

    def as_family(self, covariance: str) -> "Gaussian":
        """As a member of a family: a diagonal one is full too; a full one keeps its margins."""
        if self.family == covariance:
            return self
        return Gaussian(self.loc, self.scale_tril if covariance == "full" else self.stddev)

    def as_torch(self) -> Distribution:
        """As one of torch's own distributions."""
        if self.full:
            return MultivariateNormal(self.loc, scale_tril=self.factor, validate_args=False)
        normal = Normal(self.loc, self.factor, validate_args=False)
        return Independent(normal, 1, validate_args=False)


def _factor(raw: Tensor, n_latent: int) -> Tensor:
    """C of a full covariance."""
    if raw.dim() == 2 and compiled(raw) and not asks_gradient(raw):
        from scuvae.kernels.gaussian import unpack as compiled_unpack

        return compiled_unpack(raw.contiguous(), n_latent, _MIN_SCALE)
    _, on_diagonal = _layout(n_latent, raw.device)
    positive = F.softplus(raw).clamp_min(_MIN_SCALE)
    return unpack(torch.where(on_diagonal, positive, raw), n_latent)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def pack(tril: Tensor) -> Tensor:
    """Lower triangles (..., L, L) as rows (..., L(L+1)/2), row-major."""
    i, j = torch.tril_indices(tril.shape[-1], tril.shape[-1], device=tril.device)
    return tril[..., i, j]


def unpack(packed: Tensor, n_latent: int) -> Tensor:
    """The inverse of :func:`pack`, zero above the diagonal."""
    position, _ = _layout(n_latent, packed.device)
    square = F.pad(packed, (0, 1)).index_select(-1, position)
    return square.view(*packed.shape[:-1], n_latent, n_latent)


@lru_cache(maxsize=64)
def _layout(n_latent: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each entry of a square stands in its packed triangle, with the one past the end for
    zeros, (L²,); and which packed entries are on the diagonal.
    """
    i, j = torch.tril_indices(n_latent, n_latent)
    position = torch.full((n_latent, n_latent), len(i))
    position[i, j] = torch.arange(len(i))
    return position.flatten().to(device), (i == j).to(device)


def select(options: Sequence[Gaussian], choice: Tensor) -> Gaussian:
    """For each cell the distribution, all of one family, that ``choice``, (cells,), names."""
    cells = torch.arange(len(choice), device=choice.device)
    mean = torch.stack([q.mean for q in options])[choice, cells]
    return Gaussian(mean, torch.stack([q.factor for q in options])[choice, cells])


def concatenate(parts: Sequence[Gaussian]) -> Gaussian:
    """One distribution over the cells of several batches, in order."""
    return Gaussian(torch.cat([q.mean for q in parts]), torch.cat([q.factor for q in parts]))


def moments(
    parts: Iterable[Gaussian],
    covariance: str,
    room: Callable[[int], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Means, scales and, where it is full, packed covariances of q, over parts of the cells.

    A part at a time: factors and covariances of all cells at once would outweigh their table.
    ``room`` makes zeros for all cells, by the number of columns; None: in memory.
    """
    found: dict[str, list[np.ndarray]] = {"mean": [], "scale": []}
    if covariance == "full":
        found["covariance"] = []
    tables: dict[str, np.ndarray] = {}
    at = 0
    for q in parts:
        some = {"mean": q.mean, "scale": q.stddev}
        if covariance == "full":
            some["covariance"] = pack(q.covariance_matrix)
        for name, tensor in some.items():
            values = _array(tensor)
            if room is None:
                found[name].append(values)
                continue
            if name not in tables:
                tables[name] = room(values.shape[1])
            tables[name][at : at + len(values)] = values
        at += len(q.mean)
    if room is not None:
        return tables
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=np.float32)
