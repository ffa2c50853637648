"""The model: p(x, z) = p(z) p(x | z), with an encoder beside it where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae.batches import Batch
from scuvae.batches.sparse_rows import dense
from scuvae.distributions.gaussian import Gaussian
from scuvae.model.covariates import Design
from scuvae.model.curvature import jacobian_gram, systematic_sample
from scuvae.model.decoder import Decoder
from scuvae.model.encoder import Encoder
from scuvae.model.likelihoods import Likelihood
from scuvae.model.likelihoods.autograd import Linear
from scuvae.model.priors import Prior
from scuvae.model.priors.standard_normal import StandardNormal


class VAE(nn.Module):
    """z ~ prior, x ~ likelihood(decoder(z)); it knows nothing of how z is inferred.

    Attributes
    ----------
    decoder, likelihood
        p(x | z): ``likelihood.log_prob(x, decoder(z), size_factor)`` is summed over genes, in
        nats, with any leading dimensions of draws.
    encoder
        x → q(z | x), or None where the model was fitted without.
    prior
        p(z): ``prior.log_prob(z)``, ``prior.sample(shape)``; N(0, I) unless given.
    design
        What the columns of a batch's covariates are.
    """

    def __init__(
        self,
        decoder: Decoder,
        likelihood: Likelihood,
        encoder: Encoder | None = None,
        prior: Prior | None = None,
        design: Design | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.encoder = encoder
        self.prior = StandardNormal(decoder.n_latent) if prior is None else prior
        self.design = design or Design()

    def extra_repr(self) -> str:
        """The first line of what ``print`` shows."""
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.n_latent} latent dimensions -> {self.n_vars} genes, {numbers:,} parameters"

    @property
    def n_latent(self) -> int:
        return self.decoder.n_latent

    @property
    def n_vars(self) -> int:
        return self.likelihood.n_vars

    def likelihood_of(self, covariates: Tensor | None) -> Likelihood:
        """The likelihood of cells, by their rows of covariates, (cells, columns)."""
        if covariates is None or not self.likelihood.by_level:
            return self.likelihood
        return self.likelihood.given(covariates[:, self.design.columns_of(0)])

    def log_likelihood(self, batch: Batch, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (..., cells), for draws z of shape (..., cells, latent)."""
        likelihood = self.likelihood_of(batch.covariates)
        return likelihood.log_prob(batch.x, *self._outputs(batch, z), batch.observed)

    def log_likelihood_and_slope(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | z), (..., cells), and its slope in z, of its shape, the model frozen."""
        with torch.enable_grad(), frozen(self):
            leaf = z.detach().requires_grad_()
            outputs = self._outputs(batch, leaf)
            likelihood = self.likelihood_of(batch.covariates)
            value = likelihood.log_prob(batch.x, *outputs, batch.observed)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def _outputs(self, batch: Batch, z: Tensor) -> tuple[Tensor | Linear, Tensor]:
        """η, or the layer that makes it, and size factors."""
        last = self.decoder.last
        if last is not None and not (batch.size_of_all and batch.observed is not None):
            hidden = self.decoder.hidden(z, batch.covariates)
            return Linear(hidden, last.weight, last.bias), batch.size_factor
        eta = self.decoder(z, batch.covariates)
        return eta, self.size_factor(batch, eta)

    @torch.no_grad()
    def reverse(self, batch: Batch, z: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """log p(x | z), (..., cells), and ``factor`` times its slopes in z, of the shape of z.

        ``factor`` times the slopes of their sum in the model's parameters is added to the ``grad``
        of these. What autograd would do; where the likelihood has closed-form passes it is not
        asked, since what it costs does not shrink with the batch.
        """
        last, likelihood = self.decoder.last, self.likelihood_of(batch.covariates)
        if likelihood.passes is None or last is None or batch.observed is not None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                outputs = self._outputs(batch, leaf)
                value = likelihood.log_prob(batch.x, *outputs, batch.observed)
                (factor * value.sum()).backward()
            assert leaf.grad is not None
            return value.detach(), leaf.grad
        hidden, trace = self.decoder.traced(z, batch.covariates)
        layer = Linear(hidden, last.weight, last.bias)
        value, slope = likelihood.reverse(batch.x, layer, batch.size_factor, factor)
        return value, self.decoder.reverse(slope, trace, batch.covariates)

    def size_factor(self, batch: Batch, eta: Tensor) -> Tensor:
        """Expected totals over the observed genes, (cells,) or (..., cells), for η of some draws.

        Of a total that is known over all genes the observed ones have the share that the softmax
        over all gives them: given z and that total, to leave genes out is to integrate over them.
        """
        if batch.observed is None or not batch.size_of_all:
            return batch.size_factor
        share = eta[..., batch.observed].logsumexp(-1) - eta.logsumexp(-1)
        return batch.size_factor * share.exp()

    @torch.no_grad()
    def curvature(self, batch: Batch, z: Tensor, n_genes: int | None = None) -> Tensor:
        """J_cᵀ diag(w) J_c ≈ −∇²_z log p(x | z), (cells, latent, latent).

        The Jacobians of a few cells at a time are written out, whatever the number of cells.
        With ``n_genes`` of more, an estimate from so many, the same for all cells, drawn with the
        chances that they matter by: unbiased, but for centres, ratios of two sums over them, which
        add about one part in ``n_genes``.
        """
        eta, tangent, weight = self.decoder.linearize(z, batch.covariates)
        size = self.size_factor(batch, eta)
        likelihood = self.likelihood_of(batch.covariates)
        fisher, centre = likelihood.fisher(batch.x, eta, size, batch.observed)
        if centre is not None and size is not batch.size_factor:
            centre = F.softmax(eta, -1)  # unobserved genes are in the sum that divides exp(η)
        if n_genes is not None and n_genes < len(weight):
            matters = fisher.mean(0) * weight.square().sum(1)
            genes, chance = systematic_sample(matters, n_genes)
            weight, fisher = weight[genes], fisher[:, genes] / chance
            if centre is not None:
                centre = F.normalize(centre[:, genes] / chance, p=1, dim=1)
        # πᵀJ of each cell, which centres its Jacobian: subtracted by the product that makes that.
        shift = None if centre is None else -(tangent @ (centre @ weight).unsqueeze(-1))
        return jacobian_gram(tangent, weight, fisher, shift)

    def encode(self, batch: Batch) -> Gaussian:
        """The encoder's q for a batch."""
        if self.encoder is None:
            raise ValueError("this model has no encoder: it was fitted with amortized=False")
        q: Gaussian = self.encoder(dense(batch.x), batch.covariates)
        return q


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, whose products would cost as much as all else."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
