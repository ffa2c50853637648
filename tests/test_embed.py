"""The map: coordinates against quadrature and finite differences, and what must not matter."""

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import LIKELIHOOD_NAMES, small_counts, small_data, small_fit
from scipy.integrate import quad

from scuvae import get, pp, tl
from scuvae.batches import Batch
from scuvae.inference.mapping import embedding
from scuvae.io.covariates import match_covariates
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood


@pytest.mark.parametrize("name", LIKELIHOOD_NAMES)
@pytest.mark.parametrize("base", [False, True])
def test_the_coordinate_is_the_integral_of_means_over_deviations(name: str, base: bool) -> None:
    likelihood = LIKELIHOODS[name](3).double()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.copy_(torch.linspace(-2, 1, parameter.numel(), dtype=torch.float64))
    every = slice(None)
    mu = torch.tensor([0.01, 3.0, 200.0], dtype=torch.float64)
    method = Likelihood._stabilised if base else type(likelihood)._stabilised
    with torch.no_grad():
        found = method(likelihood, mu.clone(), every)

        def slope(u: float, g: int) -> float:  # in u, μ = u²: no pole at zero
            at = torch.full((3,), u * u, dtype=torch.float64)
            step = 1e-4 * max(u * u, 1e-8)
            rise = (likelihood._mean(at + step, every) - likelihood._mean(at - step, every))[g]
            return float(2 * u * rise / (2 * step) / likelihood._variance(at, every)[g].sqrt())

        truth = [quad(slope, 1e-9, float(m) ** 0.5, args=(g,))[0] for g, m in enumerate(mu)]
    # The base class has a midpoint rule of 64 panels.
    np.testing.assert_allclose(found, truth, rtol=2e-3 if base else 1e-6)


@pytest.mark.parametrize("name", ["gaussian", "poisson", "negative_binomial"])
def test_its_pullback_is_the_models_curvature(name: str) -> None:
    adata = small_fit(small_data(name), likelihood=name)
    model = get.model(adata).double()
    z, total = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), 50.0
    step = 1e-6
    moves = step * torch.eye(3, dtype=torch.float64)
    ends = [[embedding.stabilised(model, z + s * m, total) for s in (1, -1)] for m in moves]
    jacobian = torch.stack([(a - b) / (2 * step) for a, b in ends], -1)
    x = torch.zeros(4, model.n_vars, dtype=torch.float64)
    batch = Batch(x=x, index=torch.arange(4), size_factor=torch.full((4,), total).double())
    with torch.no_grad():
        truth = model.curvature(batch, z)
    np.testing.assert_allclose(jacobian.mT @ jacobian, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOOD_NAMES)
def test_own_cells_land_where_they_are_also_from_a_file(name: str, tmp_path) -> None:
    adata = small_fit(small_data(name), likelihood=name, batch_key="batch")
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.obsm["X_scuvae_embed"], adata.obsm["X_scuvae_embed"])
    tl.project(back, back, key_added="new")
    back.obsm["new"][:] = adata.obsm["X_scuvae"]
    entry, model = back.uns["new"]["embed"], get.model(back, key="new")
    from scuvae.tl._embed import placed

    told = match_covariates(adata, get.model(adata).design)
    found = placed(model, torch.as_tensor(back.obsm["new"]), entry, told)
    np.testing.assert_allclose(found, adata.obsm["X_scuvae_embed"], atol=1e-5)


def test_batches_chunks_and_missing_genes_do_not_matter(monkeypatch) -> None:
    adata = small_fit(small_counts(), batch_key="batch")
    model, z = get.model(adata), torch.as_tensor(adata.obsm["X_scuvae"])
    parts = []
    with torch.no_grad():
        for row in torch.eye(2):
            eta = model.decoder(z, row.expand(len(z), -1))
            parts.append(model.likelihood.stabilised(eta, torch.full((len(z),), 50.0)))
    assert not torch.allclose(*parts)
    mean = torch.stack(parts).mean(0)
    torch.testing.assert_close(embedding.stabilised(model, z, 50.0), mean)
    monkeypatch.setattr(embedding, "CHUNK", 7)
    before = adata.obsm["X_scuvae_embed"].copy()
    tl.embed(adata)
    np.testing.assert_allclose(adata.obsm["X_scuvae_embed"], before, atol=1e-4)
    few = adata[:, ::2].copy()
    tl.project(few, adata)
    assert few.obsm["X_scuvae_embed"].shape == before.shape
    # All genes kept, distances are those of the coordinates before the components.
    tl.embed(adata, n_components=40)
    total = adata.uns["scuvae"]["embed"]["total"]
    v = embedding.stabilised(model, z, total)
    full = torch.as_tensor(adata.obsm["X_scuvae_embed"])
    np.testing.assert_allclose(
        torch.cdist(full.double(), full.double()), torch.cdist(v.double(), v.double()), atol=2e-3
    )


def test_it_is_centred_and_has_signs_of_its_own() -> None:
    """Principal coordinates of the cells: mean zero, uncorrelated, the widest first; of each
    component the largest entry is positive, so that two processes draw one map."""
    adata = small_fit(small_counts())
    found = adata.obsm["X_scuvae_embed"].astype(np.float64)
    spread = np.cov(found.T)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(spread - np.diag(np.diag(spread)), 0, atol=1e-3 * spread.max())
    assert (np.diff(np.diag(spread)) <= 1e-6).all()
    components = adata.uns["scuvae"]["embed"]["components"]
    largest = np.take_along_axis(components, np.abs(components).argmax(0)[None], axis=0)
    assert (largest > 0).all()


def test_neighbours_are_those_of_the_posteriors() -> None:
    adata = small_fit(small_counts())
    pp.neighbors(adata, n_neighbors=8)
    graph = adata.obsp["connectivities"]
    assert abs(graph - graph.T).max() == 0
    assert 0 < graph.data.min() <= graph.data.max() <= 1
    assert adata.obs["scuvae_neighbor_stability"].between(0, 1).all()
    again = adata.copy()
    pp.neighbors(again, n_neighbors=8)
    assert abs(again.obsp["connectivities"] - graph).max() == 0
    # Posteriors without a width agree on every neighbour.
    for slot in ("X_scuvae_scale", "X_scuvae_covariance"):
        again.obsm[slot] = again.obsm[slot] * 1e-12
    again.obsm["X_scuvae_scale"] += 1e-12
    del again.obsm["X_scuvae_covariance"]
    pp.neighbors(again, n_neighbors=8)
    assert again.obs["scuvae_neighbor_stability"].min() > 0.999
    with pytest.raises(ValueError, match="n_neighbors=60"):
        pp.neighbors(adata, n_neighbors=60)
