"""Zeros and ones, from tl.fit to what every verb makes of them."""

from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import SCHEMES, assert_same_posterior, small_data, small_fit, unchanged
from scipy import optimize
from scipy import sparse as sp
from scipy.spatial.distance import cdist
from scipy.special import expit
from small_models import batch_of

from scuvae import cli, get, tl
from scuvae.model.linear_start import fit_loadings


def three_kinds(n_obs: int, seed: int) -> tuple[AnnData, np.ndarray]:
    """Sparse zeros and ones of three kinds of cells, whose logits vary within a kind too."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    loadings, centres = fixed.normal(size=(4, 150)), fixed.normal(size=(3, 4))
    intercepts = fixed.normal(-1.5, 1, size=150)
    kind = rng.integers(3, size=n_obs)
    z = centres[kind] + 0.4 * rng.normal(size=(n_obs, 4))
    x = rng.random((n_obs, 150)) < expit(intercepts + 0.8 * z @ loadings)
    adata = AnnData(sp.csr_matrix(x.astype(np.float32)))
    adata.obs_names = [f"cell{seed}_{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(150)]
    return adata, np.array(["a", "b", "c"])[kind]


@cache
def _fitted(amortized: bool | str) -> AnnData:
    adata, kind = three_kinds(300, 0)
    adata.obs["kind"] = kind
    tl.fit(adata, likelihood="bernoulli", amortized=amortized, n_latent=4, max_epochs=25)
    return adata


@pytest.mark.parametrize("amortized", SCHEMES)
def test_every_verb_works_and_labels_are_as_good_as_neighbours(
    amortized: bool | str, tmp_path: Path
) -> None:
    adata = _fitted(amortized).copy()
    assert np.isfinite(get.history(adata)["elbo"]).all()
    new, kind = three_kinds(800, 1)
    tl.project(new, adata)
    tl.transfer_labels(new, adata, labels="kind")
    nearest = cdist(new.obsm["X_scuvae"], adata.obsm["X_scuvae"]).argsort(1)[:, :15]
    votes = adata.obs["kind"].to_numpy()[nearest]
    by_neighbours = np.array([max("abc", key=list(row).count) for row in votes])
    # what one cell in a hundred may differ by either way
    assert (new.obs["scuvae_label"] == kind).mean() >= (by_neighbours == kind).mean() - 0.01

    tl.denoise(adata)
    assert adata.layers["scuvae_denoised"].min() >= 0
    assert adata.layers["scuvae_denoised"].max() <= 1
    # the gene's share of ones, of cells that were fitted, to a tenth
    mean = np.asarray(adata.X.mean(0)).ravel()
    np.testing.assert_allclose(adata.layers["scuvae_denoised"].mean(0), mean, atol=0.1)
    with pytest.raises(ValueError, match="'bernoulli' has no totals"):
        tl.denoise(adata, library_size=100.0)
    tl.sample(adata)
    assert set(np.unique(adata.layers["scuvae_sample"].toarray())) == {0.0, 1.0}
    tl.predictive_check(adata)
    table = adata.uns["scuvae_predictive_check"]
    np.testing.assert_allclose(table["zero_fraction"], 1 - table["mean"])
    np.testing.assert_allclose(table["zero_fraction_predicted"], 1 - table["mean_predicted"])
    tl.score(adata, n_samples=10)
    tl.refine(adata, key_added="refined")
    assert np.isfinite(adata.obs["scuvae_log_evidence"]).all()
    assert np.isfinite(adata.obsm["refined"]).all()

    path = tmp_path / "fit.h5ad"
    adata.write_h5ad(path)
    few, back = new[:40, ::-1][:, 7:].copy(), anndata.read_h5ad(path)
    again = few.copy()
    tl.project(few, adata)  # genes are missing
    tl.project(again, back)
    assert_same_posterior(few, again)
    tl.novelty(few, back)
    assert np.isfinite(few.obs["scuvae_novelty"]).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [2.0, -1.0, 0.5])
def test_other_values_are_named(value: float, sparse: bool) -> None:
    adata = small_data("bernoulli")
    adata.X[3, 5] = value
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    parts = (
        rf"adata.X holds {value:g} at cell 'cell3', gene 'gene5': likelihood='bernoulli' needs "
        r"zeros and ones. Set adata.layers\['binary'\] = \(adata.X > 0\).*negative_binomial"
    )
    with unchanged(adata), pytest.raises(ValueError, match=parts):
        small_fit(adata, likelihood="bernoulli", check_values=False)
    reference = small_fit(small_data("bernoulli"), likelihood="bernoulli")
    with unchanged(adata), pytest.raises(ValueError, match=r"as in the fit: \(adata.X > 0\)"):
        tl.project(adata, reference)


def test_a_remedy_is_one_and_auto_takes_counts() -> None:
    adata = small_data("poisson")
    adata.X = sp.csr_matrix(adata.X)
    adata.layers["binary"] = (adata.X > 0).astype("float32")
    adata.layers["bool"] = adata.X > 0
    first = small_fit(adata.copy(), layer="binary", likelihood="bernoulli")
    second = small_fit(adata.copy(), layer="bool", likelihood="bernoulli")
    assert_same_posterior(first, second)
    small_fit(adata, layer="binary")
    assert adata.uns["scuvae"]["params"]["likelihood"] == "negative_binomial"


def test_a_cell_of_zeros_is_data() -> None:
    """No warning, and no prior for a posterior."""
    adata = small_data("bernoulli")
    adata.X[4] = 0
    small_fit(adata, likelihood="bernoulli", amortized=True)
    assert np.abs(adata.obsm["X_scuvae"][4]).max() > 0.01


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    small_data("bernoulli").write_h5ad(tmp_path / "in.h5ad")
    out = tmp_path / "out.h5ad"
    words = f"fit {tmp_path / 'in.h5ad'} -o {out} --likelihood bernoulli --max-epochs 2 -q"
    assert cli.main(words.split()) == 0
    assert anndata.read_h5ad(out).uns["scuvae"]["params"]["likelihood"] == "bernoulli"


def test_loadings_are_the_penalised_logistic_regression() -> None:
    """Against scipy's minimum of the same objective, gene by gene; constant genes stay finite."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(80, 2))
    x = (rng.random((80, 5)) < expit([0, -1, -2, 0, 0] + z[:, :1])).astype(float)
    x[:, 3], x[:, 4] = 0.0, 1.0
    b, v = fit_loadings(
        batch_of(torch.tensor(x), sparse=True), torch.tensor(z), link="logit", n_steps=12
    )
    design = np.hstack([np.ones((80, 1)), z])
    for gene in range(3):

        def loss(w: np.ndarray, gene: int = gene) -> float:
            eta = design @ w
            fit = np.logaddexp(0, eta).sum() - x[:, gene] @ eta
            return float(fit + 0.5 * (w[1:] ** 2).sum())

        best = optimize.minimize(loss, np.zeros(3), tol=1e-12)
        found = np.concatenate([[b[gene].item()], v[gene].numpy()])
        assert loss(found) < best.fun + 1e-6  # flat to the minimiser's gradients of 1e-5
    assert -9 < b[3] < -4
    assert 4 < b[4] < 9
