"""The ELBO: what inference maximises, and its slopes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae._random import normal_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE
from scuvae.model.priors import Prior


@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of each cell by its parts, in nats.

    ``log_likelihood`` is log p(x | z) of each draw, (draws, cells), ``kl`` KL(q ‖ prior), (cells,).
    """

    log_likelihood: Tensor
    kl: Tensor

    @property
    def reconstruction(self) -> Tensor:
        """E_q[log p(x | z)], (cells,)."""
        return self.log_likelihood.mean(0)

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl

    def tempered(self, kl_weight: float) -> Tensor:
        """E_q[log p(x | z)]/β − KL, (cells,): what is climbed where KL weighs β."""
        return self.reconstruction / kl_weight - self.kl

    def sums(self, n: int | None = None) -> Tensor:
        """Reconstruction and KL over all cells, or the first n, (2,)."""
        return torch.stack([self.reconstruction, self.kl])[:, :n].sum(1)


def elbo(
    model: VAE, batch: Batch, q: Gaussian, draws: int | Tensor = 1, *, at_once: int | None = None
) -> Elbo:
    """E_q[log p(x | z)] − KL(q ‖ prior), the expectation over draws, KL by the prior.

    Parameters
    ----------
    draws
        How many random ones, or the points of N(0, I) that they stand for, (draws, 1 or cells,
        latent).
    at_once
        Draws that log p is taken of at once, where it matters for memory; None for all.
    """
    z = q.draw_own(normal_like(q.mean, (draws,))) if isinstance(draws, int) else q.draw(draws)
    parts = [z] if at_once is None else z.split(at_once)
    values = [model.log_likelihood(batch, part) for part in parts]
    return Elbo(torch.cat(values) if len(values) > 1 else values[0], model.prior.kl(q))


def descend(
    model: VAE, batch: Batch, q: Gaussian, n_samples: int, *, weight: float, kl_weight: float
) -> tuple[Elbo, Tensor]:
    """The ELBO over random draws, and the backward pass of ``weight`` Σ (β KL − reconstruction).

    Gradients are added to the ``grad`` of all that ask for one: the model's parameters, and what q
    comes from. Returned beside the ELBO is that of the reconstruction's part in the draws of z,
    (cells, latent) or (draws, cells, latent).
    """
    one = n_samples == 1
    z = q.draw_own(normal_like(q.mean, () if one else (n_samples,)))
    kl = model.prior.kl(q)
    values, slope = model.reverse(batch, z.detach(), -weight / n_samples)
    if kl.requires_grad:  # what q comes from, or the prior
        of, slopes = [kl], [torch.full_like(kl, weight * kl_weight)]
        if z.requires_grad:
            of, slopes = [z, *of], [slope, *slopes]
        torch.autograd.backward(of, slopes)
    return Elbo(values.unsqueeze(0) if one else values, kl.detach()), slope


def tempered(
    prior: Prior, q: Gaussian, log_likelihood: Tensor, slopes: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """The ELBO of :meth:`Elbo.tempered` over draws, (cells,), and its slope in the mean.

    ``log_likelihood`` and ``slopes`` are log p(x | z) of each draw and its slope there, as
    :meth:`scuvae.model.VAE.log_likelihood_and_slope` gives them.
    """
    found = Elbo(log_likelihood, prior.kl(q))
    return found.tempered(kl_weight), slopes.mean(0) / kl_weight + prior.slope(q)
