"""Linear decoders' loadings, and how many latent dimensions are in use."""

import numpy as np
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from helpers import small_counts, small_fit
from scipy.linalg import subspace_angles

from scuvae import get, pl, tl
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.evaluation.latent_dimensions import latent_dimensions


def low_rank(n_obs: int = 400, n_vars: int = 30, rank: int = 3, seed: int = 0) -> AnnData:
    """Gaussian values about a space of three dimensions, of different widths."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_obs, rank)) * [3.0, 2.0, 1.0][:rank]
    return AnnData(
        (z @ rng.normal(size=(rank, n_vars)) + rng.normal(size=(n_obs, n_vars))).astype("f")
    )


def test_a_linear_gaussian_fit_is_a_probabilistic_pca() -> None:
    """Its axes against the singular vectors."""
    adata = low_rank()
    tl.fit(
        adata,
        likelihood="gaussian",
        n_layers=0,
        n_latent=3,
        validation_fraction=0,
        max_epochs=400,
        batch_size=adata.n_obs,
        early_stopping=False,
    )
    tl.loadings(adata)
    x = adata.X.astype(float)
    centred = x - x.mean(0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    angles = subspace_angles(adata.varm["scuvae_loadings"].astype(float), right[:3].T)
    assert angles.max() < 5e-3  # .0015 here, after 400 steps, .0012 after 1,000
    # The maximum of log p, Tipping & Bishop (JRSSB 1999): .0027 nats above the fit's.
    n, p = x.shape
    variance = singular**2 / n
    noise = variance[3:].sum() / (p - 3)
    best = np.log(2 * np.pi) * p + np.log(variance[:3]).sum() + (p - 3) * np.log(noise) + p
    tl.score(adata)
    assert abs(adata.obs["scuvae_elbo"].mean() + best / 2) < 0.01
    # In order, and signed: each axis is the singular vector of its rank.
    ours = adata.varm["scuvae_loadings"].astype(float)
    assert (np.abs(np.sum(ours * right[:3].T, 0)) > 0.999).all()
    largest = np.abs(ours).argmax(0)
    assert (ours[largest, range(3)] > 0).all()
    np.testing.assert_allclose(ours.T @ ours, np.eye(3), atol=1e-5)  # float32


def test_factors_times_loadings_are_the_logits() -> None:
    adata = small_counts(n_obs=80)
    small_fit(adata, n_layers=0, max_epochs=5, n_latent=3)
    tl.loadings(adata)
    logits = get.model(adata).decoder(torch.as_tensor(adata.obsm["X_scuvae"])).detach().numpy()
    centred = logits - logits.mean(1, keepdims=True)  # all that a softmax sees
    centred = centred - centred.mean(0)
    found = adata.obsm["X_scuvae_factors"] @ adata.varm["scuvae_loadings"].T
    np.testing.assert_allclose(found, centred, atol=1e-4 * np.abs(centred).max())
    uns = adata.uns["scuvae_loadings"]
    variance = adata.obsm["X_scuvae_factors"].var(0, ddof=1)
    np.testing.assert_allclose(uns["variance"], variance, rtol=1e-4)
    assert (np.diff(uns["variance_ratio"]) <= 0).all()
    assert abs(uns["variance_ratio"].sum() - 1) < 1e-9
    sc.pl.ranking(adata, "varm", "scuvae_loadings", indices=[0, 1], show=False)
    small_fit(adata)
    assert "scuvae_loadings" not in adata.varm
    with pytest.raises(ValueError, match=r"1 hidden layers.*n_layers=0"):
        tl.loadings(adata)


def test_dimensions_are_told_from_a_rotation(fixed_random_state: None) -> None:
    """Two axes of five are used; rotated, the same is said."""
    n = 4000
    mean = torch.zeros(n, 5).double()
    mean[:, 0], mean[:, 3] = 2 * torch.randn(n), 0.5 * torch.randn(n)
    scale = torch.tensor([0.1, 1.0, 1.0, 0.5, 1.0]).double().expand(n, 5)
    plain = latent_dimensions(mean, [Gaussian(mean, scale)])
    rotation = torch.linalg.qr(torch.randn(5, 5).double()).Q
    covariance = rotation @ torch.diag(scale[0] ** 2) @ rotation.T
    tril = torch.linalg.cholesky(covariance).expand(n, 5, 5)
    turned = Gaussian(mean @ rotation.T, tril)
    rotated = latent_dimensions(turned.mean, [turned[:1000], turned[1000:]])
    for one, other in zip(plain, rotated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert plain.n_active == rotated.n_active == 2
    expected = 0.5 * ((mean[:, 0] ** 2).mean() + 0.01 - 1 - np.log(0.01))
    # The axes are those of 4,000 draws, off the two by about 1/√4000 of a radian.
    assert abs(plain.kl[0] - expected) < 0.05
    assert (plain.kl[2:].abs() < 0.01).all()


def test_a_picture_of_them() -> None:
    adata = small_counts(n_obs=80)
    small_fit(adata, max_epochs=3)
    ax = pl.latent_dimensions(adata, show=False)
    latent = adata.uns["scuvae"]["latent"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), latent["kl"])
    assert f"{latent['n_active']} of" in ax.get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match="no fit 'other'"):
        pl.latent_dimensions(adata, keys="other")


def test_molecules_tell_how_many_are_needed() -> None:
    """Counts of four kinds of cells: one dimension explains less than three."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 300)
    rate = np.exp(rng.normal(size=(4, 40)))[kind]
    adata = AnnData(rng.poisson(rate * 3).astype("f"))
    before = adata.X.copy()
    table = tl.compare_n_latent(adata, n_latents=[1, 3], max_epochs=20, n_hidden=16)
    assert table.index.tolist() == [1, 3]
    gain = table["molecules"].diff().iloc[1]
    assert gain > 2 * table["molecules_se"].max()
    assert table["validation_elbo"].diff().iloc[1] > 0
    assert (before == adata.X).all()
    assert not adata.obsm
    with pytest.raises(TypeError, match="key_added="):
        tl.compare_n_latent(adata, key_added="k")
    adata.X[0, 0] = 0.5
    with pytest.raises(ValueError, match="only whole counts"):
        tl.compare_n_latent(adata)
