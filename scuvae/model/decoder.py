"""The decoder: from z and batches to the p outputs η."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae._random import generator_on, linear
from scuvae.model.likelihoods.autograd import accumulate

# Precisions of a normal prior of the weights that make η, where η is a logarithm: so many counts
# of a gene say as much. What hidden units add to the linear path has to be earned, among few cells
# dearly: those are fitted best by a decoder that is all but linear.
_HIDDEN_PRECISION, _LINEAR_PRECISION, _FEW_CELLS = 30.0, 3.0, 5000
# What z does otherwise in one batch than in the others, which types that differ in their batch
# effects ask for, has to be earned most dearly: a level's cells alone speak of it.
_SLOPE_PRECISION = 100.0


class Decoder(nn.Module):
    """A multilayer perceptron L → n_hidden (ReLU) × n_layers → genes; linear for ``n_layers=0``.

    With ``linear_path`` z and batches enter the last layer beside the hidden units,
    η = b + W h(z) + V z + o, and with ``slopes`` each batch b has its own V + V_b.

    Parameters
    ----------
    n_latent, n_vars
        Widths of its two ends.
    n_hidden, n_layers
        Width and number of hidden layers.
    n_covariates
        Number of batch categories, which shift the first layer's output.
    dropout
        Probability that a hidden unit is dropped in training; the linear path is not.
    linear_path
        Whether z and batches enter the last layer too.
    slopes
        Whether their products do, where there is a linear path.
    """

    def __init__(
        self,
        n_latent: int,
        n_vars: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_covariates: int = 0,
        dropout: float = 0.0,
        linear_path: bool = False,
        slopes: bool = False,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.linear_path = linear_path and n_layers > 0
        self.slopes = slopes and self.linear_path and n_covariates > 0
        widths = [n_latent, *[n_hidden] * n_layers, n_vars]
        self.n_covariates = n_covariates
        entering = [*widths[:-2], widths[-2] + self.n_slopes + self.n_beside]
        self.layers = nn.ModuleList(map(linear, entering, widths[1:]))
        self.offset = linear(n_covariates, widths[1], bias=False) if n_covariates else None
        self.dropout = dropout

    def forward(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """η of shape (..., cells, genes) for z of shape (..., cells, latent)."""
        eta: Tensor = self.layers[-1](self.hidden(z, covariates))
        return self._shift(eta, covariates) if len(self.layers) == 1 else eta

    @property
    def n_beside(self) -> int:
        """The last columns of the last layer, which take z and batches, in this order."""
        return self.linear_path * (self.n_latent + self.n_covariates)

    @property
    def n_slopes(self) -> int:
        """Columns between the hidden units' and these that take products, batches' outermost."""
        return self.slopes * self.n_latent * self.n_covariates

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return _linear(list(self.layers)[-1])

    def output_precision(self, n_obs: int) -> Tensor:
        """Precisions of a normal prior of the last layer's weights, (1, width), for logits η."""
        weight = self.output.weight
        precision = weight.new_full((1, weight.shape[1]), _LINEAR_PRECISION)
        if len(self.layers) > 1:
            first = weight.shape[1] - self.n_beside
            n_hidden = first - self.n_slopes
            precision[:, :n_hidden] = _HIDDEN_PRECISION * (1 + _FEW_CELLS / n_obs)
            of_a_level = n_obs / max(1, self.n_covariates)
            precision[:, n_hidden:first] = _SLOPE_PRECISION * (1 + _FEW_CELLS / of_a_level)
        return precision

    def hidden(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """What enters the last layer, (..., cells, width)."""
        return self._pass(z, covariates, None)

    def traced(
        self, z: Tensor, covariates: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As :meth:`hidden`, and of each hidden layer what entered it, and its gate."""
        trace: list[tuple[Tensor, Tensor]] = []
        return self._pass(z, covariates, trace), trace

    def reverse(
        self, slope: Tensor, trace: list[tuple[Tensor, Tensor]], covariates: Tensor | None = None
    ) -> Tensor:
        """Slopes in z of those in what :meth:`traced` gave; those of parameters become ``grad``."""
        layers = [_linear(layer) for layer in self.layers][:-1]
        direct = None
        if self.linear_path:
            parts = [self.n_slopes, self.n_latent, self.n_beside - self.n_latent]
            n_hidden = slope.shape[-1] - sum(parts)
            slope, products, direct, _ = slope.split([n_hidden, *parts], -1)
            if self.slopes:
                of_each = products.unflatten(-1, (self.n_covariates, self.n_latent))
                direct = direct + (self._given(covariates).unsqueeze(-1) * of_each).sum(-2)
        for i, (entered, gate) in reversed(list(enumerate(trace))):
            slope = slope * gate
            rows = slope.flatten(0, -2)
            if layers[i].weight.requires_grad:
                accumulate(layers[i].weight, rows.T @ entered.flatten(0, -2))
                accumulate(layers[i].bias, rows.sum(0))
            if i == 0 and self.offset is not None and covariates is not None:
                accumulate(
                    self.offset.weight, slope.view(-1, *slope.shape[-2:]).sum(0).T @ covariates
                )
            slope = slope @ layers[i].weight
        return slope if direct is None else slope + direct

    def _pass(
        self,
        z: Tensor,
        covariates: Tensor | None,
        trace: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = z
        for i, layer in enumerate(list(self.layers)[:-1]):
            entered, out = out, layer(out)
            if i == 0:
                out = self._shift(out, covariates)
            if trace is None and not dropout:
                out = F.relu(out)
                continue
            out, gate = gated(out, dropout)
            if trace is not None:
                trace.append((entered, gate))
        return self._beside(out, z, covariates) if self.linear_path else out

    def _beside(self, hidden: Tensor, z: Tensor, covariates: Tensor | None) -> Tensor:
        """What is hidden, products, z and batches, side by side."""
        if self.offset is None:
            return torch.cat([hidden, z], -1)
        given = self._given(covariates).expand(*z.shape[:-1], -1)
        if not self.slopes:
            return torch.cat([hidden, z, given], -1)
        products = (given.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        return torch.cat([hidden, products, z, given], -1)

    @property
    def last(self) -> nn.Linear | None:
        """The layer that takes what is hidden to η; None where batches shift that too."""
        return None if len(self.layers) == 1 and self.offset else self.output

    def jacobian(self, z: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """η, (cells, genes), and ∂η/∂z transposed, (cells, latent, genes), for z (cells, latent).

        Forward mode: L tangents a cell in one pass, as in evaluation, without dropout.
        """
        out, tangent, weight = self.linearize(z, covariates)
        return out, tangent @ weight.T

    def linearize(
        self, z: Tensor, covariates: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """η, and the Jacobian as a product of the last layer's weight, (genes, width), and the
        tangents of what enters it, (cells, latent, width): ∂η/∂z transposed is T Wᵀ."""
        *before, last = map(_linear, self.layers)
        out = z
        tangent = torch.eye(self.n_latent, dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
        for i, layer in enumerate(before):
            # The tangents of z are the unit vectors: their product is the weight itself.
            tangent = tangent @ layer.weight.T if i else layer.weight.T.expand(len(z), -1, -1)
            out = layer(out)
            if i == 0:
                out = self._shift(out, covariates)
            tangent = tangent * (out > 0).unsqueeze(-2)
            out = F.relu(out)
        if self.linear_path:
            eye = torch.eye(self.n_latent, self.n_beside, dtype=z.dtype, device=z.device)
            parts = [tangent, eye.expand(len(z), -1, -1)]
            if self.slopes:
                given = self._given(covariates).expand(len(z), -1)
                products = given[:, None, :, None] * eye[None, :, None, : self.n_latent]
                parts.insert(1, products.flatten(-2))
            tangent = torch.cat(parts, -1)
            out = self._beside(out, z, covariates)
        eta = last(out)
        return (eta if before else self._shift(eta, covariates)), tangent, last.weight

    def _shift(self, values: Tensor, covariates: Tensor | None) -> Tensor:
        if self.offset is None:
            return values
        shifted: Tensor = values + self.offset(self._given(covariates))
        return shifted

    @staticmethod
    def _given(covariates: Tensor | None) -> Tensor:
        if covariates is None:
            raise TypeError("this decoder was fitted with batches: pass covariates=, one-hot rows")
        return covariates


def gated(entered: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """ReLU and dropout: what passes, and what each unit was multiplied by: 0, or 1/(1−p) where it
    is positive and kept; p to 2⁻¹⁶.

    From 16 bits a unit: F.dropout draws from a Bernoulli, which on a CPU takes eight times as long.
    """
    if not p:
        open_ = (entered > 0).to(entered.dtype)
        return entered * open_, open_
    n, dropped = entered.numel(), min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=entered.device)
    draws = (
        bits.random_(-(2**63), None, generator=generator_on(bits.device))
        .view(torch.int16)[:n]
        .view(entered.shape)
    )
    least, gain = dropped - 2**15, 2**16 / (2**16 - dropped)
    gate = ((draws >= least) & (entered > 0)) * gain
    return entered * gate, gate


def _linear(layer: nn.Module) -> nn.Linear:
    """A module list forgets what it holds; type checkers need to know."""
    assert isinstance(layer, nn.Linear)
    return layer
