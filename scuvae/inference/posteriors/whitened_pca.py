"""A whitened PCA of a sparse matrix: where the means of cells start."""

import torch
from torch import Tensor

from scuvae._random import normal_like
from scuvae.batches import Batch, SparseRows

# Enough cells to find the leading components by; the others are projected on them.
MOST_CELLS = 20_000


class WhitenedPCA:
    """Principal components scaled to unit variance, fitted to one batch and applied to any.

    A profile enters as log(1 + x · median / ℓ) of counts; values as they are. The matrix is centred
    implicitly and never densified; torch's current random state seeds the randomised method.
    """

    def __init__(self, batch: Batch, n_latent: int, *, inputs: str) -> None:
        self.inputs = inputs
        self.target = batch.size_factor.median()
        x = self._values(batch)
        n_cells, n_vars = x.shape
        # What covariates say by least squares, of a batch its mean: it is not for z to span. The
        # columns of one categorical covariate add up to one, which the intercept would be.
        member = batch.covariates
        self.intercept = member is None or not bool((member.sum(1) == 1).all())
        told = self._told(batch)
        sums, gram = (x.mT @ told).mT, told.mT @ told
        own = gram.diagonal()
        if gram.count_nonzero() == own.count_nonzero():
            self.centre = sums / own.clamp_min(1.0).unsqueeze(1)
        else:
            self.centre = (torch.linalg.pinv(gram.double(), hermitian=True) @ sums.double()).to(x)
        rank = min(n_latent, n_cells, n_vars)
        singular, right = _leading(x, told, self.centre, rank)
        scale = singular / n_cells**0.5
        # Components without variance start at zero rather than at noise blown up.
        inverse = torch.where(scale > 1e-6 * scale[0].clamp_min(1e-12), 1 / scale, 0.0)
        self.basis = torch.zeros(n_vars, n_latent, dtype=x.dtype, device=x.device)
        self.basis[:, :rank] = right * inverse

    def __call__(self, batch: Batch) -> Tensor:
        """Whitened scores of the batch's cells, (cells, latent)."""
        return self._values(batch) @ self.basis - self._told(batch) @ (self.centre @ self.basis)

    def _told(self, batch: Batch) -> Tensor:
        """The cells' covariates, and an intercept where these have none, (cells, columns)."""
        one = torch.ones_like(batch.size_factor).unsqueeze(1)
        told = [] if batch.covariates is None else [batch.covariates]
        return torch.cat([*told, *[one] * self.intercept], 1)

    def _values(self, batch: Batch) -> Tensor:
        x = batch.x
        if not isinstance(x, SparseRows):
            if self.inputs == "values":
                return x
            return (x * (self.target / batch.size_factor.clamp_min(1e-12)).unsqueeze(1)).log1p()
        value = x.value
        if self.inputs == "profile":
            factor = self.target / batch.size_factor.clamp_min(1e-12)
            value = (value * factor[x.row]).log1p()
        return SparseRows(x.starts, x.col, value, x.n_vars).matrix()


def _leading(x: Tensor, member: Tensor, centre: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right singular vectors, (genes, rank), of x − ``member centre``.

    Subspace iteration of Halko, Martinsson & Tropp, SIAM Review 2011. ``torch.svd_lowrank`` would
    write out the centre as a matrix of the shape of ``x``.
    """

    def times(v: Tensor) -> Tensor:
        return x @ v - member @ (centre @ v)

    def transposed_times(u: Tensor) -> Tensor:
        return x.mT @ u - centre.mT @ (member.mT @ u)

    width = min(rank + 10, *x.shape)
    u = times(normal_like(centre.new_empty(x.shape[1], width)))
    for _ in range(4):
        v = torch.linalg.qr(transposed_times(torch.linalg.qr(u).Q)).Q
        u = times(v)
    _, singular, right = torch.linalg.svd(transposed_times(torch.linalg.qr(u).Q).mT, False)
    return singular[:rank], right[:rank].mT
