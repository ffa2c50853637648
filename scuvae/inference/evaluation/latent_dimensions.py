"""How many latent dimensions are in use, whatever the rotation that a fit has ended in."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from scuvae.distributions.gaussian import Gaussian

# A dimension is active where posterior means vary by more (Burda, Grosse & Salakhutdinov, 2016).
ACTIVE = 0.01
# Cells whose means are taken in double precision at once.
_AT_ONCE = 2**16


class Dimensions(NamedTuple):
    """Along the principal axes of the posterior means, the widest first, (latent,) each.

    ``variance`` is that of the means, ``uncertainty`` the average of the cells' own variances,
    ``kl`` the average KL of their margins to N(0, 1), in nats.
    """

    variance: Tensor
    uncertainty: Tensor
    kl: Tensor

    @property
    def n_active(self) -> int:
        return int((self.variance > ACTIVE).sum())


def latent_dimensions(mean: Tensor, parts: Iterable[Gaussian]) -> Dimensions:
    """Of cells' posteriors, their means, (cells, latent), and q of some cells after others.

    Under N(0, I) a rotation of z changes nothing but what the axes are called, hence the principal
    ones: a dimension that is not needed has means near 0 and variances near 1.
    """
    n_cells = len(mean)
    centre = sum(some.double().sum(0) for some in mean.split(_AT_ONCE)) / n_cells
    centred = (some.double() - centre for some in mean.split(_AT_ONCE))
    scatter = sum(some.T @ some for some in centred)
    variance, axes = torch.linalg.eigh(scatter / max(1, n_cells - 1))
    axes = axes.flip(1)
    uncertainty, kl = torch.zeros_like(variance), torch.zeros_like(variance)
    for q in parts:
        own = torch.einsum("cij,ia->caj", q.scale_tril.double(), axes).square().sum(-1)
        at = q.mean.double() @ axes
        uncertainty += own.sum(0)
        kl += 0.5 * (at.square() + own - 1 - own.log()).sum(0)
    return Dimensions(variance.flip(0).clamp_min(0), uncertainty / n_cells, kl / n_cells)
