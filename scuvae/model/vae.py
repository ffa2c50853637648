"""The model: p(x, z) = p(z) p(x | z), with an encoder beside it where there is one."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from scuvae.model.batch import Batch, dense
from scuvae.model.likelihoods import Likelihood
from scuvae.model.networks import Decoder, Encoder


class VAE(nn.Module):
    """z ~ N(0, I), x ~ likelihood(decoder(z)); it knows nothing of how z is inferred.

    Attributes
    ----------
    decoder, likelihood
        p(x | z): ``likelihood.log_prob(x, decoder(z), size_factor)`` is summed over genes, in
        nats, with any leading dimensions of draws.
    encoder
        x → q(z | x), or None where the model was fitted without.
    """

    def __init__(
        self, decoder: Decoder, likelihood: Likelihood, encoder: Encoder | None = None
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.encoder = encoder

    @property
    def n_latent(self) -> int:
        return self.decoder.n_latent

    @property
    def n_vars(self) -> int:
        return self.likelihood.n_vars

    @property
    def prior(self) -> Distribution:
        zero = next(self.decoder.parameters()).new_zeros(self.n_latent)
        return Independent(Normal(zero, torch.ones_like(zero)), 1)

    def log_likelihood(self, batch: Batch, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (..., cells), for draws z of shape (..., cells, latent)."""
        eta = self.decoder(z, batch.covariates)
        out: Tensor = self.likelihood.log_prob(batch.x, eta, batch.size_factor, batch.observed)
        return out

    @torch.no_grad()
    def curvature_root(self, batch: Batch, z: Tensor) -> Tensor:
        """R with R Rᵀ = J_cᵀ diag(w) J_c ≈ −∇²_z log p(x | z), (cells, latent, outputs)."""
        eta, jacobian = self.decoder.jacobian(z, batch.covariates)
        weight, centre = self.likelihood.fisher(batch.x, eta, batch.size_factor, batch.observed)
        if centre is not None:
            jacobian = jacobian - jacobian @ centre.unsqueeze(-1)
        out: Tensor = jacobian * weight.sqrt().unsqueeze(-2)
        return out

    def encode(self, batch: Batch) -> Distribution:
        """The encoder's q for a batch."""
        if self.encoder is None:
            raise ValueError("this model has no encoder: it was fitted with amortized=False")
        q: Distribution = self.encoder(dense(batch.x))
        return q
