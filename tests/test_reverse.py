"""The backward pass in closed form, against autograd; and the steps that follow it."""

import copy
from typing import Any

import pytest
import torch
from small_models import COUNTS, EPS, UNIQUE, batch_of, cells_of, kl_to_prior, model_of
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions import precision
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.objectives import descend, elbo
from scuvae.inference.training.optimizers import CompiledAdam, adam
from scuvae.model import VAE, Decoder
from scuvae.model.decoder import gated

pytestmark = pytest.mark.usefixtures("fixed_random_state")

FLOATS = [torch.float64, torch.float32]
FACTOR = -1.7


def by_autograd(model: VAE, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    value = model.log_likelihood(batch, leaf)
    (FACTOR * value.sum()).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_near(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """To some thousand roundings: sums over cells and genes, through exponentials."""
    size = 1 + expected.abs().max()
    assert (found - expected).abs().max() <= 3000 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize(
    ("n_layers", "n_covariates", "linear_path", "slopes"),
    [
        *((0, 0, False, False), (0, 2, False, False), (1, 0, False, False)),
        *((1, 2, False, False), (2, 2, False, False)),
        *((1, 0, True, False), (1, 2, True, False), (2, 2, True, False), (1, 2, True, True)),
    ],
)
@pytest.mark.parametrize("name", UNIQUE)
def test_slopes_are_autograds(
    name: str,
    n_layers: int,
    n_covariates: int,
    linear_path: bool,
    slopes: bool,
    n_samples: int,
    dtype: torch.dtype,
) -> None:
    sizes = {"n_layers": n_layers, "n_covariates": n_covariates, "linear_path": linear_path}
    model = model_of(name, slopes=slopes, **sizes).to(dtype).train()
    model.decoder.dropout = 0.25
    covariates = None
    if n_covariates:
        covariates = torch.eye(n_covariates, dtype=dtype)[torch.arange(9) % n_covariates]
    x = cells_of(model_of(name), 9).to(dtype)
    batch = batch_of(x, covariates=covariates, sparse=name in COUNTS)
    z = torch.randn(*([n_samples] if n_samples > 1 else []), 9, 2, dtype=dtype)
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    value, slope = model.reverse(batch, z, FACTOR)
    torch.manual_seed(3)
    expected, expected_slope = by_autograd(plain, batch, z)
    assert value.shape == expected.shape
    assert slope.shape == z.shape
    assert_near(value, expected, dtype)
    assert_near(slope, expected_slope, dtype)
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert own.grad.shape == own.shape
        assert other.grad.abs().max() > 0
        assert_near(own.grad, other.grad, dtype)


def test_gradients_add_up_and_frozen_parameters_get_none() -> None:
    model = model_of("negative_binomial")
    batch = batch_of(cells_of(model, 9), sparse=True)
    z = torch.randn(9, 2, dtype=torch.float64)
    frozen = model.decoder.layers[0].bias.requires_grad_(False)
    model.reverse(batch, z, FACTOR)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.reverse(batch, z, FACTOR)
    assert frozen.grad is None
    assert len(once) == len(list(model.parameters())) - 1
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("name", UNIQUE)
def test_descent_is_the_backward_pass_of_the_loss(name: str, n_samples: int) -> None:
    """All that asks for a gradient gets the loss's: networks, and what q comes from."""
    model = model_of(name, encoder=True)
    batch = batch_of(cells_of(model, 9), sparse=name in COUNTS)
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    terms, slope = descend(model, batch, model.encode(batch), n_samples, weight=2.5, kl_weight=0.3)
    torch.manual_seed(3)
    expected = elbo(plain, batch, plain.encode(batch), n_samples)
    (2.5 * (0.3 * expected.kl - expected.reconstruction).sum()).backward()
    torch.testing.assert_close(terms.elbo, expected.elbo.detach())
    sums = torch.stack([expected.reconstruction.sum(), expected.kl.sum()]).detach()
    torch.testing.assert_close(terms.sums(), sums)
    assert slope.shape[-2:] == (9, 2)
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_gates_are_those_of_torchs_operators() -> None:
    entered = torch.randn(40, 30)
    entered[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    torch.manual_seed(5)
    passed, gate = gated(entered, 0.25)
    torch.manual_seed(5)
    _, expected = gated(entered.double(), 0.25)
    assert 0 < (gate > 0).float().mean() < 0.5
    torch.testing.assert_close(gate.double(), expected.double(), rtol=EPS, atol=0)
    torch.testing.assert_close(passed, entered * gate, equal_nan=True)
    assert not gate[0, :3].any()


def test_what_is_no_number_passes_a_gate() -> None:
    decoder = Decoder(2, 5, dropout=0.5).train()
    z = torch.full((4, 2), torch.nan)
    assert decoder.hidden(z).isnan().all()


@pytest.mark.parametrize("n_samples", [1, 3])
def test_draws_have_their_covariance(n_samples: int) -> None:
    """The compiled draws z = m + C ε, by the moments of many."""
    mean = torch.randn(1, 3).expand(20_000, 3).contiguous()
    tril = torch.tensor([[0.5, 0, 0], [-0.3, 0.8, 0], [0.2, 0.1, 1.2]])
    q = Gaussian(mean, tril.expand(20_000, 3, 3).contiguous())
    z = q.draw_own(torch.randn(*(() if n_samples == 1 else (n_samples,)), *mean.shape))
    wide = Gaussian(mean.double(), q.factor.double())
    torch.testing.assert_close(kl_to_prior(q).double(), kl_to_prior(wide), rtol=1e-6, atol=0)
    assert z.shape == (mean.shape if n_samples == 1 else (n_samples, *mean.shape))
    rows = z.reshape(-1, 3)
    # four standard errors of the mean and of second moments
    assert ((rows.mean(0) - mean[0]).abs() < 4 * 1.3 / len(rows) ** 0.5).all()
    covariance = torch.cov(rows.T)
    assert ((covariance - tril @ tril.T).abs() < 4 * 2.2 / len(rows) ** 0.5).all()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_of_the_mean(full: bool, dtype: torch.dtype) -> None:
    """ρ Σ (a s − m), and no longer than allowed, against the covariance written out."""
    mean, slope = torch.randn(2, 30, 4, dtype=dtype)
    tril = torch.randn(30, 4, 4, dtype=dtype).tril()
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.1)
    scale = tril.diagonal(dim1=-2, dim2=-1)
    covariance = tril @ tril.mT if full else torch.diag_embed(scale.square())
    q: Any = Gaussian(mean, tril)
    if not full:
        q = Gaussian(mean, scale)
    step = 0.4 * (covariance @ (-1.5 * slope - mean)[..., None])[..., 0]
    length = step.norm(dim=1, keepdim=True)
    assert (length > 1).any()
    assert (length < 1).any()
    expected = torch.where(length > 1, step / length, step)
    rows, table = torch.randperm(40)[:30], torch.randn(40, 4, dtype=dtype)
    moved = table.clone()
    precision.move_rows(moved, rows, q, -1.5 * slope - mean, rate=0.4, longest=1.0, by=0.5)
    table[rows] += 0.5 * expected
    torch.testing.assert_close(moved, table, rtol=1e-5, atol=1e-5)  # float32's roundings


def test_adam_is_torchs() -> None:
    """Fifty steps, a rate that changes, a parameter without a gradient at times."""
    start = [torch.randn(7, 5), torch.randn(5)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    torchs = [torch.nn.Parameter(p.double()) for p in start]
    found, expected = adam(ours, lr=0.1), torch.optim.Adam(torchs, lr=0.1)
    assert isinstance(found, CompiledAdam)
    for i in range(50):
        for optimizer in (found, expected):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        for own, other in zip(ours, torchs, strict=True):
            gradient = torch.randn_like(own) * 10.0 ** (i % 5 - 3)
            own.grad, other.grad = gradient, gradient.double()
        if i % 7 == 3:
            ours[1].grad = torchs[1].grad = None
        found.step()
        expected.step()
    for own, other, first in zip(ours, torchs, start, strict=True):
        assert (other - first).abs().min() > 0
        # float32's roundings of numbers near 1, step after step
        torch.testing.assert_close(own.double(), other, rtol=0, atol=100 * EPS)


def test_moments_of_what_gets_no_gradient_end_at_zero() -> None:
    """In place of the numbers below 1e-38, on which processors can be slow."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = adam([parameter], lr=0.1)
    for number in range(2000):
        slopes = [1.0, 1e-19] if number == 0 else [0.0, 1e-19]
        parameter.grad = torch.tensor(slopes)
        optimizer.step()
    assert isinstance(optimizer, CompiledAdam)
    state = optimizer.state[parameter]
    assert state["first"][0] == 0
    assert state["second"][1] == 0
    assert state["first"][1] == pytest.approx(1e-19)  # far above these numbers


def test_adam_elsewhere_is_torchs_own() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert type(adam([parameter])) is torch.optim.Adam
