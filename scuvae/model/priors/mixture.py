"""A mixture of Gaussians, fitted to the cells' posteriors: Σ_k π_k N(μ_k, Σ_k)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scuvae._random import normal_like, uniform_like
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.distributions.spread_out import spread_out
from scuvae.model.priors.base import Prior

# Rounds of expectation and maximisation in a renewal, and in the first, which starts from anew.
_ROUNDS, _FIRST_ROUNDS = 3, 30
# Starts of the first, of which the best is kept.
_STARTS = 3
# So many cells' worth of N(·, pooled covariance) are added to each component's own covariance.
_PSEUDO_CELLS = 5.0


class Mixture(Prior):
    """Σ_k π_k N(μ_k, Σ_k), by empirical Bayes: the one that cells' posteriors ask for.

    Steps of expectation and maximisation have closed forms, since every cell has a q: with
    r_k ∝ π_k exp(−KL(q ‖ N_k)), moments of q weighted by r_k. A component that fewer cells are for
    than half of its parameters goes (Figueiredo & Jain, IEEE TPAMI 2002), and so does one without
    which the cells are explained as well by the Bayesian information criterion: what is left is
    what the data need, and ``n_components`` the most. KL(q ‖ p) is bounded by
    −ln Σ_k π_k exp(−KL(q ‖ N_k)), which is what natural steps climb.

    Parameters
    ----------
    n_latent
        Latent dimensions.
    n_components
        Components that it starts with.
    """

    name = "mixture"
    kl_is = "bound"
    learns = True

    def __init__(self, n_latent: int, n_components: int = 20) -> None:
        super().__init__(n_latent)
        # One standard normal, until there are posteriors.
        weight = torch.zeros(n_components)
        weight[0] = 1.0
        self.register_buffer("weight", weight)
        self.register_buffer("mean", torch.zeros(n_components, n_latent))
        self.register_buffer("factor", torch.eye(n_latent).repeat(n_components, 1, 1))
        self.weight: Tensor
        self.mean: Tensor
        self.factor: Tensor

    @property
    def n_components(self) -> int:
        return len(self.weight)

    @property
    def log_weight(self) -> Tensor:
        """ln π, −∞ of components that are gone."""
        return self.weight.log()

    @property
    def components(self) -> Gaussian:
        return Gaussian(self.mean, self.factor)

    def log_prob(self, z: Tensor) -> Tensor:
        each = self.components.to(z.dtype).log_prob(z.unsqueeze(-2))
        return (self.log_weight.to(z.dtype) + each).logsumexp(-1)

    def kl(self, q: Gaussian) -> Tensor:
        return -(self.log_weight - self._kl_to_each(q)).logsumexp(-1)

    def responsibilities(self, q: Gaussian) -> Tensor:
        """r of each cell, (cells, components): the chances that it is of each."""
        return (self.log_weight - self._kl_to_each(q)).softmax(-1)

    def slope(self, q: Gaussian) -> Tensor:
        """Σ_k r_k Λ_k (μ_k − m)."""
        r, precision = self._pull(q)
        shift = (precision @ self.mean.unsqueeze(-1)).squeeze(-1)
        of_mean = (r @ precision.flatten(1)).view(-1, *precision.shape[1:])
        return r @ shift - (of_mean @ q.mean.unsqueeze(-1)).squeeze(-1)

    def precision(self, q: Gaussian) -> Tensor:
        """Σ_k r_k Λ_k."""
        r, precision = self._pull(q)
        return (r @ precision.flatten(1)).view(-1, *precision.shape[1:])

    def gaussian(self) -> Gaussian:
        weight = self.weight
        mean = weight @ self.mean
        left = self.mean - mean
        each = self.components.covariance_matrix + left.unsqueeze(-1) * left.unsqueeze(-2)
        return Gaussian(mean, torch.linalg.cholesky((weight[:, None, None] * each).sum(0)))

    def points(self, n: int) -> Tensor:
        """Each component has its share of them; what is rounded away, the heaviest."""
        counts = (self.weight * n).round().long()
        heaviest = int(counts.argmax())
        counts[heaviest] += n - int(counts.sum())
        own = torch.arange(self.n_components, device=counts.device).repeat_interleave(counts)
        return self.components[own].draw(normal_points(n, self.like).squeeze(1))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = normal_like(self.like, tuple(sample_shape))
        chance = uniform_like(noise[..., :1])
        which = torch.searchsorted(self.weight.cumsum(0), chance).squeeze(-1)
        own = self.components[which.clamp_max(self.n_components - 1)]
        return own.draw(noise)

    @torch.no_grad()
    def refit(self, q: Gaussian) -> None:
        """Expectation and maximisation by the posteriors of some cells."""
        q = q.to(torch.float64)
        pooled = _covariance(q.mean, q.covariance_matrix, torch.ones_like(q.mean[:, :1]))[1][0]
        if (self.weight > 0).sum() > 1:
            starts = [(self.components.to(torch.float64), self.weight.double())]
            rounds = _ROUNDS
        else:
            factor = torch.linalg.cholesky(pooled).expand(self.n_components, -1, -1)
            equal = torch.full_like(self.weight, 1 / self.n_components, dtype=torch.float64)
            places = [spread_out(q.mean, self.n_components) for _ in range(_STARTS)]
            starts = [(Gaussian(q.mean[rows], factor), equal) for rows in places]
            rounds = _FIRST_ROUNDS
        found = [_converged(q, *start, pooled, rounds) for start in starts]
        components, weight = max(found, key=lambda each: _criterion(q, *each))
        self.weight.copy_(weight)
        self.mean.copy_(components.mean)
        self.factor.copy_(components.factor)

    def _kl_to_each(self, q: Gaussian) -> Tensor:
        return _kl(q, self.components)

    def _pull(self, q: Gaussian) -> tuple[Tensor, Tensor]:
        """Responsibilities, also of a q without width, and the components' precisions."""
        found = self.log_weight - _cross_entropy(q, self.components)
        return found.softmax(-1), self.components.precision_matrix


def _kl(q: Gaussian, components: Gaussian) -> Tensor:
    """KL(q ‖ N_k), (cells, components)."""
    entropy: Tensor = q.entropy()
    return _cross_entropy(q, components) - entropy.unsqueeze(-1)


def _cross_entropy(q: Gaussian, components: Gaussian) -> Tensor:
    """−E_q[ln N_k], (cells, components)."""
    whiten = torch.linalg.inv(components.factor)  # C_k⁻¹
    spread = torch.einsum("kab,cbd->ckad", whiten, q.scale_tril).square().sum((-2, -1))
    return 0.5 * spread - components.log_prob(q.mean.unsqueeze(-2))


def _converged(
    q: Gaussian, components: Gaussian, weight: Tensor, pooled: Tensor, rounds: int
) -> tuple[Gaussian, Tensor]:
    """Some rounds, then without what is dispensable."""
    for _ in range(rounds):
        components, weight = _round(q, components, weight, pooled)
    while (least := _dispensable(q, components, weight)) is not None:
        weight[least] = 0.0
        components, weight = _round(q, components, weight / weight.sum(), pooled)
    return components, weight


def _criterion(q: Gaussian, components: Gaussian, weight: Tensor) -> float:
    """By which mixtures are compared: the Bayesian information criterion, higher is better."""
    explained = (weight.log() - _kl(q, components)).logsumexp(1).sum()
    return float(explained) - int((weight > 0).sum()) * _worth(q)


def _worth(q: Gaussian) -> float:
    """What a component has to gain, in nats over all cells."""
    return 0.5 * (_n_parameters(q) + 1) * math.log(len(q.mean))


def _round(
    q: Gaussian, components: Gaussian, weight: Tensor, pooled: Tensor
) -> tuple[Gaussian, Tensor]:
    """A step of expectation and one of maximisation."""
    r = (weight.log() - _kl(q, components)).softmax(-1)
    total = r.sum(0)
    kept = (total - 0.5 * _n_parameters(q)).clamp_min(0)
    if not kept.any():
        kept[total.argmax()] = 1.0
    mean, covariance = _covariance(q.mean, q.covariance_matrix, r)
    share = (total / (total + _PSEUDO_CELLS))[:, None, None]
    factor = torch.linalg.cholesky(share * covariance + (1 - share) * pooled)
    return Gaussian(mean, factor), kept / kept.sum()


def _dispensable(q: Gaussian, components: Gaussian, weight: Tensor) -> int | None:
    """The component that costs least to leave out, if that is less than it is worth by the BIC."""
    there = weight.nonzero().squeeze(1)
    if len(there) == 1:
        return None
    joint = (weight.log() - _kl(q, components))[:, there]
    whole = joint.logsumexp(1).sum()
    others = ~torch.eye(len(there), dtype=torch.bool, device=joint.device)
    loss = torch.stack([whole - joint[:, rest].logsumexp(1).sum() for rest in others])
    least = int(loss.argmin())
    if loss[least] >= _worth(q):
        return None
    return int(there[least])


def _n_parameters(q: Gaussian) -> float:
    """Of a component's mean and covariance."""
    size = q.mean.shape[1]
    return size + size * (size + 1) / 2


def _covariance(mean: Tensor, covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariances of cells' q together, by weights, (cells, components)."""
    share = weight / weight.sum(0).clamp_min(1e-12)
    centre = share.T @ mean
    square = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    second = torch.einsum("ck,cab->kab", share, square)
    return centre, second - centre.unsqueeze(-1) * centre.unsqueeze(-2)
