"""The model: p(x, z) = p(z) p(x | z), with an encoder beside it where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from scuvae.model.batch import Batch, dense
from scuvae.model.likelihoods import Likelihood
from scuvae.model.networks import Decoder, Encoder
from scuvae.model.rising import compiled
from scuvae.model.rows import Linear


def cells_at_once(numbers: int, device: torch.device) -> int:
    """Cells whose Jacobians, of so many float32 numbers each, are held at once: 1 MB of them, to
    stay in a core's cache, or half a GB on a GPU, to keep it busy."""
    return max(1, (2**18 if device.type == "cpu" else 2**27) // numbers)


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
        last = self.decoder.last
        if last is not None and not (batch.size_of_all and batch.observed is not None):
            layer = Linear(self.decoder.hidden(z, batch.covariates), last.weight, last.bias)
            return self.likelihood.log_prob(batch.x, layer, batch.size_factor, batch.observed)
        eta = self.decoder(z, batch.covariates)
        size = self.size_factor(batch, eta)
        return self.likelihood.log_prob(batch.x, eta, size, batch.observed)

    @torch.no_grad()
    def reverse(self, batch: Batch, z: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """log p(x | z), (..., cells), and ``factor`` times its slopes in z, of the shape of z.

        ``factor`` times the slopes of their sum in the model's parameters is added to the ``grad``
        of these. What autograd would do; where the likelihood has closed-form passes it is not
        asked, since what it costs does not shrink with the batch.
        """
        last = self.decoder.last
        if self.likelihood.passes is None or last is None or batch.observed is not None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                value = self.log_likelihood(batch, leaf)
                (factor * value.sum()).backward()
            assert leaf.grad is not None
            return value.detach(), leaf.grad
        hidden, trace = self.decoder.traced(z, batch.covariates)
        layer = Linear(hidden, last.weight, last.bias)
        value, slope = self.likelihood.reverse(batch.x, layer, batch.size_factor, factor)
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
        fisher, centre = self.likelihood.fisher(batch.x, eta, size, batch.observed)
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

    def encode(self, batch: Batch) -> Distribution:
        """The encoder's q for a batch."""
        if self.encoder is None:
            raise ValueError("this model has no encoder: it was fitted with amortized=False")
        q: Distribution = self.encoder(dense(batch.x))
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


def systematic_sample(size: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``n`` distinct items, drawn by torch's random state, and the chances that these had, (n,).

    Chances are proportional to ``size`` ≥ 0, (items,), but none above 1; what is added up over the
    items drawn, each divided by its chance, is on average the sum over all (Horvitz & Thompson,
    JASA 1952; systematic sampling: Madow, Annals of Mathematical Statistics 1949).
    """
    exact = size.double() + torch.finfo(torch.float32).tiny  # for the case that all are zero
    ordered = exact.sort(descending=True).values
    # Where the k largest are certain, the others share n − k.
    rest = ordered.flip(0).cumsum(0).flip(0)
    shared = (n - torch.arange(len(size), device=size.device)) / rest
    n_certain = (shared * ordered > 1).sum(0, keepdim=True)
    chance = (exact * shared.gather(0, n_certain)).clamp_max(1.0)
    at = torch.rand((), device=size.device) + torch.arange(n, device=size.device)
    drawn = torch.searchsorted(chance.cumsum(0), at).clamp_max(len(size) - 1)
    return drawn, chance[drawn].to(size)


def jacobian_gram(
    tangent: Tensor, weight: Tensor, fisher: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Jᵀ diag(w) J, (cells, latent, latent), of Jacobians whose transposes are T Wᵀ + s.

    Those of a few cells at a time are written out, whatever the number of cells.

    Parameters
    ----------
    tangent, weight
        T, (cells, latent, width), and W, (genes, width): see ``Decoder.linearize``.
    fisher
        w ≥ 0, (cells, genes).
    shift
        s, (cells, latent, 1); None for none.
    """
    n_cells, n_latent, width = tangent.shape
    if shift is None:
        shift = tangent.new_zeros(n_cells, n_latent, 1)
    chunk = cells_at_once(len(weight) * n_latent, tangent.device)
    parts = []
    for first in range(0, n_cells, chunk):
        some = slice(first, first + chunk)
        jacobian = torch.addmm(
            shift[some].reshape(-1, 1), tangent[some].reshape(-1, width), weight.T
        ).view(-1, n_latent, len(weight))
        parts.append(weighted_gram(jacobian, fisher[some]))
    return torch.cat(parts)


def weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """R diag(w) Rᵀ for rows R, (cells, rows, genes), and weights w ≥ 0, (cells, genes)."""
    if compiled(rows):
        from scuvae.model.kernels import gram

        return gram(rows.contiguous(), weight.contiguous())
    scaled = rows * weight.sqrt().unsqueeze(-2)
    return scaled @ scaled.mT
