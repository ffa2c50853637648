"""How surprising a cell is to a model: its ELBO's two parts, and what one of them should be."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scuvae._random import generator_on
from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo
from scuvae.model import VAE

_DRAWS_AT_ONCE = 8


@dataclass(frozen=True)
class Typicality:
    """Of each cell, (cells,), float64, in nats.

    ``reconstruction`` is E_q[log p(x | z)]; ``expected`` the same of values x̃ drawn from the
    model itself, E_q E_{x̃|z}[log p(x̃ | z)], with the cell's own size factor; ``kl`` is
    KL(q ‖ prior).
    """

    reconstruction: Tensor
    expected: Tensor
    kl: Tensor


@torch.no_grad()
def typicality(model: VAE, batch: Batch, q: Gaussian, n_samples: int) -> Typicality:
    """The typicality of a batch's cells over ``n_samples`` fixed draws of q, one x̃ a draw.

    The random state is taken up anew for every cell, and left as it was, so that a cell's x̃
    depend neither on the cells beside it nor on their batches.
    """
    points = normal_points(n_samples, q.mean)
    found = elbo(model, batch, q, points, at_once=_DRAWS_AT_ONCE)
    z = q.draw(points)
    device = q.mean.device
    states = _random_states(device)
    expected = []
    for i, total in enumerate(batch.size_factor):
        covariates = None
        if batch.covariates is not None:
            covariates = batch.covariates[i].expand(n_samples, -1)
        eta = model.decoder(z[:, i], covariates)
        size = model.size_factor(replace(batch, size_factor=total.expand(n_samples)), eta)
        _restore(states, device)
        likelihood = model.likelihood_of(covariates)
        simulated = likelihood.sample(_unobserved_out(model, eta, batch.observed), size)
        log_p = likelihood.log_prob(simulated, eta, size, batch.observed)
        expected.append(log_p.double().mean())
    _restore(states, device)  # for the next batch
    reconstruction = found.log_likelihood.double().mean(0)
    return Typicality(reconstruction, torch.stack(expected), found.kl.double())


def _unobserved_out(model: VAE, eta: Tensor, observed: Tensor | None) -> Tensor:
    """η with nothing left for genes that are not observed: the totals are those of the others."""
    if observed is None or model.likelihood.link != "softmax":
        return eta
    return eta.masked_fill(~observed, -torch.inf)


def _host() -> torch.Generator:
    return generator_on(torch.device("cpu")) or torch.default_generator


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return (_host().get_state()), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def _restore(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    _host().set_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
