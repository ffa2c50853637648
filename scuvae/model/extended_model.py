"""Genes beside those that a model was fitted to: rates relative to the total of the fitted.

A fitted gene has the share exp(η_g) / Σ exp(η) of a cell's total ℓ over the fitted genes. Further
genes have no part in the sum, so that nothing of the fitted genes changes, but are measured by it:

    ln μ_j = ln ℓ + b_j + w_jᵀ h(z) − ln Σ_g exp(η_g),      g fitted, j not,

with h what enters the decoder's last layer. In a fit to all genes the sum would run over all, and ℓ
be the total over all: the same but for a factor of the cell.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from scuvae.batches import Batch
from scuvae.model.covariates import Design
from scuvae.model.decoder import Decoder
from scuvae.model.likelihoods import Likelihood
from scuvae.model.vae import VAE


def entering(decoder: Decoder, z: Tensor, covariates: Tensor | None) -> Tensor:
    """h(z), (..., cells, width): of a linear decoder z and what it is told beside."""
    hidden = decoder.hidden(z, covariates)
    if decoder.last is not None:
        return hidden
    assert covariates is not None
    return torch.cat([hidden, covariates.expand(*z.shape[:-1], -1)], -1)


def width_of(decoder: Decoder) -> int:
    width: int = decoder.output.weight.shape[1]
    return width + (decoder.n_covariates if decoder.last is None else 0)


class ExtendedModel(nn.Module):
    """p(x | z) of fitted and further genes, in this order, for what a fit is asked of expression.

    A likelihood sees one softmax over all; :meth:`size_factor` is the expected total over all, that
    makes of its shares the rates above.

    Parameters
    ----------
    model
        The fit's.
    output
        w and b of the further genes.
    likelihood
        Of all genes, with the parameters of both.
    """

    def __init__(self, model: VAE, output: nn.Linear, likelihood: Likelihood) -> None:
        super().__init__()
        self.model, self.output, self.likelihood = model, output, likelihood

    @property
    def n_latent(self) -> int:
        return self.model.n_latent

    @property
    def design(self) -> Design:
        return self.model.design

    @property
    def n_vars(self) -> int:
        return self.likelihood.n_vars

    def decoder(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """η of all genes, (..., cells, genes)."""
        own = self.model.decoder(z, covariates)
        return torch.cat([own, self.output(entering(self.model.decoder, z, covariates))], -1)

    def likelihood_of(self, covariates: Tensor | None) -> Likelihood:
        """The likelihood of cells, by their rows of covariates, (cells, columns)."""
        if covariates is None or not self.likelihood.by_level:
            return self.likelihood
        return self.likelihood.given(covariates[:, self.design.columns_of(0)])

    def size_factor(self, batch: Batch, eta: Tensor) -> Tensor:
        """Expected totals over all observed genes, (..., cells).

        The batch's mask is over all genes; its size factor is over the fitted ones that are
        observed, or with ``size_of_all`` over all fitted ones.
        """
        fitted, observed = eta[..., : self.model.n_vars], batch.observed
        if observed is not None:
            if not batch.size_of_all:
                fitted = fitted[..., observed[: self.model.n_vars]]
            eta = eta[..., observed]
        return batch.size_factor * (eta.logsumexp(-1) - fitted.logsumexp(-1)).exp()

    @torch.no_grad()
    def whole(self) -> VAE:
        """A model of all these genes alike, with one total over all, and without an encoder."""
        decoder = copy.deepcopy(self.model.decoder)
        width = decoder.output.weight.shape[1]
        weight = torch.cat([decoder.output.weight, self.output.weight[:, :width]])
        last: nn.Linear = nn.utils.skip_init(nn.Linear, width, self.n_vars)
        last.weight.copy_(weight)
        last.bias.copy_(torch.cat([decoder.output.bias, self.output.bias]))
        decoder.layers[-1] = last
        if decoder.last is None:
            assert decoder.offset is not None
            beside = torch.cat([decoder.offset.weight, self.output.weight[:, width:]])
            decoder.offset = nn.Linear(beside.shape[1], self.n_vars, bias=False)
            decoder.offset.weight.copy_(beside)
        likelihood = copy.deepcopy(self.likelihood)
        found = VAE(decoder, likelihood, None, copy.deepcopy(self.model.prior), self.design)
        return found.eval().requires_grad_(False)


def total_of(model: VAE | ExtendedModel, total: Tensor, eta: Tensor) -> Tensor:
    """Size factors for points that are decoded at a ``total`` over all fitted genes, (points,)."""
    if isinstance(model, VAE):
        return total
    batch = Batch(eta, torch.arange(len(eta)), total, size_of_all=True)
    return model.size_factor(batch, eta)


def joined(likelihood: Likelihood, further: Likelihood, both: Likelihood) -> Likelihood:
    """``both``, of all genes, with the parameters of the fitted and the further ones; one that all
    genes share is the fitted's, and batches share those of further genes."""
    return likelihood.each(lambda own: _joined(own, further, copy.deepcopy(both)))


def _joined(likelihood: Likelihood, further: Likelihood, both: Likelihood) -> Likelihood:
    names: dict[str, Any] = dict(likelihood.named_parameters())
    others = dict(further.named_parameters())
    with torch.no_grad():
        for name, value in names.items():
            whole = value
            if len(value) == likelihood.n_vars:
                whole = torch.cat([value, others[name]])
            setattr(both, name, nn.Parameter(whole.detach().clone(), requires_grad=False))
    return both
