"""Dispersions of each batch: what cells of several are told, fits, and what is done with them."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import small_data, small_fit, unchanged
from scipy import stats

from scuvae import get, pp, tl
from scuvae.batches import Batch, SparseRows
from scuvae.inference.mapping.covariate_columns import with_design
from scuvae.inference.training.optimizers import adam
from scuvae.model import VAE, Decoder
from scuvae.model.covariates import Categorical, Design
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.likelihoods import by_level as module
from scuvae.model.likelihoods.by_level import PRECISION, ByLevel

pytestmark = pytest.mark.usefixtures("fixed_random_state")

N_CELLS, N_GENES, N_LEVELS = 9, 6, 3
CODES = torch.tensor([2, 0, 1, 1, 2, 0, 2, 1, 0])  # in no order
ROWS = torch.eye(N_LEVELS, dtype=torch.float64)[CODES]
OWN = ["negative_binomial", "zero_inflated_negative_binomial", "gaussian"]


def by_level(name: str) -> ByLevel:
    found = ByLevel.of(LIKELIHOODS[name](N_GENES), N_LEVELS).double()
    for parameter in found.parameters():
        parameter.data = torch.randn_like(parameter)
    return found


def values(name: str) -> torch.Tensor:
    if name == "gaussian":
        return torch.randn(N_CELLS, N_GENES, dtype=torch.float64)
    return torch.poisson(torch.full((N_CELLS, N_GENES), 2.0, dtype=torch.float64))


def model_by_level(name: str) -> VAE:
    design = Design((Categorical("b", ("x", "y", "z")),), (), has_batch=True)
    decoder = Decoder(2, N_GENES, n_covariates=N_LEVELS, n_hidden=4, n_layers=1)
    return VAE(decoder, by_level(name), design=design).double().eval()


def batch_by_level(name: str) -> Batch:
    x = values(name)
    seen = x if name == "gaussian" else SparseRows.from_dense(x)
    return Batch(seen, torch.arange(N_CELLS), x.sum(1).abs() + 1, covariates=ROWS)


def test_each_cell_has_its_batchs_negative_binomial() -> None:
    """By scipy, cell by cell; with draws, and with genes that are not observed."""
    many = by_level("negative_binomial")
    x = values("negative_binomial")
    eta = torch.randn(2, N_CELLS, N_GENES, dtype=torch.float64)
    size = torch.rand(N_CELLS, dtype=torch.float64) * 20 + 5
    observed = torch.tensor([True, True, False, True, True, False])
    found = many.given(ROWS).log_prob(SparseRows.from_dense(x), eta, size, observed)
    moments = many.given(ROWS).moments(eta, size, observed)
    share = eta[..., observed].softmax(-1)
    mu = (share * size[:, None]).numpy()
    theta = torch.stack([level.log_theta for level in many.levels]).exp().detach()
    theta_of = theta[CODES][:, observed].numpy()
    truth = stats.nbinom(theta_of, theta_of / (theta_of + mu))
    expected = truth.logpmf(x[:, observed].numpy()).sum(-1)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(moments.variance.detach(), truth.var(), rtol=1e-10)
    np.testing.assert_allclose(moments.zero.detach(), truth.pmf(0), rtol=1e-10)
    np.testing.assert_allclose(moments.mean.detach(), mu, rtol=1e-10)


@pytest.mark.parametrize("name", OWN)
def test_parts_are_put_together_in_the_order_of_cells(name: str) -> None:
    """What each cell has by itself, its likelihood that of its level."""
    many, x = by_level(name), values(name)
    eta = torch.randn(2, N_CELLS, N_GENES, dtype=torch.float64)
    size = torch.rand(N_CELLS, dtype=torch.float64) * 20 + 5
    together = many.given(ROWS)

    def of_all(what: Any, dim: int) -> torch.Tensor:
        parts = []
        for i, code in enumerate(CODES.tolist()):
            one = many.levels[code]
            parts.append(what(one, x[i : i + 1], eta[:, i : i + 1], size[i : i + 1]))
        return torch.cat(parts, dim)

    calls: dict[str, tuple[Any, int]] = {
        "log_prob": (lambda one, x, eta, size: one.log_prob(x, eta, size), -1),
        "fisher": (lambda one, x, eta, size: one.fisher(x, eta[0], size)[0], -2),
        "mean": (lambda one, x, eta, size: one.mean(eta, size), -2),
        "variance": (lambda one, x, eta, size: one.moments(eta, size).variance, -2),
        "stabilised": (lambda one, x, eta, size: one.stabilised(eta, size), -2),
    }
    for what, (call, dim) in calls.items():
        found = call(together, x, eta, size)
        torch.testing.assert_close(found, of_all(call, dim), rtol=1e-9, atol=1e-9, msg=what)


def test_draws_vary_as_their_batch_does() -> None:
    n = 40_000
    many = by_level("negative_binomial")
    with torch.no_grad():
        for level, log_theta in zip(many.levels, (-0.5, 1.0, 3.0), strict=True):
            level.log_theta.fill_(log_theta)
    codes = torch.arange(n) % N_LEVELS
    rows = torch.eye(N_LEVELS, dtype=torch.float64)[codes]
    eta = torch.zeros(n, N_GENES, dtype=torch.float64)
    size = torch.full((n,), 30.0, dtype=torch.float64)
    x = many.given(rows).sample(eta, size)
    for code, log_theta in enumerate((-0.5, 1.0, 3.0)):
        expected = 5 + 25 / np.exp(log_theta)
        # 13,333 draws of 6 genes: a variance to 2 %, four standard errors about.
        assert float(x[codes == code].detach().var(0).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", OWN)
def test_slopes_are_finite_differences(name: str) -> None:
    """Of the closed form and of autograd alike: a level that is not the cell's has none."""
    model, batch = model_by_level(name), batch_by_level(name)
    z = torch.randn(1, N_CELLS, 2, dtype=torch.float64)
    _, slope = model.reverse(batch, z, -1.0)
    few = [z, *model.likelihood.parameters(), model.decoder.output.weight]
    found = [slope, *(parameter.grad for parameter in few[1:])]
    step = 1e-6
    for parameter, gradient in zip(few, found, strict=True):
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), 5):
            old = float(flat[place])
            with torch.no_grad():
                ends = []
                for value in (old + step, old - step):
                    flat[place] = value
                    ends.append(-float(model.log_likelihood(batch, z).sum()))
                flat[place] = old
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient.view(-1)[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_batches_are_held_to_their_mean() -> None:
    """The penalty's slopes, by finite differences of what the module's docstring says."""
    many = by_level("gaussian")
    own = [next(level.parameters()) for level in many.levels]

    def penalty() -> torch.Tensor:
        every = torch.stack(own)
        return 0.5 * PRECISION * (every - every.mean(0)).square().sum()

    expected = torch.autograd.grad(penalty(), own)
    own[0].grad = torch.ones_like(own[0])
    many.add_slopes_of_prior()
    torch.testing.assert_close(own[0].grad, 1 + expected[0])
    torch.testing.assert_close(own[1].grad, expected[1])
    before = {name: value.clone() for name, value in many.state_dict().items()}
    adam(own).step()  # levels that have no cells in a step take it too
    assert all((many.state_dict()[name] != value).any() for name, value in before.items())


def test_a_row_between_levels_and_a_new_level_are_means() -> None:
    model = model_by_level("negative_binomial")
    few = torch.stack([level.log_theta for level in model.likelihood.levels]).detach()
    row = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    between = model.likelihood_of(row.expand(4, -1))
    torch.testing.assert_close(between.log_theta.detach(), few[[0, 2]].mean(0))
    wider = with_design(model, model.design.with_levels(0, ["new"]))
    assert len(wider.likelihood.levels) == N_LEVELS + 1
    torch.testing.assert_close(wider.likelihood.levels[-1].log_theta.detach(), few.mean(0))
    torch.testing.assert_close(wider.likelihood.levels[1].log_theta.detach(), few[1])


def test_asked_without_cells_it_says_what_to_ask() -> None:
    many = by_level("negative_binomial")
    with pytest.raises(TypeError, match="likelihood_of"):
        many.mean(torch.zeros(1, N_GENES, dtype=torch.float64), torch.ones(1))


# --- fits ---------------------------------------------------------------------------------------


def two_batches(n_obs: int = 1200, n_genes: int = 40) -> tuple[AnnData, np.ndarray]:
    """Counts whose θ is 1 in one batch and 8 in the other, and the batches' codes."""
    rng = np.random.default_rng(0)
    code = rng.integers(0, 2, n_obs)
    mu = rng.gamma(5.0, 1.0, n_genes)[None] * rng.gamma(20.0, 0.05, n_obs)[:, None]
    theta = np.array([1.0, 8.0])[code][:, None]
    x = rng.poisson(mu * rng.gamma(theta, 1 / theta, mu.shape)).astype(np.float32)
    adata = AnnData(x)
    adata.obs["batch"] = np.where(code == 0, "loose", "tight")
    return adata, code


def test_dispersions_that_differ_are_found() -> None:
    adata, _ = two_batches()
    options: dict[str, Any] = {"batch_key": "batch", "n_latent": 2, "max_epochs": 30}
    small_fit(adata, likelihood="nb", dispersion="gene-batch", **options)
    assert adata.uns["scuvae"]["params"]["dispersion"] == "gene-batch"
    loose, tight = (level.log_theta.detach() for level in get.model(adata).likelihood.levels)
    assert abs(float(loose.median()) - np.log(1.0)) < 0.3
    assert abs(float(tight.median()) - np.log(8.0)) < 0.6
    assert float((tight > loose).double().mean()) == 1.0


def test_a_strong_prior_leaves_one_dispersion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PRECISION", 1e5)
    adata, _ = two_batches(400)
    options: dict[str, Any] = {"batch_key": "batch", "n_latent": 2, "max_epochs": 10}
    small_fit(adata, likelihood="nb", dispersion="gene-batch", **options)
    loose, tight = (level.log_theta.detach() for level in get.model(adata).likelihood.levels)
    # Apart by the last of Adam's steps; without a prior they move apart from the first.
    assert float((tight - loose).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("likelihood", "amortized"),
    [
        ("negative_binomial", False),
        ("zero_inflated_negative_binomial", "semi"),
        ("gaussian", True),
    ],
)
def test_all_verbs(likelihood: str, amortized: bool | str, tmp_path: Path) -> None:
    """With another covariate, over whose levels averages are of no batch."""
    adata = with_sex(small_data(likelihood, n_vars=30))
    options: dict[str, Any] = {"likelihood": likelihood, "amortized": amortized}
    options |= {"batch_key": "batch", "categorical_covariate_keys": ["sex"]}
    small_fit(adata, max_epochs=2, dispersion="gene-batch", **options)
    adata.write_h5ad(tmp_path / "fit.h5ad")
    back = ad.read_h5ad(tmp_path / "fit.h5ad")
    state = get.model(adata).state_dict()
    assert_denoised_by_hand(back)
    if likelihood != "gaussian":
        tl.rank_genes(back, "sex")
    for name, value in get.model(back).state_dict().items():
        torch.testing.assert_close(value, state[name])
    new = with_sex(small_data(likelihood, n_vars=30, seed=1))
    other = new.copy()
    other.obs["batch"] = "b9"
    with unchanged(back):
        tl.project(new, back, polish=False)
        tl.project(other, back, polish=False, new_batches="estimate")
    for cells in (new, other):
        for verb in (tl.score, tl.sample, tl.denoise, tl.embed, tl.predictive_check):
            verb(cells)
        tl.refine(cells, key_added="k", max_steps=2)
        pp.neighbors(cells, n_neighbors=5, n_samples=2)
        assert np.isfinite(cells.obs["scuvae_elbo"]).all()
    known = get.model(back).likelihood.levels
    levels = get.model(other).likelihood.levels
    assert len(levels) == len(known) + 1
    for name, value in levels[-1].named_parameters():
        mean = torch.stack([dict(level.named_parameters())[name] for level in known]).mean(0)
        torch.testing.assert_close(value.detach(), mean.detach())


def with_sex(adata: AnnData) -> AnnData:
    adata.obs["sex"] = np.where(np.arange(adata.n_obs) % 2 == 0, "f", "m")
    return adata


def assert_denoised_by_hand(adata: AnnData) -> None:
    """Each cell's mean is that of its own batch's likelihood, as pandas tells batches apart."""
    model = get.model(adata)
    parts = [pd.get_dummies(adata.obs[key].astype(str)) for key in ("batch", "sex")]
    told = torch.as_tensor(np.column_stack(parts), dtype=torch.float32)
    found = tl.denoise(adata, genes=adata.var_names, n_samples=0).to_numpy()
    z = torch.as_tensor(np.asarray(adata.obsm["X_scuvae"]))
    size = torch.as_tensor(np.asarray(adata.X).sum(1))
    with torch.no_grad():
        eta = model.decoder(z, told)
        for number, level in enumerate(model.likelihood.levels):
            cells = (parts[0].to_numpy().argmax(1) == number).nonzero()[0]
            truth = level.mean(eta[cells], size[cells])
            np.testing.assert_allclose(found[cells], truth, rtol=1e-4, atol=1e-5)


def test_further_genes_and_an_encoder() -> None:
    """Batches share what further genes have."""
    adata = small_data("negative_binomial", n_vars=30)
    adata.var["own"] = np.arange(30) < 20
    options: dict[str, Any] = {"batch_key": "batch", "dispersion": "gene-batch"}
    small_fit(adata, likelihood="nb", mask_var="own", max_epochs=2, **options)
    tl.extend_genes(adata)
    found = tl.denoise(adata, genes=adata.var_names, n_samples=2)
    assert np.isfinite(found.to_numpy()).all()
    tl.sample(adata)
    tl.to_encoder(adata, max_epochs=1, key_added="e")
    assert isinstance(get.model(adata, key="e").likelihood, Likelihood)


def test_the_order_of_cells_does_not_matter() -> None:
    adata = small_data("negative_binomial", n_vars=30)
    small_fit(adata, max_epochs=2, batch_key="batch", dispersion="gene-batch")
    new = small_data("negative_binomial", n_vars=30, seed=1)
    turned = new[::-1].copy()
    for cells in (new, turned):
        tl.project(cells, adata, polish=False)
    # But for roundings of sums in another order, which steps pass on.
    np.testing.assert_allclose(
        turned.obsm["X_scuvae"][::-1], new.obsm["X_scuvae"], rtol=1e-2, atol=5e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispersion": "gene-batch"}, "batch_key="),
        ({"dispersion": "gene_batch", "batch_key": "batch"}, "gene-batch"),
        ({"dispersion": "gene-batch", "batch_key": "batch", "likelihood": "poisson"}, "poisson"),
        ({"dispersion": None}, "dispersion=None"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    adata = small_data("negative_binomial")
    with unchanged(adata), pytest.raises(ValueError, match=message):
        tl.fit(adata, **options)


def test_a_setting_that_does_not_fit_the_arrays_is_noticed(tmp_path: Path) -> None:
    adata = small_data("negative_binomial")
    small_fit(adata, max_epochs=1, batch_key="batch", dispersion="gene-batch")
    for changed in ("gene", "gene-cell"):
        odd = adata.copy()
        odd.uns["scuvae"]["params"]["dispersion"] = changed
        with pytest.raises(ValueError, match=r"dispersion|levels\.0|log_theta"):
            tl.score(odd)
