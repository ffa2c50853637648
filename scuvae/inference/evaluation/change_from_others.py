"""What cells outside a comparison say of it.

A response that types share moves cells of all of them along the same latent direction, and cells
that are not compared tell which genes go with it: their counts, regressed on z (Poisson, log link,
a ridge on the slopes β, which are those of no other gene), predict the compared groups' change
m = βᵀ (z̄_A − z̄_B). The compared cells' counts have no part in β, so that their noise is not used
twice, as it would be by means that a decoder has smoothed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae.batches import Cells
from scuvae.batches.sparse_rows import dense

# At most so many cells, evenly spaced, and at least so many.
MOST, FEWEST = 20_000, 200
_CHUNK = 2048
_RIDGE = 1.0
_STEPS = 4


@dataclass(frozen=True)
class Slopes:
    """β, (latent, genes), and their covariances, (genes, latent, latent)."""

    beta: Tensor
    covariance: Tensor

    def change(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """m for a direction (latent,), and its variance by the counts; (genes,)."""
        variance = torch.einsum("i,gij,j->g", direction, self.covariance, direction)
        return direction @ self.beta, variance


@torch.no_grad()
def regress(cells: Cells, rows: Tensor, z: Tensor, genes: Tensor) -> Slopes:
    """Slopes of genes' log means in z, (cells, latent), over the cells ``rows``."""
    z = z - z[rows].mean(0)
    n_latent, n_genes = z.shape[1], len(genes)
    size = cells.size_factor[rows].sum()
    total = torch.zeros(n_genes, device=z.device)
    crossed = torch.zeros(1 + n_latent, n_genes, device=z.device)
    for batch in cells.loader(rows, _CHUNK):
        x = dense(batch.x)[:, genes]
        total += x.sum(0)
        crossed += _with_one(z[batch.index]).T @ x
    coefficient = torch.zeros_like(crossed)
    coefficient[0] = ((total + 0.5) / size).log()
    ridge = torch.full((1 + n_latent,), _RIDGE, device=z.device)
    ridge[0] = 1e-6
    precision = torch.zeros(())
    for _ in range(_STEPS):
        slope = crossed - ridge[:, None] * coefficient
        bend = torch.zeros((1 + n_latent) ** 2, n_genes, device=z.device)
        for index in rows.split(_CHUNK):
            f = _with_one(z[index])
            mu = (f @ coefficient).clamp(-30, 0).exp() * cells.size_factor[index][:, None]
            slope -= f.T @ mu
            bend += (f[:, :, None] * f[:, None]).flatten(1).T @ mu
        precision = bend.T.reshape(n_genes, 1 + n_latent, 1 + n_latent) + ridge.diag()
        step = torch.linalg.solve(precision.double(), slope.T.double()[..., None])[..., 0].T
        coefficient = coefficient + step.clamp(-1, 1).to(coefficient)
    covariance = torch.linalg.inv(precision.double())[:, 1:, 1:]
    return Slopes(coefficient[1:].double().cpu(), covariance.cpu())


def _with_one(z: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(z[:, :1]), z], 1)
