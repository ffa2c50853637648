"""The hidden layers of an scvi-tools decoder as a :class:`~scuvae.model.Decoder` of ours.

In evaluation mode a batch norm is linear: linear, batch norm, ReLU is one layer. Jacobians of ours
are explicit products.
"""

from typing import Any

import torch
from torch import nn

from scuvae.model import Decoder


@torch.no_grad()
def as_decoder(decoder: Any, n_latent: int, n_conditions: int) -> Decoder | None:
    """z → what the softmax is of, or None where the layers are other than these.

    ``n_conditions`` columns shift the first layer: all that the decoder is told beside z, in the
    order of its weights, then some that it is not told. In further layers it must be told nothing.
    """
    layers = getattr(getattr(decoder, "px_decoder", None), "fc_layers", None)
    last = decoder.px_scale_decoder[0] if layers is not None else None
    if not layers or not isinstance(last, nn.Linear) or last.bias is None:
        return None
    folded = [_folded(layer) for layer in layers]
    width = last.in_features
    if any(layer is None or len(layer[0]) != width for layer in folded):
        return None
    if any(layer is not None and layer[0].shape[1] != width for layer in folded[1:]):
        return None
    with torch.device("meta"):  # initial weights would take random numbers
        out = Decoder(
            n_latent,
            last.out_features,
            n_hidden=width,
            n_layers=len(folded),
            n_covariates=n_conditions,
        )
    out = out.to_empty(device=last.weight.device).to(last.weight.dtype)
    for i, (weight, bias) in enumerate(layer for layer in folded if layer is not None):
        if i == 0:
            beside = weight[:, n_latent:]
            assert out.offset is not None
            out.offset.weight.zero_()[:, : beside.shape[1]] = beside
            weight = weight[:, :n_latent]
        _put(out.layers[i], weight, bias)
    _put(out.layers[-1], last.weight, last.bias)
    return out.eval().requires_grad_(False)


def _folded(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight and bias of linear, batch norm or none, ReLU, in float64."""
    parts = [part for part in layer if part is not None and not isinstance(part, nn.Dropout)]
    kinds = [type(part) for part in parts]
    if kinds not in ([nn.Linear, nn.ReLU], [nn.Linear, nn.BatchNorm1d, nn.ReLU]):
        return None
    weight, bias = parts[0].weight.double(), parts[0].bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    if len(parts) == 2:
        return weight, bias
    norm = parts[1]
    if norm.running_mean is None or norm.running_var is None:
        return None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.double()
    bias = (bias - norm.running_mean.double()) * gain
    bias = bias if norm.bias is None else bias + norm.bias.double()
    return weight * gain[:, None], bias


def _put(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
