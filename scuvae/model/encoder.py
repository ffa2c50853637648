"""The encoder: from values to q, in one pass."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae._random import linear
from scuvae.distributions.gaussian import Gaussian, n_scale_parameters


class BatchNorm(nn.Module):
    """Batch normalisation that a batch of a single cell passes with the running moments."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(n_features)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training and len(x) == 1:
            return F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        out: Tensor = norm(x)
        return out


NORMALIZATIONS: dict[str, type[nn.Module]] = {
    "batch": BatchNorm,
    "layer": nn.LayerNorm,
    "none": nn.Identity,
}


INPUTS = ("values", "log1p", "profile")

# What a cell's counts are scaled to before their logarithm: about a shallow cell's total.
_TOTAL = 1000.0


def encoder_input(x: Tensor, kind: str) -> Tensor:
    """What an encoder sees of values x, (cells, genes): see :class:`Encoder`.

    A profile is log(1 + 1000 x / ℓ), ℓ the cell's total, with ½ ln ℓ − 3 as one more column:
    (cells, genes + 1).
    """
    if kind == "values":
        return x
    if kind == "log1p":
        return x.log1p()
    total = x.sum(-1, keepdim=True).clamp_min(1.0)
    return torch.cat([(x * (_TOTAL / total)).log1p(), 0.5 * total.log() - 3], -1)


class Encoder(nn.Module):
    """A multilayer perceptron genes → n_hidden (ReLU, norm) × n_layers → mean and scale of q.

    Parameters
    ----------
    n_vars, n_latent
        Widths of its two ends.
    n_hidden, n_layers
        Width and number of hidden layers.
    covariance
        ``"diagonal"`` or ``"full"``: which q it hands out.
    inputs
        How values enter: as they are (``"values"``), as log(1 + x) (``"log1p"``), or as the
        logarithm of a profile of one total beside the logarithm of the cell's own (``"profile"``).
        Hidden units that see log(1 + x) are moved by depth more than by anything else, and are led
        astray by depths that they have not seen.
    normalization
        ``"batch"``, ``"layer"`` or ``"none"``, after each ReLU.
    n_covariates
        Number of covariates' columns, which enter beside the values; 0: it is not told of them.
    """

    def __init__(
        self,
        n_vars: int,
        n_latent: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        covariance: str = "diagonal",
        inputs: str = "values",
        normalization: str = "batch",
        n_covariates: int = 0,
    ) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        widths = [n_vars + (inputs == "profile") + n_covariates, *[n_hidden] * n_layers]
        for a, b in pairwise(widths):
            hidden += [linear(a, b), nn.ReLU(), NORMALIZATIONS[normalization](b)]
        self.hidden = nn.Sequential(*hidden)
        self.mean = linear(widths[-1], n_latent)
        self.scale = linear(widths[-1], n_scale_parameters(n_latent, covariance))
        self.inputs = inputs
        self.n_covariates = n_covariates

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Gaussian:
        """q(z | x, covariates) for values x of shape (cells, genes)."""
        entering = encoder_input(x, self.inputs)
        if self.n_covariates:
            if covariates is None:
                raise TypeError("this encoder was fitted with covariates: pass covariates=")
            entering = torch.cat([entering, covariates], 1)
        h = self.hidden(entering)
        return Gaussian.of(self.mean(h), self.scale(h))

    @property
    def entered(self) -> list[nn.Linear]:
        """The layers that take values and covariates: one, but where there are no hidden ones."""
        layers = [next(iter(self.hidden))] if len(self.hidden) else [self.mean, self.scale]
        return [layer for layer in layers if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def settle(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Take the batch norms' moments anew under the present weights, from all batches: their
        values and covariates.

        Their running averages trail the weights, by which the encoder loses nats.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d)]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
        training = self.training
        self.train()
        for x, covariates in batches:
            if len(x) > 1:  # one cell has no variance
                self(x, covariates)
        self.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
