"""Small models and batches that the tests share."""

import inspect
import math

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from scuvae.batches import Batch, SparseRows
from scuvae.distributions.gaussian import Gaussian, n_scale_parameters
from scuvae.inference.posteriors import POSTERIORS, Posterior
from scuvae.model import VAE, Decoder, Encoder
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.priors.standard_normal import StandardNormal

# Each likelihood once: aliases name the same class.
UNIQUE = sorted({cls.name for cls in LIKELIHOODS.values()})
COUNTS = [name for name in UNIQUE if LIKELIHOODS[name].support == "counts"]

EPS = torch.finfo(torch.float32).eps


def likelihood_of(
    name: str, n_vars: int, dtype: torch.dtype = torch.float64, spread: float = 0.7
) -> Likelihood:
    """A likelihood whose every parameter is away from its initial value."""
    likelihood = LIKELIHOODS[name](n_vars).to(dtype)
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter += spread * torch.randn_like(parameter)
    return likelihood


def batch_of(
    x: Tensor,
    *,
    index: Tensor | None = None,
    size_factor: Tensor | None = None,
    covariates: Tensor | None = None,
    observed: Tensor | None = None,
    sparse: bool = False,
) -> Batch:
    seen = x if observed is None else x[:, observed]
    return Batch(
        SparseRows.from_dense(x) if sparse else x,
        torch.arange(len(x)) if index is None else index,
        seen.sum(1) if size_factor is None else size_factor,
        covariates,
        observed,
    )


def model_of(
    name: str,
    *,
    n_latent: int = 2,
    n_vars: int = 12,
    n_hidden: int = 16,
    n_layers: int = 1,
    n_covariates: int = 0,
    linear_path: bool = False,
    slopes: bool = False,
    gain: float = 2.0,
    encoder: bool = False,
    covariance: str = "diagonal",
    normalization: str = "layer",
    dtype: torch.dtype = torch.float64,
) -> VAE:
    """A random model in evaluation mode; ``gain`` says how much the latent variable matters."""
    decoder = Decoder(
        n_latent,
        n_vars,
        n_hidden=n_hidden,
        n_layers=n_layers,
        n_covariates=n_covariates,
        linear_path=linear_path,
        slopes=slopes,
    )
    with torch.no_grad():
        for layer in decoder.layers:
            layer.weight.normal_().mul_(gain ** (1 / len(decoder.layers)))
            layer.weight.div_(math.sqrt(layer.in_features))
            layer.bias.normal_().mul_(0.3)
    likelihood = likelihood_of(name, n_vars)
    encoding = None
    if encoder:
        encoding = Encoder(
            n_vars,
            n_latent,
            n_hidden=n_hidden,
            covariance=covariance,
            inputs="log1p" if likelihood.support == "counts" else "values",
            normalization=normalization,
        )
    return VAE(decoder, likelihood, encoding).to(dtype).eval()


def cells_of(model: VAE, n_cells: int, total: float = 60.0) -> Tensor:
    """Cells drawn from the model, with totals spread around ``total`` where they are counts."""
    like = next(model.decoder.parameters())
    z = torch.randn(n_cells, model.n_latent, dtype=like.dtype)
    size = total * torch.exp(0.5 * torch.randn(n_cells, dtype=like.dtype))
    with torch.no_grad():
        return model.likelihood.sample(model.decoder(z), size)


def linear_gaussian(
    *, n_latent: int = 3, n_vars: int = 20, scale: float = 0.5, dtype: torch.dtype = torch.float64
) -> VAE:
    """x = W z + b + σ ε, where everything has a closed form."""
    model = model_of("gaussian", n_latent=n_latent, n_vars=n_vars, n_layers=0, dtype=dtype)
    with torch.no_grad():
        model.likelihood.scale_raw.fill_(math.log(math.expm1(scale)))
    return model


def exact_posterior(model: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, (cells, latent), and precision, (latent, latent), of p(z | x) of a linear model."""
    (layer,) = model.decoder.layers
    w, b, scale = layer.weight.detach(), layer.bias.detach(), model.likelihood.scale.detach()
    precision = torch.eye(w.shape[1], dtype=w.dtype) + (w.T / scale**2) @ w
    return torch.linalg.solve(precision, (w.T / scale**2) @ (x - b).T).T, precision


def exact_evidence(model: VAE, x: Tensor) -> Tensor:
    """log N(x; b, W Wᵀ + σ² I) of a linear model, (cells,)."""
    (layer,) = model.decoder.layers
    w, b, scale = layer.weight.detach(), layer.bias.detach(), model.likelihood.scale.detach()
    return torch.distributions.MultivariateNormal(b, w @ w.T + torch.diag(scale**2)).log_prob(x)


def posterior_of(
    name: str, n_cells: int, n_latent: int, covariance: str = "diagonal", **options: object
) -> Posterior:
    """A registered posterior; one with a table gets random rows."""
    kind = POSTERIORS[name]
    given = {
        "mean": 0.5 * torch.randn(n_cells, n_latent, dtype=torch.float64),
        "raw": 0.3 * torch.randn(n_cells, n_scale_parameters(n_latent, covariance)).double(),
        **options,
    }
    wanted = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in given.items() if key in wanted})


def quadrature(model: VAE, x: Tensor) -> tuple[Tensor, Gaussian]:
    """log p(x), and the moments of p(z | x) as a q, with one latent dimension.

    A trapezoidal rule over the prior's whole range: for peaks some nodes wide, as these are, its
    error is far below 1e-6.
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    step = float(z[1] - z[0])
    batch = batch_of(x)
    with torch.no_grad():
        log_joint = model.log_likelihood(batch, z[:, None].expand(-1, len(x), -1))
        log_joint = log_joint - 0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    evidence = log_joint.logsumexp(0) + math.log(step)
    density = log_joint.softmax(0)
    mean = (density * z).sum(0)
    scale = (density * (z - mean).square()).sum(0).sqrt()
    assert (scale > 4 * step).all()
    return evidence, Gaussian(mean[:, None], scale[:, None])


def as_q(distribution: Distribution) -> Gaussian:
    """A torch distribution as the package's own q."""
    if isinstance(distribution, MultivariateNormal):
        return Gaussian(distribution.mean, distribution.scale_tril)
    return Gaussian(distribution.mean, distribution.stddev)


def kl_to_prior(q: Gaussian) -> Tensor:
    """KL(q ‖ N(0, I)), (cells,)."""
    return StandardNormal(q.mean.shape[-1]).kl(q)


def kl_between(q: Distribution, p: Distribution) -> Tensor:
    """KL(q ‖ p) of two Gaussians by torch, (cells,)."""
    both = (d if isinstance(d, Gaussian) else as_q(d) for d in (q, p))
    q, p = (d.as_family("full").as_torch() for d in both)
    return torch.distributions.kl_divergence(q, p)
