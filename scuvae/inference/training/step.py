"""One training step: the backward pass of a batch's loss, then all that it moves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import Batch
from scuvae.inference.posteriors import Posterior
from scuvae.inference.posteriors.objectives import descend
from scuvae.inference.training.optimizers import Optimizer
from scuvae.model import VAE


class Step:
    """A step of a fit, called with a batch.

    Parameters
    ----------
    optimizer
        Over the model's parameters.
    n_obs
        Number of training cells: the loss of a batch of B cells weighs n/B.
    n_samples, kl_weight, output_precision
        As in :func:`scuvae.inference.training.loop.train`.
    """

    def __init__(
        self,
        model: VAE,
        posterior: Posterior,
        optimizer: Optimizer,
        *,
        n_obs: int,
        n_samples: int,
        kl_weight: float,
        output_precision: Tensor | None = None,
    ) -> None:
        self.model, self.posterior, self.optimizer = model, posterior, optimizer
        self.n_obs, self.n_samples, self.kl_weight = n_obs, n_samples, kl_weight
        self.output_precision = output_precision
        groups = optimizer.param_groups
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self._base_rates = [float(group["lr"]) for group in groups]
        # Where steps are replayed, what changes between them has to be on their device.
        self._rate: float | Tensor = 1.0
        self._factor = 1.0
        if self.replayable:
            self._rate = torch.ones((), device=self.parameters[0].device)

    @property
    def replayable(self) -> bool:
        """Whether nothing of the optimiser's part is done by the host."""
        groups = self.optimizer.param_groups
        return all(group.get("capturable") and isinstance(group["lr"], Tensor) for group in groups)

    def set_rate(self, rate: float) -> None:
        """The schedule's factor on all step sizes."""
        if rate == self._factor:
            return
        self._factor = rate
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = _set(group["lr"], base * rate)
        self._rate = _set(self._rate, rate)

    def __call__(self, batch: Batch) -> Tensor:
        """Take the step. Returned are sums over the batch, (3,), in nats: reconstruction, KL, and
        what the posterior minimises beside their loss."""
        model, posterior, kl_weight = self.model, self.posterior, self.kl_weight
        seen = posterior.seen(model, batch)
        q = posterior(model, seen, kl_weight)
        weight = self.n_obs / len(batch)
        for parameter in self.parameters:  # as zero_grad does, without its hooks
            parameter.grad = None
        terms, slope = descend(model, seen, q, self.n_samples, weight=weight, kl_weight=kl_weight)
        losses = F.pad(terms.sums(len(batch)), (0, 1))
        extra = posterior.descend(model, batch, weight=weight, kl_weight=kl_weight)
        if extra is not None:
            losses[2] = extra
        posterior.step(model, batch, slope, scale=weight, kl_weight=kl_weight, rate=self._rate)
        if self.output_precision is not None:
            output = model.decoder.output.weight
            if output.grad is not None:
                output.grad.addcmul_(output.detach(), self.output_precision)
        self.optimizer.step()
        return losses


def _set(old: float | Tensor, new: float) -> float | Tensor:
    return old.fill_(new) if isinstance(old, Tensor) else new
