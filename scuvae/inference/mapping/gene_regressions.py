"""Further genes for a fit: regressions of their counts on what its decoder's last layer sees.

All else is frozen, posteriors too. Of a gene w, b and the likelihood's own parameters maximise

    Σ_i E_q ln p(x_ij | μ_ij) − ½ wᵀ P w,

its part of a fit's objective, with μ as in :mod:`scuvae.model.extended_model`, the expectation over
a few fixed draws of q, and P the precision that the fit has for its last layer. Genes have nothing
in common but h: they are taken some at a time, by L-BFGS in coordinates in which each gene's
problem is about round: a generalised eigenbasis of the cells' Σ h hᵀ and P, and the gene's counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse as sp
from scipy.optimize import minimize
from torch import Tensor, nn

from scuvae.batches import Batch, Cells, SparseRows
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.model import VAE
from scuvae.model.extended_model import entering
from scuvae.model.likelihoods import Likelihood

# Genes that are fitted at once, and steps that they take at most.
GENES_AT_ONCE, _STEPS = 128, 60
# The precision of the slopes in a linear decoder's covariates.
_BESIDE = 3.0
_LARGEST = 30.0


@dataclass(frozen=True)
class Seen:
    """What further genes' means are made of: h, (draws, cells, width), and ln ℓ − ln Σ exp(η),
    (draws, cells)."""

    hidden: Tensor
    offset: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: VAE, batch: Batch, q: Gaussian, n_samples: int) -> "Seen":
        z = q.draw(normal_points(n_samples, q.mean))
        eta = model.decoder(z, batch.covariates)
        size = batch.size_factor
        if batch.observed is not None and not batch.size_of_all:
            eta = eta[..., batch.observed]
        offset = size.clamp_min(1e-30).log() - eta.logsumexp(-1)
        return cls(entering(model.decoder, z, batch.covariates), offset)


def seen(
    model: VAE, cells: Cells, q: Gaussian, rows: Tensor, n_samples: int, chunk: int
) -> Iterator[tuple[Tensor, Seen]]:
    """The cells ``rows`` a chunk at a time."""
    for batch in cells.loader(rows, chunk):
        yield batch.index, Seen.of(model, batch, q[batch.index], n_samples)


class FurtherGenes:
    """Fits some genes after others.

    Parameters
    ----------
    model
        The fit's, frozen.
    parts
        What the training cells' means are made of.
    n_obs
        How many training cells the fit has: of more than are here, each counts more.
    """

    def __init__(self, model: VAE, parts: list[Seen], n_obs: int) -> None:
        self.model = model
        self.hidden = torch.cat([part.hidden for part in parts], 1)
        self.offset = torch.cat([part.offset for part in parts], 1)
        n_draws, n_cells, width = self.hidden.shape
        self.factor = n_obs / n_cells / n_draws
        precision = model.decoder.output_precision(n_obs)[0].double()
        self.precision = torch.full((width,), _BESIDE, dtype=torch.float64)
        self.precision[: len(precision)] = precision.cpu()
        weight = self.offset.double().exp()
        weight = (weight / weight.sum()).to(self.hidden)
        self.centre = torch.einsum("sn,snw->w", weight, self.hidden)
        self.hidden -= self.centre
        moment = sum(
            (h * w[:, None]).T.double() @ h.double()
            for h, w in zip(self.hidden, weight, strict=True)
        )
        assert isinstance(moment, Tensor)
        root = self.precision.rsqrt()
        value, basis = torch.linalg.eigh(root[:, None] * moment.cpu() * root)
        self.value, self.basis = value.clamp_min(0), root[:, None] * basis
        self.exposure = float(self.offset.double().exp().sum(1).mean())

    def fit(self, counts: sp.csr_matrix, likelihood: Likelihood) -> nn.Linear:
        """The layer of some genes, from their counts in the training cells; ``likelihood``, of so
        many genes, gets their parameters."""
        n_genes, where = counts.shape[1], self.hidden.device
        total = np.asarray(counts.sum(0), np.float64).ravel() + 0.5
        x = SparseRows(
            torch.as_tensor(counts.indptr.astype(np.int64), device=where),
            torch.as_tensor(counts.indices.astype(np.int64), device=where),
            torch.as_tensor(counts.data.astype(np.float32), device=where),
            n_genes,
        )
        likelihood.to(where).requires_grad_()
        own = list(likelihood.parameters())
        sizes = [parameter.numel() for parameter in own]
        # Coordinates of w: rows of the basis, shorter the more the gene's counts say of them.
        weighed = torch.as_tensor(total * self.factor * len(self.hidden))[:, None]
        shrink = (1 + weighed * self.value).rsqrt()
        of_bias = weighed[:, 0].rsqrt()
        start = torch.as_tensor(np.log(total / self.exposure))
        basis = self.basis.T.contiguous()

        def placed(flat: np.ndarray) -> tuple[Tensor, Tensor]:
            at = torch.as_tensor(flat)
            free = at[: shrink.numel()].view_as(shrink)
            bias = start + at[shrink.numel() : shrink.numel() + n_genes] * of_bias
            return (free * shrink) @ basis, bias

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            wide, bias = placed(flat)
            weight = wide.to(self.hidden).requires_grad_()
            intercept = bias.to(self.hidden).requires_grad_()
            at = shrink.numel() + n_genes
            for parameter, size in zip(own, sizes, strict=True):
                value = torch.as_tensor(flat[at : at + size]).view_as(parameter)
                parameter.data.copy_(value)
                parameter.grad = None
                at += size
            value = -self._log_prob(x, weight, intercept, likelihood)
            value.backward()
            assert weight.grad is not None
            assert intercept.grad is not None
            of_weight = weight.grad.double().cpu() + self.precision * wide
            slopes = [
                ((of_weight @ self.basis) * shrink).flatten(),
                intercept.grad.double().cpu() * of_bias,
                *(p.grad.double().cpu().flatten() for p in own if p.grad is not None),
            ]
            prior = 0.5 * float((self.precision * wide.square()).sum())
            return float(value.detach()) + prior, torch.cat(slopes).numpy()

        flat = np.zeros(shrink.numel() + n_genes)
        first = [parameter.detach().double().cpu().flatten().numpy() for parameter in own]
        with torch.enable_grad():
            found = minimize(
                loss,
                np.concatenate([flat, *first]),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": _STEPS, "maxcor": 10, "gtol": 1e-3},
            ).x
            loss(found)  # leaves the parameters there
        likelihood.requires_grad_(False)
        weight, bias = placed(found)
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], n_genes)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias - weight @ self.centre.double().cpu())
        return layer.requires_grad_(False)

    def _log_prob(
        self, x: SparseRows, weight: Tensor, bias: Tensor, likelihood: Likelihood
    ) -> Tensor:
        value = torch.zeros((), dtype=torch.float64, device=weight.device)
        for hidden, offset in zip(self.hidden, self.offset, strict=True):
            eta = hidden @ weight.T + bias
            size = (offset + eta.logsumexp(-1)).clamp_max(_LARGEST).exp()
            value = value + likelihood.log_prob(x, eta, size).double().sum()
        return value * self.factor


@torch.no_grad()
def predicted_totals(
    layers: list[nn.Linear],
    likelihoods: list[Likelihood],
    cells: Callable[[], Iterator[tuple[Tensor, Seen]]],
) -> Tensor:
    """Σ_i E_q μ_ij over all cells, (genes,), float64."""
    totals = [torch.zeros(layer.out_features, dtype=torch.float64) for layer in layers]
    for _, part in cells():
        for total, layer, likelihood in zip(totals, layers, likelihoods, strict=True):
            layer.to(part.hidden)
            for hidden, offset in zip(part.hidden, part.offset, strict=True):
                eta = layer(hidden)
                size = (offset + eta.logsumexp(-1)).exp()
                mean = likelihood.mean(eta, size).sum(0)
                total += mean.double().cpu() / len(part.hidden)
    return torch.cat(totals)
