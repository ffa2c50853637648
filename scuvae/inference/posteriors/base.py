"""q(z) for the cells of a batch: from an encoder, from a row of a table, or from both.

A posterior is called with the model and a batch and hands out q; after the backward pass it may
take a local step. Gradients of the loss reach an encoder through autograd, and a table's rows
through the leaves that the call made.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE


class Rows(Protocol):
    """A table of parameters, a row a cell."""

    mean: Tensor

    def __call__(self, model: VAE, batch: Batch) -> Gaussian:
        """q of the batch's cells."""

    def store(self, rows: Tensor, q: Gaussian) -> None:
        """Put ``q`` into the table's rows."""


class Posterior(nn.Module, ABC):
    """Hands out q for a batch of cells.

    A scheme is a class in ``POSTERIORS``, by a name that ``tl.fit(amortized=)`` then takes. One
    that :attr:`has_rows` is made with the table that cells start from, ``(mean, raw, *,
    local_step, optimizer, learning_rate)``, any other without arguments.
    """

    has_encoder: ClassVar[bool] = False
    """Whether the model has an encoder, ``model.encode``."""
    has_rows: ClassVar[bool] = False
    """Whether cells have parameters of their own, which :meth:`rows` hands out."""
    refined: ClassVar[bool] = True
    """Whether a cell's final q is refined under the final decoder, or as the posterior has it."""

    def rows(self) -> Rows | None:
        """The table of cells' own parameters, where there is one."""
        return None

    @abstractmethod
    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        """q for the cells of the batch; ``kl_weight`` is that of the fit."""

    def visit(self, on_host: Tensor) -> str | None:
        """Note that these rows, given on the host, are visited next: before each training step.

        Returned is the kind of step that it will be. Steps of a kind, on as many cells, do the same
        with other numbers; None where what is done depends on numbers.
        """
        return None

    def seen(self, model: VAE, batch: Batch) -> Batch:
        """What a training step is taken on: the batch's cells, and perhaps others behind them.

        Losses are those of the batch's cells; the others count in gradients alone.
        """
        return batch

    def step(
        self,
        model: VAE,
        batch: Batch,
        slope: Tensor,
        *,
        scale: float,
        kl_weight: float,
        rate: float | Tensor = 1.0,
    ) -> None:
        """A local step after the backward pass.

        ``slope`` is the gradient of the reconstruction's loss in the draws of the last q, ``scale``
        what the loss of a cell weighs, ``rate`` the schedule's factor on step sizes.
        """

    def descend(
        self, model: VAE, batch: Batch, *, weight: float, kl_weight: float
    ) -> Tensor | None:
        """The backward pass of ``weight`` times what is minimised beside the loss of the last q.

        Returned is that, summed over the batch, or None where there is nothing.
        """
        return None

    def training_state(self) -> dict[str, Any]:
        """What steps have left beside the tables of ``state_dict()``, to go on from: tensors, plain
        values, and dicts of such; what parts that are posteriors have, these say themselves."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`training_state` gave."""
