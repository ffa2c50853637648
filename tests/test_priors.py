"""Priors: their density, what inference asks of them, and fits under a mixture."""

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from helpers import SCHEMES, assert_same_posterior, small_counts, small_fit
from scipy import stats
from scipy.optimize import linear_sum_assignment
from small_models import as_q, kl_between
from torch import Tensor
from torch.distributions import MultivariateNormal

from scuvae import cli, get, tl
from scuvae.distributions.gaussian import Gaussian
from scuvae.model.priors import PRIORS, Prior
from scuvae.model.priors.base import kl_over_draws
from scuvae.model.priors.mixture import Mixture
from scuvae.model.priors.standard_normal import StandardNormal

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def mixture(n_latent: int = 3, n_components: int = 4, unused: int = 2) -> Mixture:
    """With components that are gone beside those that are not."""
    prior = Mixture(n_latent, n_components + unused).double()
    prior.weight[:n_components] = torch.distributions.Dirichlet(torch.ones(n_components)).sample()
    prior.weight[n_components:] = 0.0
    prior.mean.copy_(2 * torch.randn_like(prior.mean))
    tril = 0.4 * torch.randn_like(prior.factor).tril(-1)
    prior.factor.copy_(tril + torch.diag_embed(0.4 + torch.rand_like(prior.mean)))
    return prior


def q_of(n_cells: int, n_latent: int, covariance: str) -> Gaussian:
    tril = 0.3 * torch.randn(n_cells, n_latent, n_latent).double().tril(-1)
    tril = tril + torch.diag_embed(0.2 + torch.rand(n_cells, n_latent).double())
    mean = torch.randn(n_cells, n_latent).double()
    return Gaussian(mean, tril).as_family(covariance)


PRIORS_OF_THREE = {"standard_normal": lambda: StandardNormal(3).double(), "mixture": mixture}


def test_every_prior_is_here() -> None:
    assert set(PRIORS_OF_THREE) == set(PRIORS)


def scipy_density(prior: Prior, z: Tensor) -> np.ndarray:
    if isinstance(prior, Mixture):
        covariance = prior.components.covariance_matrix
        each = [
            float(w) * stats.multivariate_normal(m.numpy(), c.numpy()).pdf(z.numpy())
            for w, m, c in zip(prior.weight, prior.mean, covariance, strict=True)
        ]
        return np.log(np.sum(each, 0))
    return stats.multivariate_normal(np.zeros(3)).logpdf(z.numpy())


@pytest.mark.parametrize("name", PRIORS_OF_THREE)
def test_density_is_scipys(name: str) -> None:
    prior, z = PRIORS_OF_THREE[name](), torch.randn(5, 7, 3).double()
    found = prior.log_prob(z)
    np.testing.assert_allclose(found, scipy_density(prior, z), rtol=1e-9)  # roundings


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("name", PRIORS_OF_THREE)
def test_kl_is_what_it_says(name: str, covariance: str) -> None:
    """Exact: the average log ratio over many draws. A bound: no lower, and tight where it is."""
    prior, q = PRIORS_OF_THREE[name](), q_of(6, 3, covariance)
    points = torch.randn(20_000, 1, 3).double()
    terms = q.log_prob_of_points(points) - prior.log_prob(q.draw(points))
    truth, error = terms.mean(0), terms.std(0) / len(terms) ** 0.5
    found = prior.kl(q)
    assert (found > truth - 5 * error).all()
    if prior.kl_is == "exact":
        assert (found < truth + 5 * error).all()
    else:
        # Of a narrow q at one of components that lie apart, the others have no part in it.
        apart = mixture()
        apart.mean.mul_(50)
        own = Gaussian(apart.mean[:4], 0.1 * apart.factor[:4])
        each = kl_between(
            own, as_q(MultivariateNormal(apart.mean[:4], scale_tril=apart.factor[:4]))
        )
        torch.testing.assert_close(apart.kl(own), each - apart.weight[:4].log())


def test_kl_over_draws_is_the_closed_form() -> None:
    """Their second moments are exact, so that a quadratic's average is."""
    prior, q = StandardNormal(3).double(), q_of(6, 3, "full")
    torch.testing.assert_close(kl_over_draws(prior, q), prior.kl(q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PRIORS_OF_THREE)
def test_slope_and_precision_are_those_of_the_kl(name: str) -> None:
    """By autograd through the KL: −∂/∂m, and in variances ½ (P − 1/s²)."""
    prior, q = PRIORS_OF_THREE[name](), q_of(6, 3, "diagonal")
    mean, variance = q.mean.requires_grad_(), q.variance.requires_grad_()
    kl = prior.kl(Gaussian(mean, variance.sqrt())).sum()
    by_mean, by_variance = torch.autograd.grad(kl, [mean, variance])
    with torch.no_grad():
        torch.testing.assert_close(prior.slope(q), -by_mean)
        found = prior.precision(q).expand(6, 3, 3).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found, 2 * by_variance + 1 / variance)
        assert (torch.linalg.eigvalsh(prior.precision(q)) > 0).all()


@pytest.mark.parametrize("name", PRIORS_OF_THREE)
def test_at_a_point_slope_is_the_densitys(name: str) -> None:
    prior, z = PRIORS_OF_THREE[name](), torch.randn(6, 3).double().requires_grad_()
    (expected,) = torch.autograd.grad(prior.log_prob(z).sum(), z)
    found = prior.slope(Gaussian(z.detach(), torch.zeros_like(z)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", PRIORS_OF_THREE)
def test_draws_have_the_priors_moments(name: str) -> None:
    prior = PRIORS_OF_THREE[name]()
    whole = prior.gaussian()
    n = 40_000
    for drawn, most in ((prior.sample((n,)), 5.0), (prior.points(4096), 12.0)):
        # Standard errors of means, and of second moments of tails about a normal's.
        spread = whole.stddev / len(drawn) ** 0.5
        assert ((drawn.mean(0) - whole.mean).abs() < most * spread).all()
        wanted = whole.covariance_matrix
        size = wanted.diagonal().sqrt()
        error = (torch.cov(drawn.T) - wanted).abs() / (size[:, None] * size)
        assert (error < most * 2 / len(drawn) ** 0.5).all()
    assert torch.equal(prior.points(100), prior.points(100))
    assert prior.sample((2, 5)).shape == (2, 5, 3)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_a_mixture_finds_the_components_there_are(seed: int) -> None:
    """Three to seven of ten Gaussians, told apart, each cell's q as wide as half of them."""
    torch.manual_seed(seed)
    k, n, n_latent = 3 + seed, 1000, 4
    centres = 5 * torch.randn(k, n_latent)
    label = torch.multinomial(torch.arange(1.0, k + 1), n, replacement=True)
    z = centres[label] + torch.randn(n, n_latent)
    q = Gaussian(z + 0.5 * torch.randn_like(z), torch.full_like(z, 0.5))
    prior = Mixture(n_latent, 10)
    for _ in range(3):
        prior.refit(q)
    assert int((prior.weight > 0).sum()) == k
    found = prior.responsibilities(q).argmax(1)
    table = torch.zeros(10, k)
    table.index_put_((found, label), torch.ones(n), accumulate=True)
    rows, columns = linear_sum_assignment(-table.numpy())
    assert table[rows, columns].sum() > 0.98 * n
    heavy = prior.weight > 0
    # Means of some hundred cells, about three standard errors; q says where it is up to .5.
    apart = torch.cdist(prior.mean[heavy], centres).min(0).values
    assert (apart < 0.6).all()


class TwoBumps(Prior):
    """½ N(−1, 1) + ½ N(1, 1) in every dimension together; nothing but its density is known."""

    name = "two_bumps"
    kl_is = "estimate"

    def log_prob(self, z: Tensor) -> Tensor:
        normal = StandardNormal(self.n_latent)
        return torch.logaddexp(normal.log_prob(z - 1), normal.log_prob(z + 1)) - np.log(2)

    def kl(self, q: Gaussian) -> Tensor:
        return kl_over_draws(self, q)

    def slope(self, q: Gaussian) -> Tensor:
        return torch.tanh(q.mean.sum(-1, keepdim=True)) - q.mean

    def precision(self, q: Gaussian) -> Tensor:
        return torch.eye(self.n_latent).to(q.mean)

    def gaussian(self) -> Gaussian:
        one = torch.ones(self.n_latent).to(self.like)
        return Gaussian(self.like, torch.linalg.cholesky(torch.diag(one) + torch.outer(one, one)))

    def points(self, n: int) -> Tensor:
        return StandardNormal(self.n_latent).points(n) + (torch.arange(n) % 2 * 2 - 1.0)[:, None]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn = StandardNormal(self.n_latent).sample(sample_shape)
        return drawn + torch.randint(0, 2, (*sample_shape, 1)) * 2 - 1


@pytest.mark.parametrize("amortized", SCHEMES)
@pytest.mark.parametrize("name", ["mixture", "two_bumps"])
def test_every_verb_works_under_it(
    name: str, amortized: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRIORS, TwoBumps.name, TwoBumps)
    adata, new = small_counts(n_obs=80), small_counts(n_obs=30, seed=3)
    for each in (adata, new):
        each.obs["kind"] = np.where(np.arange(each.n_obs) % 3, "a", "b")
    new = new[:, ::-1][:, :-4].copy()  # other order, some genes missing
    small_fit(adata, prior=name, amortized=amortized, max_epochs=4)
    assert type(get.model(adata).prior) is PRIORS[name]
    assert np.isfinite(get.history(adata)["elbo"]).all()
    tl.project(new, adata)
    tl.transfer_labels(new, adata, labels="kind")
    tl.novelty(new, adata)
    tl.refine(adata, key_added="refined")
    tl.score(adata, n_samples=5, n_anneal=2)
    tl.calibration(adata)
    path = tmp_path / "fit.h5ad"
    adata.write_h5ad(path)
    again = new.copy()
    tl.project(again, anndata.read_h5ad(path))
    assert_same_posterior(again, new)


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    small_counts().write_h5ad(tmp_path / "in.h5ad")
    out = tmp_path / "out.h5ad"
    words = f"fit {tmp_path / 'in.h5ad'} -o {out} --prior mixture --max-epochs 2 -q"
    assert cli.main(words.split()) == 0
    assert anndata.read_h5ad(out).uns["scuvae"]["params"]["prior"] == "mixture"


def test_what_cannot_be_a_prior_is_said() -> None:
    adata = small_counts()
    with pytest.raises(ValueError, match=r"prior='mixtur' is unknown.*mixture"):
        small_fit(adata, prior="mixtur")
    with pytest.raises(ValueError, match="prior has n_latent=7"):
        small_fit(adata, prior=StandardNormal(7))
    with pytest.raises(ValueError, match=r"TwoBumps is not registered.*PRIORS"):
        small_fit(adata, prior=TwoBumps(2), n_latent=2)
    assert not adata.obsm


def test_cells_are_told_their_component() -> None:
    """Two kinds of cells that share no gene are two components, in a projection as well."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 300)
    rate = np.where(np.arange(20)[None] < 10, kind[:, None], 1 - kind[:, None]) * 4 + 0.2
    adata = anndata.AnnData(rng.poisson(rate).astype(np.float32))
    small_fit(adata, prior="mixture", n_latent=2, max_epochs=15)
    found = adata.obs["scuvae_component"]
    share = adata.obsm["X_scuvae_components"]
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-5)
    assert (found.cat.categories[share.argmax(1)] == found).all()
    of_kind = [found[kind == k].value_counts(normalize=True) for k in (0, 1)]
    # Each kind may be more than one component; none has both.
    assert (np.minimum(*(c.reindex(found.cat.categories).fillna(0) for c in of_kind)) < 0.05).all()
    new = adata[:40].copy()
    tl.project(new, adata)
    assert (new.obs["scuvae_component"] == found[:40]).mean() > 0.95
    small_fit(adata)
    assert "scuvae_component" not in adata.obs
    assert "X_scuvae_components" not in adata.obsm
