"""What a pass over rows of logits gives beside log p."""

from typing import NamedTuple

from torch import Tensor


class Slopes(NamedTuple):
    """How each row's log p moves: in η, (..., cells, genes), and in ln ℓ, (..., cells).

    ``parameters`` has the slopes in each parameter, of the shape of η, or for parameters that all
    rows share their sum over rows, (genes,), where the passes take it: then ``eta_sum`` is that of
    η. What is not wanted is None.
    """

    eta: Tensor
    size: Tensor
    eta_sum: Tensor | None = None
    parameters: tuple[Tensor | None, ...] = ()

    def view(self, shape: tuple[int, ...]) -> "Slopes":
        """With rows in the shape (..., cells)."""
        own = (p if p is None or p.dim() == 1 else p.view(*shape, -1) for p in self.parameters)
        return Slopes(self.eta.view(*shape, -1), self.size.view(shape), self.eta_sum, tuple(own))
