"""A trained module of scvi-tools as a model that refinement can work on.

:class:`Bridge` has what :func:`scuvae.inference.refinement.refine.refine` asks of a VAE:
``log_likelihood``, ``curvature``, ``prior`` and the widths. The usual decoder is read as one of
ours, which is faster. Others stay scvi-tools' own, so that layers, norms, activations and
covariates are what they were in training; their Jacobians are forward mode.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scuvae.batches import Batch, SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.distributions.gaussian import Gaussian
from scuvae.external._last_layer import LastLayer
from scuvae.external._likelihoods import LIKELIHOODS, Heads
from scuvae.external._scvi_decoder import as_decoder
from scuvae.model import VAE, Decoder
from scuvae.model.curvature import cells_at_once, jacobian_gram, weighted_gram
from scuvae.model.likelihoods import negative_binomial
from scuvae.model.priors.standard_normal import StandardNormal

# Names of tensors in scvi-tools' batches (``scvi.REGISTRY_KEYS``).
_X, _BATCH, _LABELS = "X", "batch", "labels"
_CONTINUOUS, _CATEGORICAL = "extra_continuous_covs", "extra_categorical_covs"
_SIZE_FACTOR = "size_factor"
# An empty cell has a size factor of 0.
_TINY = 1e-30


class Bridge(nn.Module):
    """p(x | z) of a module, copied, in evaluation mode, its weights frozen.

    ``Batch.covariates`` holds all that the decoder is told beside z, in one row a cell: continuous
    covariates, batch embedding, one-hot categories, and the number of the dispersion's column.

    Without ``whole_curvature`` that of log p is what it is by way of the means alone, which is
    enough for a climb and takes half of the time, or a third with zero inflation.
    """

    def __init__(self, module: Any, device: torch.device, *, whole_curvature: bool = False) -> None:
        super().__init__()
        self.whole_curvature = whole_curvature
        self.module = copy.deepcopy(module).to(device).eval().requires_grad_(False)
        self.module.minified_data_type = None  # its encoder is asked about counts
        self.likelihood = LIKELIHOODS[module.gene_likelihood]
        self.n_latent, self.n_vars = int(module.n_latent), int(module.n_input)
        self.linear = not hasattr(module.decoder, "px_decoder")
        self.device = device
        self.prior = StandardNormal(self.n_latent).to(device)
        self.network = as_decoder(self.module.decoder, self.n_latent, self._n_conditions)

    def as_vae(self) -> VAE:
        """Itself, for functions that are typed for our own model and use only what is here."""
        return cast(VAE, self)

    @torch.no_grad()
    def read(self, tensors: dict[str, Tensor], index: Tensor) -> tuple[Batch, Gaussian]:
        """A batch of scvi-tools' loader as one of ours, and the encoder's q for it."""
        given = {name: value.to(self.device) for name, value in tensors.items()}
        x = given[_X].float()
        inputs = self.module._get_inference_input(given)
        qz = self.module.inference(**inputs)["qz"]
        scale = given[_SIZE_FACTOR] if self.module.use_size_factor_key else x.sum(1, keepdim=True)
        batch = Batch(
            x if self.module.gene_likelihood == "normal" else SparseRows.from_dense(x),
            index.to(self.device),
            scale.float().squeeze(-1),
            self._conditions(given),
        )
        return batch, Gaussian(qz.loc, qz.scale)

    def log_likelihood(self, batch: Batch, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (..., cells), for draws z of shape (..., cells, latent)."""
        if self._is_ours:
            conditions = cast(Tensor, batch.covariates)
            size = batch.size_factor.clamp_min(_TINY)
            if self.network is not None:
                hidden = self.network.hidden(z, conditions)
                return self._last_layer(self.network).log_prob(sparse(batch.x), hidden, size)
            eta, logit, _ = self._decode(z.flatten(0, -2), _repeat(conditions, z))
            shape = (*z.shape[:-1], self.n_vars)
            logit = None if logit is None else logit.view(shape)
            px_r = self.module.px_r
            return negative_binomial.log_prob(sparse(batch.x), eta.view(shape), size, px_r, logit)
        return self.likelihood.log_prob(batch.x, self.heads(batch, z))

    def log_likelihood_and_slope(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | z), (..., cells), and its slope in z, of its shape."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = self.log_likelihood(batch, leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    @property
    def in_blocks(self) -> bool:
        """Whether log p and its slopes are made a block of logits at a time."""
        return self._is_ours and self.network is not None

    def _last_layer(self, network: Decoder) -> LastLayer:
        inflated = self.module.gene_likelihood == "zinb"
        head = self.module.decoder.px_dropout_decoder if inflated else None
        return LastLayer(cast(nn.Linear, network.layers[-1]), head, self.module.px_r)

    @property
    def _is_ours(self) -> bool:
        """Whether log p(x | η) is our negative binomial, which is faster than these."""
        module = self.module
        counts = module.gene_likelihood in ("nb", "zinb")
        return counts and module.dispersion == "gene" and not module.use_size_factor_key

    def heads(self, batch: Batch, z: Tensor) -> Heads:
        conditions = cast(Tensor, batch.covariates)
        eta, logit, log_theta = self._decode(z.flatten(0, -2), _repeat(conditions, z))
        shape = (*z.shape[:-1], self.n_vars)
        log_mu = self._activation(eta.view(shape)) + _log(batch.size_factor).unsqueeze(-1)
        return Heads(
            log_mu,
            None if logit is None else logit.view(shape),
            self._dispersion(conditions) if log_theta is None else log_theta.view(shape),
        )

    @torch.no_grad()
    def curvature(self, batch: Batch, z: Tensor) -> Tensor:
        """−∇²_z log p(x | z), about, (cells, latent, latent); a few cells at a time."""
        if self.network is not None and not self.whole_curvature:
            return self._curvature_of_mean(batch, z)
        chunk = cells_at_once(self.n_vars * z.shape[-1], z.device)
        parts = []
        for rows in torch.arange(len(z), device=z.device).split(chunk):
            root = self.curvature_root(batch.take(rows), z[rows])
            parts.append(weighted_gram(root, root.new_ones(len(root), root.shape[-1])))
        return torch.cat(parts)

    def _curvature_of_mean(self, batch: Batch, z: Tensor) -> Tensor:
        """By way of log μ alone, the parts of dropouts and dispersions left out."""
        assert self.network is not None
        conditions = cast(Tensor, batch.covariates)
        eta, tangent, weight = self.network.linearize(z, conditions)
        logit, log_theta = self._rest(self.network.hidden(z, conditions))
        if log_theta is None:
            log_theta = self._dispersion(conditions)
        log_mu = self._activation(eta) + _log(batch.size_factor).unsqueeze(-1)
        fisher = self.likelihood.fisher(Heads(log_mu, logit, log_theta))
        if self.module.use_size_factor_key:  # μ = ℓ softplus(η)
            fisher = fisher * (torch.sigmoid(eta) / F.softplus(eta)).square()
            return jacobian_gram(tangent, weight, fisher)
        shift = -(tangent @ (eta.softmax(-1) @ weight).unsqueeze(-1))  # μ = ℓ softmax(η)
        return jacobian_gram(tangent, weight, fisher, shift)

    def curvature_root(self, batch: Batch, z: Tensor) -> Tensor:
        """R with R Rᵀ ≈ −∇²_z log p(x | z), (cells, latent, outputs)."""
        conditions = cast(Tensor, batch.covariates)
        (eta, logit, log_theta), slopes = self._linearize(z, conditions)
        slope = slopes[0]
        if log_theta is None:
            log_theta = self._dispersion(conditions)
        if self.module.use_size_factor_key:  # μ = ℓ softplus(η)
            slope = slope * (torch.sigmoid(eta) / F.softplus(eta)).unsqueeze(-2)
        else:  # μ = ℓ softmax(η)
            slope = slope - slope @ eta.softmax(-1).unsqueeze(-1)
        log_mu = self._activation(eta) + _log(batch.size_factor).unsqueeze(-1)
        heads = Heads(log_mu, logit, log_theta)
        return self.likelihood.root(heads, Heads(slope, slopes[1], slopes[2]))

    # --- the networks ----------------------------------------------------------------------------

    def _linearize(self, z: Tensor, conditions: Tensor) -> tuple[Any, Any]:
        """What :meth:`_decode` says, and its slopes in z, (cells, latent, genes), or None."""
        if self.network is not None:
            eta, tangent, weight = self.network.linearize(z, conditions)
            logit, log_theta = self._rest(self.network.hidden(z, conditions))
            layers = (self.module.decoder.px_dropout_decoder, self.module.decoder.px_r_decoder)
            slopes = [
                None if head is None else tangent @ layer.weight.T
                for head, layer in zip((logit, log_theta), layers, strict=True)
            ]
            return (eta, logit, log_theta), (tangent @ weight.T, *slopes)

        def decode(z: Tensor) -> tuple[Tensor, ...]:
            return tuple(head for head in self._decode(z, conditions) if head is not None)

        def along(direction: Tensor) -> Any:
            return torch.func.jvp(decode, (z,), (direction.expand_as(z),))

        basis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        outputs: Any = (None, 1)  # values once, slopes for each direction
        values, found = torch.func.vmap(along, out_dims=outputs)(basis)
        there = [head is not None for head in self._decode(z[:1], conditions[:1])]
        left, left_slopes = iter(values), iter(found)
        heads = tuple(next(left) if is_there else None for is_there in there)
        return heads, tuple(next(left_slopes) if is_there else None for is_there in there)

    def _decode(self, z: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """η, logit and log θ as functions of z, (cells, genes); None where there is no such."""
        decoder = self.module.decoder
        if self.network is not None:
            h = self.network.hidden(z, conditions)
            return self.network.layers[-1](h), *self._rest(h)
        beside, categories = self._split(conditions)
        entered = torch.cat([z, beside], -1)
        if self.linear:
            inflated = self.module.gene_likelihood == "zinb"
            eta = decoder.factor_regressor(entered, *categories)
            logit = decoder.px_dropout_decoder(entered, *categories) if inflated else None
            return eta, logit, None
        h = decoder.px_decoder(entered, *categories)
        return decoder.px_scale_decoder[0](h), *self._rest(h)

    def _rest(self, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logit and log θ of what is hidden."""
        module, decoder = self.module, self.module.decoder
        logit = decoder.px_dropout_decoder(h) if module.gene_likelihood == "zinb" else None
        per_cell = module.dispersion == "gene-cell" and module.gene_likelihood != "poisson"
        return logit, decoder.px_r_decoder(h) if per_cell else None

    def _activation(self, eta: Tensor) -> Tensor:
        if self.module.use_size_factor_key:
            return _log(F.softplus(eta))
        return F.log_softmax(eta, -1)

    def _dispersion(self, conditions: Tensor) -> Tensor | None:
        """log θ where it does not depend on z: (genes,), or (cells, genes)."""
        module = self.module
        if module.gene_likelihood == "poisson" or module.dispersion == "gene-cell":
            return None
        px_r: Tensor = module.px_r
        return px_r if module.dispersion == "gene" else px_r.T[conditions[:, -1].long()]

    # --- what the decoder is told beside z -------------------------------------------------------

    @property
    def _categories(self) -> list[int]:
        decoder = self.module.decoder
        layers = decoder.factor_regressor if self.linear else decoder.px_decoder
        return list(layers.n_cat_list)  # 0 for one that says nothing

    @property
    def _n_conditions(self) -> int:
        """Columns of ``Batch.covariates``: what is beside z in the first layer, and one."""
        decoder = self.module.decoder
        layers = decoder.factor_regressor if self.linear else decoder.px_decoder
        return int(layers.fc_layers[0][0].in_features) - self.n_latent + 1

    def _conditions(self, given: dict[str, Tensor]) -> Tensor:
        module, which = self.module, given[_BATCH]
        columns = [given[_CONTINUOUS].float()] if _CONTINUOUS in given else []
        codes = [which]
        if module.batch_representation == "embedding":
            columns.append(module.compute_embedding(_BATCH, which))
            codes = []
        if _CATEGORICAL in given:
            codes += list(given[_CATEGORICAL].split(1, dim=1))
        for code, n in zip(codes, self._categories, strict=False):
            if n:
                columns.append(F.one_hot(code.squeeze(-1).long(), n).float())
        labels = given.get(_LABELS)
        column = labels if module.dispersion == "gene-label" and labels is not None else which
        return torch.cat([*columns, column.float()], 1)

    def _split(self, conditions: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        widths = self._categories
        rest, categories = conditions[:, :-1], list[Tensor | None]()
        first = rest.shape[1] - sum(widths)
        start = first
        for n in widths:
            categories.append(rest[:, start : start + n] if n else None)
            start += n
        return rest[:, :first], categories


def _repeat(conditions: Tensor, z: Tensor) -> Tensor:
    """The cells' conditions for every draw, as rows."""
    return conditions.expand(*z.shape[:-1], -1).flatten(0, -2)


def _log(values: Tensor) -> Tensor:
    """ln, finite for an empty cell."""
    return values.clamp_min(_TINY).log()
