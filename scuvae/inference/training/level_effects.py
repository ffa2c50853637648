"""How far genes are believed to differ between a covariate's levels, learnt while a fit goes on.

A decoder adds o_gk to η of gene g in cells of column k of a covariate. Most genes differ little
between batches and a few by much, so that those of a covariate's K columns have a multivariate t
distribution of ν degrees of freedom and scale s, a normal one of a precision τ_g of each gene's:

    o_g | τ_g ~ N(0, 1/τ_g),   τ_g ~ Gamma(ν/2, ν s²/2).

Each call is a step of EM (Lange, Little and Taylor 1989; Laplace's variances as in MacKay 1992),
with F the Fisher information of o_gk in all cells:

    τ_g = (ν + K) / (ν s² + Σ_k (o_gk² + 1/(τ_g + F_gk))),   1/s² = the mean of τ_g.

A normal prior of one fixed width lets thousands of offsets follow the noise of few cells: with
batches told a fit's held-out ELBO was below that of one without.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE

# ν: small numbers leave alone the few genes that differ by much.
_DEGREES = 4.0


class LevelEffects:
    """Moves the precisions of a covariate's columns in the decoder's last layer.

    Parameters
    ----------
    model
        Its decoder has a last layer that takes covariates.
    precision
        Precisions of the prior of that layer's weights, (1, width), as they are at first.

    Attributes
    ----------
    precision
        (genes, width), moved in place.
    """

    def __init__(self, model: VAE, precision: Tensor) -> None:
        self.precision = precision.repeat(model.n_vars, 1)

    @torch.no_grad()
    def information(self, model: VAE, cells: Iterable[tuple[Batch, Gaussian]]) -> Tensor:
        """F of some cells, (genes, columns), at their posterior means."""
        found = self.precision.new_zeros(len(self.precision), model.decoder.n_covariates)
        for batch, q in cells:
            assert batch.covariates is not None
            eta = model.decoder(q.mean, batch.covariates)
            size = model.size_factor(batch, eta)
            likelihood = model.likelihood_of(batch.covariates)
            fisher, _ = likelihood.fisher(batch.x, eta, size, batch.observed)
            found += fisher.T @ batch.covariates.square()
        return found

    @torch.no_grad()
    def update(self, model: VAE, information: Tensor) -> None:
        """A step of EM, given F in all training cells."""
        n_columns = model.decoder.n_covariates
        offsets = model.decoder.output.weight[:, -n_columns:]
        precision = self.precision[:, -n_columns:]
        for columns in model.design.columns_of_each():
            tau, o = precision[:, columns], offsets[:, columns]
            squares = (o.square() + 1 / (tau + information[:, columns])).sum(1, keepdim=True)
            scale = 1 / tau.mean()
            degrees = _DEGREES + o.shape[1]
            precision[:, columns] = degrees / (_DEGREES * scale + squares)
