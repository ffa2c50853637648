"""Annealed importance sampling: log p(x) by many small steps from q to p(z | x).

Between q and p(x, z) lie the unnormalised f_β = q^(1−β) p(x, z)^β; a chain starts at a draw of q
and moves by Hamiltonian Monte Carlo under each f_β in turn, its weight the product of
f_β'(z) / f_β(z) (Neal, Statistics and Computing 2001; for decoders Wu, Burda, Salakhutdinov &
Grosse, ICLR 2017). The mean of the weights is p(x) in expectation, however well the chains mix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scuvae._random import normal_like, uniform_like
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.evaluation.importance_sampling import log_mean
from scuvae.model import VAE
from scuvae.model.vae import frozen

# Chains a cell: their spread is the standard error.
_CHAINS = 16
# In coordinates where q is N(0, I): a trajectory is about a quarter of a circle. Nothing adapts to
# the chains, which would bias the weights.
_STEP, _LEAPS = 0.4, 4


@torch.no_grad()
def annealed_log_evidence(
    model: VAE, batch: Batch, q: Gaussian, n_anneal: int, n_chains: int = _CHAINS
) -> tuple[Tensor, Tensor]:
    """log p(x) of each cell in nats, and its standard error by the delta method, (cells,) each.

    Parameters
    ----------
    n_anneal
        Number of distributions between q and the target, each with a transition.
    """
    q = q.as_family("full")
    exact = q.to(torch.float64)

    def look(u: Tensor) -> tuple[Tensor, Tensor]:
        """ln p(x, z) − ln q(z) at z = m + C u, (chains, cells), and its gradient in u."""
        with torch.enable_grad(), frozen(model):
            at = u.detach().requires_grad_()
            z = q.draw(at)
            likelihood = model.log_likelihood(batch, z).double()
            prior = model.prior.log_prob(z.double())
            ratio = likelihood + prior - exact.log_prob_of_points(at.double())
            (slope,) = torch.autograd.grad(ratio.sum(), at)
        return ratio.detach(), slope

    u = normal_like(q.mean, (n_chains,))
    ratio, slope = look(u)
    log_weight = torch.zeros_like(ratio)
    for step in range(1, n_anneal + 2):
        beta = step / (n_anneal + 1)
        log_weight += ratio / (n_anneal + 1)
        if step <= n_anneal:
            u, ratio, slope = move(look, u, ratio, slope, beta)
    return log_mean(log_weight)


def move(
    look: Callable[[Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    ratio: Tensor,
    slope: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Hamiltonian transition under ln f_β = −½ uᵀu + β ratio(u), up to a constant."""
    momentum = normal_like(u)
    energy = 0.5 * (u.square() + momentum.square()).sum(-1).double() - beta * ratio
    new, new_ratio, new_slope = u, ratio, slope
    for _ in range(_LEAPS):
        momentum = momentum + 0.5 * _STEP * (beta * new_slope - new)
        new = new + _STEP * momentum
        new_ratio, new_slope = look(new)
        momentum = momentum + 0.5 * _STEP * (beta * new_slope - new)
    new_energy = 0.5 * (new.square() + momentum.square()).sum(-1).double() - beta * new_ratio
    taken = uniform_like(energy).log() < energy - new_energy  # never where it is no number
    return (
        torch.where(taken.unsqueeze(-1), new, u),
        torch.where(taken, new_ratio, ratio),
        torch.where(taken.unsqueeze(-1), new_slope, slope),
    )
