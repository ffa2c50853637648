"""What covariates' columns do in a model's networks: read, replaced, and for further levels."""

import copy

import torch
from torch import Tensor, nn

from scuvae.model import VAE
from scuvae.model.covariates import Design


def with_offsets(model: VAE, offsets: Tensor, slopes: Tensor | None = None) -> VAE:
    """A copy of ``model`` whose covariates have the columns of ``offsets``: see known_offsets.

    ``slopes`` are those of the linear path, (genes, columns, latent): None for what they are.
    """
    model = copy.deepcopy(model)
    decoder = model.decoder
    assert decoder.offset is not None
    first, last = offsets.detach().clone().tensor_split([decoder.offset.out_features])
    decoder.offset.weight = nn.Parameter(first)
    decoder.offset.in_features = n_columns = first.shape[1]
    if decoder.linear_path:
        weight = decoder.output.weight.detach()
        n_hidden = weight.shape[1] - decoder.n_beside - decoder.n_slopes
        hidden, products, of_z, _ = weight.split(
            [n_hidden, decoder.n_slopes, decoder.n_latent, decoder.n_covariates], 1
        )
        products = products if slopes is None else slopes.flatten(1)
        decoder.output.weight = nn.Parameter(torch.cat([hidden, products, of_z, last], 1))
        decoder.output.in_features = decoder.output.weight.shape[1]
    decoder.n_covariates = n_columns
    return model


def known_slopes(model: VAE) -> Tensor | None:
    """What each column of the covariates adds to the linear path's slopes, (genes, columns,
    latent)."""
    decoder = model.decoder
    if not decoder.slopes:
        return None
    last = decoder.output.weight.detach()[:, : -decoder.n_beside]
    return last[:, -decoder.n_slopes :].unflatten(1, (decoder.n_covariates, decoder.n_latent))


def known_offsets(model: VAE) -> Tensor:
    """What each column of the covariates adds to the first layer and, where there is a linear path,
    to η below it: (width, columns), or (width + genes, columns)."""
    decoder = model.decoder
    if decoder.offset is None:
        raise ValueError("this decoder was fitted without batches: there is no offset to estimate")
    first = decoder.offset.weight.detach()
    if not decoder.linear_path:
        return first
    return torch.cat([first, decoder.output.weight.detach()[:, -decoder.n_covariates :]])


def with_design(model: VAE, design: Design) -> VAE:
    """A copy of ``model`` under a design with further levels, each the mean of those known."""
    slopes = known_slopes(model)
    if slopes is not None:
        flat = _widened(slopes.mT.flatten(0, 1), model.design, design)
        slopes = flat.unflatten(0, (model.n_vars, model.n_latent)).mT
    wider = with_offsets(model, _widened(known_offsets(model), model.design, design), slopes)
    wider.design = design
    if design.has_batch:
        wider.likelihood = wider.likelihood.with_levels(design.n_levels[0])
    encoder = wider.encoder
    if encoder is not None and encoder.n_covariates:
        for layer in encoder.entered:
            others, told = layer.weight.detach().tensor_split([-encoder.n_covariates], 1)
            told = _widened(told, model.design, design)
            layer.weight = nn.Parameter(torch.cat([others, told], 1))
            layer.in_features = layer.weight.shape[1]
        encoder.n_covariates = design.n_columns
    return wider


def _widened(columns: Tensor, known: Design, design: Design) -> Tensor:
    parts = []
    for number, (few, many) in enumerate(zip(known.n_levels, design.n_levels, strict=True)):
        part = columns[:, known.columns_of(number)]
        parts += [part, part.mean(1, keepdim=True).expand(-1, many - few)]
    return torch.cat([*parts, columns[:, sum(known.n_levels) :]], 1)
