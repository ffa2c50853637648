"""Entries from outside the package: registering is enough."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import (
    SCHEMES,
    assert_same_posterior,
    small_counts,
    small_data,
    small_fit,
    unchanged,
)
from scipy import sparse as sp
from scipy import stats
from small_models import (
    batch_of,
    cells_of,
    exact_evidence,
    exact_posterior,
    linear_gaussian,
    model_of,
    posterior_of,
)
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from scuvae import cli, get, tl
from scuvae.batches import Batch, SparseRows
from scuvae.batches.sources.base import Source
from scuvae.batches.sources.registry import SOURCES, source_of
from scuvae.batches.sparse_rows import dense
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import cap_length, gaussian_at
from scuvae.inference.posteriors import POSTERIORS, Posterior
from scuvae.inference.posteriors.base import Rows
from scuvae.inference.posteriors.unamortized import UnamortizedPosterior
from scuvae.inference.refinement.local_step import LocalStep
from scuvae.inference.refinement.refine import LOCAL_STEPS, refine
from scuvae.inference.training.held_out import HeldOutCells
from scuvae.inference.training.loop import train
from scuvae.model import VAE
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.likelihoods.autograd import Linear, written
from scuvae.model.likelihoods.link import Genes, log_mean


class ZeroInflatedPoisson(Likelihood):
    """Zero with a gene's probability π, else Poisson."""

    name = "zero_inflated_poisson"
    link = "softmax"
    support = "counts"

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        self.logit_dropout = nn.Parameter(torch.full((n_vars,), -3.0))

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        values, log_mu = dense(x), log_mean(written(eta), size_factor)
        logit = self.logit_dropout[genes]
        log_p = values * log_mu - log_mu.exp() - (values + 1).lgamma() + F.logsigmoid(-logit)
        zero = torch.logaddexp(F.logsigmoid(logit).expand_as(log_p), log_p)
        return torch.where(values > 0, log_p, zero).sum(-1)

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        kept = torch.sigmoid(-mu - self.logit_dropout[genes])
        return mu * torch.where(dense(x) > 0, 1.0, kept)

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu * torch.sigmoid(-self.logit_dropout[genes])

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        return (1 - dropout) * mu * (1 + mu * dropout)

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        dropout = torch.sigmoid(self.logit_dropout[genes])
        return dropout + (1 - dropout) * (-mu).exp()

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        return torch.poisson(mu) * (torch.rand_like(mu) < torch.sigmoid(-self.logit_dropout[genes]))


class StudentT(Likelihood):
    """Values with heavier tails than a Gaussian's: five degrees of freedom."""

    name = "student_t"
    link = "identity"
    support = "real"
    degrees = 5.0

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        self.scale_raw = nn.Parameter(torch.zeros(1))

    def _log_prob(
        self, x: SparseRows | Tensor, eta: Tensor | Linear, size_factor: Tensor, genes: Genes
    ) -> Tensor:
        mean = written(eta)
        student = torch.distributions.StudentT(self.degrees, mean, F.softplus(self.scale_raw))
        return student.log_prob(dense(x)).sum(-1)

    def _weight(self, x: SparseRows | Tensor, mu: Tensor, genes: Genes) -> Tensor:
        share = (self.degrees + 1) / (self.degrees + 3)
        return (share / F.softplus(self.scale_raw).square()).expand_as(mu)

    def _mean(self, mu: Tensor, genes: Genes) -> Tensor:
        return mu

    def _variance(self, mu: Tensor, genes: Genes) -> Tensor:
        spread = self.degrees / (self.degrees - 2)
        return (spread * F.softplus(self.scale_raw).square()).expand_as(mu)

    def _zero(self, mu: Tensor, genes: Genes) -> Tensor:
        return torch.zeros_like(mu)

    def _draw(self, mu: Tensor, genes: Genes) -> Tensor:
        student = torch.distributions.StudentT(self.degrees, mu, F.softplus(self.scale_raw))
        return student.sample()


class Tempered(Posterior):
    """A table whose steps see a KL of twice the weight."""

    has_rows = True

    def __init__(self, mean: Tensor, raw: Tensor, **options: Any) -> None:
        super().__init__()
        self.own = UnamortizedPosterior(mean, raw, **options)

    def rows(self) -> Rows:
        return self.own

    def visit(self, on_host: Tensor) -> str | None:
        return self.own.visit(on_host)

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        q: Distribution = self.own(model, batch, kl_weight)
        return q

    def step(self, model: VAE, batch: Batch, slope: Tensor, **options: Any) -> None:
        options["kl_weight"] *= 2
        self.own.step(model, batch, slope, **options)


class HalfNewton(LocalStep):
    """Half of a Gauss–Newton step, from which draws have no part."""

    held_out = (4, 1)

    @staticmethod
    def refine(
        model: VAE,
        batch: Batch,
        q: Gaussian,
        *,
        max_steps: int = 20,
        n_samples: int = 1,
        kl_weight: float = 1.0,
    ) -> Gaussian:
        mean = q.mean.detach()
        for _ in range(max_steps):
            _, slope = model.log_likelihood_and_slope(batch, mean)
            precision = model.curvature(batch, mean) / kl_weight + torch.eye(mean.shape[1])
            step = torch.linalg.solve(precision, slope / kl_weight - mean)
            mean = mean + 0.5 * cap_length(step, 2.0)
        return gaussian_at(mean, precision, full=q.full)


class Halves(Source):
    """A sparse matrix whose values are kept in half precision."""

    resident = True

    @classmethod
    def takes(cls, x: Any) -> bool:
        return bool(sp.issparse(x))

    def __init__(self, x: Any, device: torch.device) -> None:
        self.shape = x.shape
        self.x = torch.as_tensor(x.toarray(), dtype=torch.float16, device=device)

    def rows(
        self, index: Tensor, on_host: Tensor | None = None, size: int | None = None
    ) -> SparseRows:
        return SparseRows.from_dense(self.x[index].float())

    def totals(self) -> Tensor:
        return self.x.float().sum(1)


OUTSIDE: dict[str, type[Likelihood]] = {"zip": ZeroInflatedPoisson, "student": StudentT}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in OUTSIDE.values():
        monkeypatch.setitem(LIKELIHOODS, kind.name, kind)
    monkeypatch.setitem(POSTERIORS, "tempered", Tempered)
    monkeypatch.setitem(LOCAL_STEPS, "half_newton", HalfNewton)


def data(kind: type[Likelihood], **shape: int) -> AnnData:
    adata = small_data("poisson" if kind.support == "counts" else "gaussian", **shape)
    adata.obs["kind"] = np.where(np.arange(adata.n_obs) % 3, "a", "b")
    return adata


@pytest.mark.parametrize(
    ("name", "amortized", "local_step"),
    [
        *(("zip", scheme, "natural") for scheme in SCHEMES),
        ("zip", "tempered", "half_newton"),
        ("student", "tempered", "natural"),
        ("student", "semi", "half_newton"),
    ],
)
@pytest.mark.usefixtures("registered")
def test_every_verb_works_for_an_entry_from_outside(
    name: str, amortized: bool | str, local_step: str, tmp_path: Path
) -> None:
    kind = OUTSIDE[name]
    adata, new = data(kind, n_obs=60), data(kind, n_obs=30, seed=3)
    new = new[:, ::-1][:, :-4].copy()  # other order, some genes missing
    named = {"likelihood": kind.name, "amortized": amortized, "local_step": local_step}
    small_fit(adata, **named, max_epochs=4)
    assert np.isfinite(get.history(adata)["elbo"]).all()
    assert (get.model(adata).encoder is not None) == (amortized in (True, "semi"))
    tl.project(new, adata)
    tl.transfer_labels(new, adata, labels="kind")
    tl.novelty(new, adata)
    tl.refine(adata, key_added="refined", local_step=local_step)
    tl.score(adata, n_samples=5)
    tl.denoise(adata)
    tl.sample(adata)
    tl.predictive_check(adata)
    assert np.isfinite(new.obs["scuvae_novelty"]).all()
    assert np.isfinite(adata.layers["scuvae_denoised"]).all()
    stores = ["zarr"] if (name, amortized) == ("zip", "semi") else []  # seconds: one does for all
    for suffix in ("h5ad", *stores):
        path = tmp_path / f"fit.{suffix}"
        getattr(adata, f"write_{suffix}")(path)
        back = getattr(anndata, f"read_{suffix}")(path)
        assert type(get.model(back).likelihood) is kind
        again = new.copy()
        tl.project(again, back)
        assert_same_posterior(again, new)


@pytest.mark.usefixtures("registered")
def test_the_command_line_takes_them_by_name(tmp_path: Path) -> None:
    small_counts().write_h5ad(tmp_path / "in.h5ad")
    out = tmp_path / "out.h5ad"
    words = f"fit {tmp_path / 'in.h5ad'} -o {out} --likelihood zero_inflated_poisson"
    assert cli.main([*words.split(), "--inference", "tempered", "--max-epochs", "2", "-q"]) == 0
    params = anndata.read_h5ad(out).uns["scuvae"]["params"]
    assert (params["likelihood"], params["amortized"]) == ("zero_inflated_poisson", "tempered")


def test_a_fit_of_an_entry_that_is_gone_names_it() -> None:
    LIKELIHOODS[ZeroInflatedPoisson.name] = ZeroInflatedPoisson
    try:
        adata = small_fit(small_counts(), likelihood=ZeroInflatedPoisson.name, max_epochs=1)
    finally:
        del LIKELIHOODS[ZeroInflatedPoisson.name]
    with pytest.raises(ValueError, match=r"zero_inflated_poisson.*LIKELIHOODS"):
        tl.score(adata)


@pytest.mark.usefixtures("registered")
def test_a_fit_by_a_local_step_that_is_gone_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = small_fit(small_counts(), local_step="half_newton", max_epochs=1)
    monkeypatch.delitem(LOCAL_STEPS, "half_newton")
    with unchanged(adata), pytest.raises(ValueError, match=r"half_newton.*LOCAL_STEPS"):
        tl.project(adata, adata)


@pytest.mark.parametrize("scheme", ["unamortized", "semi"])
@pytest.mark.usefixtures("registered", "fixed_random_state")
def test_a_local_step_is_asked_wherever_q_moves(scheme: str) -> None:
    """In a linear Gaussian model: rows in training, held-out cells, refinement reach p(z | x)."""
    model = linear_gaussian(n_latent=2)
    model.encoder = model_of("gaussian", n_vars=20, encoder=True, covariance="full").encoder
    x = cells_of(model, 30)
    mean, precision = exact_posterior(model, x)
    scale = torch.linalg.inv(precision).diagonal().sqrt()
    posterior = posterior_of(scheme, 30, 2, "full", local_step="half_newton")
    batches = [batch_of(x[rows], index=rows) for rows in torch.arange(30).split(10)]
    judge = HeldOutCells([batch_of(x)], covariance="full", local_step="half_newton")
    history = train(
        model,
        posterior,
        batches,
        n_obs=30,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        max_epochs=20,
        held_out=judge,
    )
    rows = posterior(model, batch_of(x))
    refined = refine(model, batch_of(x), [rows], local_step="half_newton", max_steps=1)
    (held_out,) = judge.parts()
    for q in (rows, held_out, refined):
        # Half of the way at each of 20 steps; the scales are exact.
        assert ((q.mean - mean) / scale).abs().max() < 1e-4
        torch.testing.assert_close(q.stddev, scale.expand(30, 2), rtol=1e-6, atol=1e-6)
    # So the ELBO is the evidence, but for the draws that it is taken over.
    evidence = exact_evidence(model, x).mean().item()
    assert history[-1]["validation_elbo"] == pytest.approx(evidence, abs=0.5)


@pytest.mark.usefixtures("registered")
def test_they_are_what_they_say() -> None:
    """Against scipy."""
    eta = torch.randn(4, 6, dtype=torch.float64)
    x = torch.poisson(torch.full((4, 6), 1.0)).double()
    likelihood = ZeroInflatedPoisson(6).double()
    mu = (eta.softmax(1) * x.sum(1, keepdim=True)).numpy()
    pi = torch.sigmoid(likelihood.logit_dropout).detach().numpy()
    expected = np.log(pi * (x.numpy() == 0) + (1 - pi) * stats.poisson(mu).pmf(x.numpy()))
    found = likelihood.log_prob(x, eta, x.sum(1)).detach()
    np.testing.assert_allclose(found, expected.sum(1), rtol=1e-9)


def test_the_source_registered_last_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, adata = (small_counts(n_vars=30) for _ in range(2))
    plain.X = sp.csr_matrix(plain.X)
    adata.X = plain.X.copy()
    small_fit(plain)
    monkeypatch.setitem(SOURCES, "halves", Halves)
    assert isinstance(source_of(adata.X, torch.device("cpu")), Halves)
    small_fit(adata)  # small whole numbers, which half precision holds
    np.testing.assert_allclose(adata.obsm["X_scuvae"], plain.obsm["X_scuvae"], atol=1e-3)
    with pytest.raises(TypeError, match="no source takes a str"):
        source_of("counts", torch.device("cpu"))
