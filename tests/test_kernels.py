"""Compiled kernels against float64, against torch's operators, and on any number of threads."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import sparse as sp
from small_models import COUNTS, EPS, kl_to_prior, likelihood_of, model_of
from torch import Tensor

from scuvae.batches import SparseRows
from scuvae.distributions import precision
from scuvae.distributions.gaussian import Gaussian
from scuvae.kernels import threads
from scuvae.kernels import vector_math as vectors
from scuvae.kernels.gram import gram
from scuvae.model.likelihoods import Likelihood, negative_binomial, poisson
from scuvae.model.likelihoods.autograd import Linear
from scuvae.model.vae import frozen

pytestmark = pytest.mark.usefixtures("fixed_random_state")


@vectors.exact
def apply_exp(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = vectors.exp(x[i])


# Sums may be reordered in a caller; what it calls must not be.
@vectors.sums
def apply_log1p(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = vectors.log1p(x[i], np.float32(1) / (np.float32(1) + x[i]))


def test_exponentials_are_those_of_float64() -> None:
    x = -np.abs(np.random.default_rng(0).normal(scale=30, size=20_000)).astype(np.float32)
    found = np.empty_like(x)
    apply_exp(x, found)
    # two roundings; below e^-87, where float32 ends, it stays there
    np.testing.assert_allclose(found, np.exp(np.maximum(x, -87.0).astype(float)), rtol=2 * EPS)


def test_logarithms_keep_what_adding_to_one_rounds_away() -> None:
    x = np.exp(np.random.default_rng(0).uniform(-60, 80, size=20_000)).astype(np.float32)
    found = np.empty_like(x)
    apply_log1p(np.append(x, np.float32(0)), padded := np.append(found, np.float32(1)))
    np.testing.assert_allclose(padded[:-1], np.log1p(x.astype(float)), rtol=2 * EPS)  # the same
    assert padded[-1] == 0


def problem(name: str, n_cells: int = 9, n_genes: int = 37) -> tuple[Likelihood, Tensor, Tensor]:
    """Counts small and large, a cell without any, two draws of logits."""
    likelihood = likelihood_of(name, n_genes, torch.float32)
    x = torch.poisson(torch.full((n_cells, n_genes), 0.5))
    x[0, :3] = torch.tensor([15.0, 16.0, 400.0])
    x[1] = 0.0
    return likelihood, x, 2 * torch.randn(2, n_cells, n_genes)


def values_and_slopes(likelihood: Likelihood, x: Tensor, eta: Tensor, size: Tensor) -> list[Tensor]:
    likelihood.zero_grad()
    leaf, given = eta.clone().requires_grad_(), size.clone().requires_grad_()
    value = likelihood.log_prob(SparseRows.from_dense(x), leaf, given)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    (value * weights).sum().backward()
    return [value.detach(), leaf.grad, given.grad, *(p.grad for p in likelihood.parameters())]


@pytest.mark.parametrize("per_draw", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_kernels_are_torchs_operators(
    name: str, per_draw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    likelihood, x, eta = problem(name)
    size = x.sum(1) + 1 + torch.arange(2.0).view(2, 1) * per_draw
    assert negative_binomial.compiled(eta)
    found = [part.double() for part in values_and_slopes(likelihood, x, eta, size)]
    exact = values_and_slopes(likelihood.double(), x.double(), eta.double(), size.double())
    for module in (negative_binomial, poisson):
        monkeypatch.setattr(module, "compiled", lambda x: False)
    plain = values_and_slopes(likelihood.float(), x, eta, size)
    for compiled, truth, operators in zip(found, exact, plain, strict=True):
        # no further from float64 than twice torch's float32, but for some roundings of the largest
        # terms, which are those of a count of 400
        scale = truth.abs().max() + 400
        error, allowed = (compiled - truth).abs().max(), (operators.double() - truth).abs().max()
        assert error <= 2 * allowed + 20 * EPS * scale


@pytest.mark.parametrize("log_theta", [-85.0, -61.0, 61.0, 85.0])
@pytest.mark.parametrize("name", ["negative_binomial", "zero_inflated_negative_binomial"])
def test_extreme_dispersions_stay_finite(name: str, log_theta: float) -> None:
    likelihood, x, eta = problem(name)
    with torch.no_grad():
        likelihood.log_theta.fill_(log_theta)
    for part in values_and_slopes(likelihood, x, eta, x.sum(1) + 1):
        assert part.isfinite().all()
    if log_theta > 0:  # all but Poisson
        limit = likelihood_of("poisson", 37, torch.float64)
        with torch.no_grad():
            likelihood.double().log_theta.fill_(60.0)
        expected = likelihood.log_prob(x.double(), eta.double(), x.double().sum(1) + 1)
        found = likelihood.float().log_prob(x, eta, x.sum(1) + 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)  # of thousands
        if name == "negative_binomial":
            poisson_value = limit.log_prob(x.double(), eta.double(), x.double().sum(1) + 1)
            torch.testing.assert_close(expected, poisson_value, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", COUNTS)
def test_a_logit_that_is_no_number_shows(name: str, bad: float) -> None:
    likelihood, x, eta = problem(name)
    x[2, 5] = 0.0  # also where there is no count
    eta[1, 2, 5] = bad
    value = likelihood.log_prob(x, eta, x.sum(1) + 1)
    shown = ~value.isfinite()
    assert shown[1, 2]
    assert shown.sum() == 1


@pytest.mark.parametrize("name", COUNTS)
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood, x, eta = problem(name, n_cells=75)  # three blocks of rows
    expected = values_and_slopes(likelihood, x, eta, x.sum(1) + 1)
    monkeypatch.setattr(threads, "NUMBERS_A_THREAD", 100)  # work for every thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = values_and_slopes(likelihood, x, eta, x.sum(1) + 1)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_gathered_rows_are_scipys() -> None:
    x = sp.random_array((20, 15), density=0.2, rng=np.random.default_rng(0), format="csr")
    rows = np.array([3, 19, 3, 0])
    arrays = (torch.from_numpy(part) for part in (x.indptr.astype(np.int64), x.indices, x.data))
    found = SparseRows(*arrays, 15).take(torch.from_numpy(rows))
    np.testing.assert_array_equal(found.dense, x[rows].toarray())


def test_gram_matrices_are_numpys() -> None:
    rows, weight = torch.randn(5, 4, 33), torch.rand(5, 33)
    expected = np.einsum("ckg,cg,clg->ckl", *(t.double() for t in (rows, weight, rows)))
    found = gram(rows, weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * EPS)  # sums of 33 terms of 1
    assert torch.equal(found, found.mT)


def test_small_gaussians_are_torchs() -> None:
    mean, raw = torch.randn(50, 4), 2 * torch.randn(50, 10)
    raw[0], raw[1, 5] = -40.0, torch.nan  # scales at their least, and one that is no number
    q, exact = Gaussian.of(mean, raw), Gaussian.of(mean.double(), raw.double())
    least = q.scale_tril[0].diagonal()
    assert (least == least[0]).all()
    sound = torch.arange(50) != 1
    assert q.scale_tril[1].isnan().any()
    for found, truth in [
        (q.scale_tril, exact.scale_tril),
        (kl_to_prior(q), kl_to_prior(exact)),
        (
            precision.precondition(q.scale_tril, mean),
            (exact.covariance_matrix @ mean.double().unsqueeze(-1)).squeeze(-1),
        ),
    ]:
        error = (found.double() - truth)[sound].abs().max()
        assert error < 50 * EPS * truth[sound].abs().max()  # sums of some ten products
    # Behind autograd's back nothing would be learnt.
    leaf = raw[sound].clone().requires_grad_()
    kl_to_prior(Gaussian.of(mean[sound], leaf)).sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.slow
def test_numba_may_be_told_to_interpret() -> None:
    """Then torch's operators do the work: interpreted kernels would take minutes."""
    code = (
        "import torch; from scuvae.kernels.dispatch import compiled; "
        "from scuvae.model.likelihoods import LIKELIHOODS; print(compiled(torch.zeros(1)), "
        "LIKELIHOODS['nb'](3).log_prob(torch.ones(2, 3), torch.zeros(2, 3)).shape)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"NUMBA_DISABLE_JIT": "1", "PATH": ""},
    )
    assert found.stdout.split() == ["False", "torch.Size([2])"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alike", [False, True])  # sums are taken at once where rows weigh alike
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_layer_gives_what_its_outputs_give(
    name: str, masked: bool, alike: bool, dtype: torch.dtype
) -> None:
    """Values and all gradients, of a linear layer's weights too, in float64 and in kernels."""
    likelihood, x, _ = problem(name)
    likelihood, x = likelihood.to(dtype), x.to(dtype)
    observed = torch.arange(37) % 3 != 0 if masked else None
    hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    weight, bias = torch.randn(37, 6, dtype=torch.float64), torch.randn(37, dtype=torch.float64)

    def found(kind: torch.dtype, layer: bool) -> list[Tensor]:
        own = likelihood.to(kind)
        own.zero_grad()
        leaves = [p.detach().to(kind, copy=True).requires_grad_() for p in (hidden, weight, bias)]
        eta = Linear(*leaves) if layer else torch.nn.functional.linear(*leaves)
        value = own.log_prob(x.to(kind), eta, x.to(kind).sum(1) + 1, observed)
        weights = torch.linspace(0.5, 2.0, value.numel(), dtype=kind).view_as(value)
        if alike:
            weights = torch.full_like(value, 1.5)
        (value * weights).sum().backward()
        parts = [value.detach(), *(leaf.grad for leaf in leaves)]
        return [part.double() for part in [*parts, *(p.grad for p in own.parameters())]]

    truth = found(torch.float64, layer=False)
    for expected, value in zip(truth, found(dtype, layer=True), strict=True):
        # some dozen roundings of sums over cells and genes, and of a count of 400's terms
        error = (value - expected).abs().max() / (expected.abs().max() + 400)
        assert error < 100 * torch.finfo(dtype).eps


def test_frozen_parameters_ask_for_no_gradient_inside() -> None:
    model = model_of("negative_binomial")
    model.likelihood.log_theta.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    inside = []

    def fail() -> None:
        with frozen(model):
            inside.extend(p.requires_grad for p in model.parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(inside)
    assert [p.requires_grad for p in model.parameters()] == before
    assert any(before)
