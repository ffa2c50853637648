"""What a prior answers: its density, and what inference under it has to know."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points


class Prior(nn.Module, ABC):
    """p(z), made for a number of latent dimensions: a class in ``PRIORS``, by a name.

    Its parameters and buffers are saved with the model. ``tl.fit(prior=)`` takes the name, or an
    instance of a registered class.

    Inference with a Gaussian q asks for what the prior adds to the ELBO's slope and curvature
    (:meth:`slope`, :meth:`precision`); of a point z, it asks as of a q without width,
    ``Gaussian(z, zeros)``.
    """

    name: ClassVar[str]
    kl_is: ClassVar[Literal["exact", "bound", "estimate"]]
    """What :meth:`kl` is: a closed form, an upper bound, or an average over draws."""

    learns: ClassVar[bool] = False
    """Whether training renews it from cells' posteriors, by :meth:`refit`, once an epoch."""

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.n_latent = n_latent
        # Says where draws are made, and as which numbers.
        self.register_buffer("like", torch.zeros(n_latent), persistent=False)
        self.like: Tensor

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z) in nats, (...,), of points (..., latent), with its slopes by autograd."""

    @abstractmethod
    def kl(self, q: Gaussian) -> Tensor:
        """KL(q ‖ p) in nats, (..., cells): see :attr:`kl_is`."""

    @abstractmethod
    def slope(self, q: Gaussian) -> Tensor:
        """About E_q[∇ ln p(z)], (cells, latent): −KL's gradient in the mean."""

    @abstractmethod
    def precision(self, q: Gaussian) -> Tensor:
        """About −E_q[∇² ln p(z)], ([cells, ]latent, latent), positive definite."""

    @abstractmethod
    def gaussian(self) -> Gaussian:
        """The Gaussian of its mean and covariance, (latent,): q of what nothing is known of."""

    @abstractmethod
    def points(self, n: int) -> Tensor:
        """Fixed draws, the same at every call, (n, latent)."""

    @abstractmethod
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Random draws, (*sample_shape, latent)."""

    def responsibilities(self, q: Gaussian) -> Tensor | None:
        """Of a prior of several components, the chances that a cell is of each: (cells, n)."""
        return None

    def refit(self, q: Gaussian) -> None:
        """Renew the prior, in place, by the posteriors of some training cells."""


def kl_over_draws(prior: Prior, q: Gaussian, n_samples: int = 32) -> Tensor:
    """KL(q ‖ p) over fixed draws of q, (..., cells): for priors that have no closed form."""
    points = normal_points(n_samples, q.mean)
    log_ratio = q.log_prob_of_points(points) - prior.log_prob(q.draw(points))
    return log_ratio.mean(0)
