"""One training step: the backward pass of a batch's loss, then all that it moves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scuvae.batches import Batch
from scuvae.inference.posteriors import Posterior
from scuvae.inference.posteriors.objectives import descend
from scuvae.inference.training.optimizers import Optimizer, load_state, state_of
from scuvae.model import VAE

# Takes the gradients of all that processes share and how many cells they are from, once a step, and
# begins to put in their place those from the cells of all; what it returns, if anything, ends that.
ReduceGradients = Callable[[list[Tensor], int], Callable[[], None] | None]


class Step:
    """A step of a fit, called with a batch.

    Parameters
    ----------
    optimizer
        Over the parameters that all cells share.
    n_obs
        Number of training cells: the loss of a batch of B cells weighs n/B.
    n_samples, kl_weight, output_precision, reduce_gradients
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
        reduce_gradients: ReduceGradients | None = None,
    ) -> None:
        self.model, self.posterior, self.optimizer = model, posterior, optimizer
        self.n_obs, self.n_samples, self.kl_weight = n_obs, n_samples, kl_weight
        self.output_precision = output_precision
        self.reduce_gradients = reduce_gradients
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
        """Whether the host has no part in what is done with gradients."""
        groups = self.optimizer.param_groups
        on_device = (
            group.get("capturable") and isinstance(group["lr"], Tensor) for group in groups
        )
        fixed = self.reduce_gradients is None and not self.model.likelihood.by_level
        return fixed and all(on_device)

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
        what the posterior minimises beside their loss.

        A batch without cells is one of which other processes have some.
        """
        model, posterior, kl_weight = self.model, self.posterior, self.kl_weight
        for parameter in self.parameters:  # as zero_grad does, without its hooks
            parameter.grad = None
        if not len(batch):
            self._move(self._reduced(0))
            return batch.size_factor.new_zeros(3)
        seen = posterior.seen(model, batch)
        q = posterior(model, seen, kl_weight)
        weight = self.n_obs / len(batch)
        terms, slope = descend(model, seen, q, self.n_samples, weight=weight, kl_weight=kl_weight)
        losses = F.pad(terms.sums(len(batch)), (0, 1))
        extra = posterior.descend(model, batch, weight=weight, kl_weight=kl_weight)
        if extra is not None:
            losses[2] = extra
        # Gradients are under way while the rows take their step.
        end = self._reduced(len(batch))
        posterior.step(model, batch, slope, scale=weight, kl_weight=kl_weight, rate=self._rate)
        self._move(end)
        return losses

    def _reduced(self, n_cells: int) -> Callable[[], None] | None:
        """Begin to reduce the gradients of all shared parameters, in one order in every process:
        zero where a loss has none."""
        if self.reduce_gradients is None:
            return None
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return self.reduce_gradients(found, n_cells)

    def _move(self, end: Callable[[], None] | None) -> None:
        """Move what all cells share."""
        if end is not None:
            end()
        # Of the weights, not of cells: however many processes see these, it counts once.
        if self.output_precision is not None:
            output = self.model.decoder.output.weight
            if output.grad is not None:
                output.grad.addcmul_(output.detach(), self.output_precision)
        self.model.likelihood.add_slopes_of_prior()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """All that steps move, by reference as torch has it, in nested dicts of tensors and plain
        values: what safetensors and JSON hold."""
        precision = self.output_precision
        return {
            "model": dict(self.model.state_dict()),
            "posterior": dict(self.posterior.state_dict()),
            "beside the tables": {name: part.training_state() for name, part in self._parts()},
            "optimizer": state_of(self.optimizer),
            "output precision": {} if precision is None else {"weight": precision},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, in the memory that there is."""
        self.model.load_state_dict(state["model"])
        self.posterior.load_state_dict(state["posterior"])
        for name, part in self._parts():
            part.load_training_state(state["beside the tables"][name])
        load_state(self.optimizer, state["optimizer"])
        if self.output_precision is not None:
            self.output_precision.copy_(state["output precision"]["weight"])

    def _parts(self) -> list[tuple[str, Posterior]]:
        """The posterior, and those that it is made of."""
        modules = self.posterior.named_modules()
        return [(name, part) for name, part in modules if isinstance(part, Posterior)]


def _set(old: float | Tensor, new: float) -> float | Tensor:
    return old.fill_(new) if isinstance(old, Tensor) else new
