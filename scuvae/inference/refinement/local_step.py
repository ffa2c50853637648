"""How q of single cells moves, the decoder frozen: what the entries of ``LOCAL_STEPS`` have."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE


class Table(Protocol):
    """A row of parameters for every cell: means, and scales as in :meth:`Gaussian.of`."""

    mean: Tensor
    raw: Tensor

    def store(self, rows: Tensor, q: Gaussian) -> None:
        """Put ``q`` into the table's rows."""


class LocalStep(ABC):
    """A local step: of q until it converges, by :meth:`refine`, and of a table's rows in training.

    A class in ``LOCAL_STEPS``, by a name that ``tl.fit(local_step=)`` then takes. A fit makes it
    with its table; ``optimizer`` and ``learning_rate`` are those of the fit.
    """

    covariance: ClassVar[str] = "diagonal"
    """The family of q where ``tl.fit`` is not told."""
    pca_start: ClassVar[bool] = True
    """Whether cells start from a PCA, or from the prior's mean."""
    measured: ClassVar[bool] = False
    """Whether a fit by Adam has the recipe that was measured with natural steps: a linear start,
    dropout, priors of weights and their rates. Others are plain networks."""
    held_out: ClassVar[tuple[int, int]] = (20, 5)
    """Steps on held-out cells at the first judgement, from the encoder or the prior, and at later
    ones, from the last q: it moves little between them."""
    options: ClassVar[dict[str, Any]] = {}
    """Of :meth:`refine`, where a verb is not told how many steps."""
    thorough: ClassVar[dict[str, Any]] = {}
    """Of :meth:`refine` in a diagnosis, where some more steps do not matter."""
    before_polish: ClassVar[dict[str, Any]] = {}
    """Of :meth:`refine` where ``polish`` follows, which ``tl.project`` has where there are any."""
    through_q: ClassVar[bool] = False
    """Whether :meth:`step` takes the gradients in mean and scale parameters, which cost a step
    much, or that of the reconstruction in the draws alone."""

    def __init__(self, table: Table, optimizer: str, learning_rate: float) -> None:
        self.table = table

    @staticmethod
    @abstractmethod
    def refine(
        model: VAE,
        batch: Batch,
        q: Gaussian,
        *,
        max_steps: int = 20,
        n_samples: int = 2,
        kl_weight: float = 1.0,
    ) -> Gaussian:
        """A better q of q's own family for each of the batch's cells.

        Parameters
        ----------
        model
            In evaluation mode; it is not moved.
        max_steps
            Steps at most.
        n_samples
            Draws that an expectation under q is taken over.
        kl_weight
            β, the weight of the KL term.
        """

    def visit(self, on_host: Tensor) -> str | None:
        """As of :class:`scuvae.inference.posteriors.Posterior`."""
        return None

    def step(
        self,
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        *,
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None:
        """Move the rows of a batch whose q was drawn from: by default, one step of :meth:`refine`.

        Parameters
        ----------
        gradients
            Of ``scale`` times each cell's loss: see :attr:`through_q`.
        rate
            The schedule's factor on step sizes.
        """
        training = model.training
        model.eval()
        found = self.refine(model, batch, q, max_steps=1, kl_weight=kl_weight)
        model.train(training)
        self.table.store(batch.index, found)

    def state_dict(self) -> dict[str, Any]:
        """What steps have left beside the table: tensors, plain values and dicts of such."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what :meth:`state_dict` gave."""
