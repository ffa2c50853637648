"""The encoder's q."""

from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.thinning import with_shallow
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.base import Posterior
from scuvae.model import VAE


class AmortizedPosterior(Posterior):
    """The encoder's q; it has no parameters of its own.

    Where values are counts it learns from thinned cells too: an encoder that has seen one depth
    only knows no other.
    """

    has_encoder = True
    refined = False

    def visit(self, on_host: Tensor) -> str | None:
        return "encoder"

    def seen(self, model: VAE, batch: Batch) -> Batch:
        return with_shallow(batch) if model.likelihood.support == "counts" else batch

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        return model.encode(batch)
