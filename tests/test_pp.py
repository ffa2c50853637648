"""Neighbour graphs from posteriors, against closed forms and scanpy's own; thinned counts."""

import sys
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from helpers import fingerprint, small_counts, small_fit, unchanged, unsealed
from scipy import sparse as sp
from scipy.integrate import trapezoid
from scipy.stats import binom, chi2, norm
from sklearn.neighbors import NearestNeighbors

from scuvae import get, pp, tl
from scuvae.inference.mapping.embedding import Basis
from scuvae.io.slots import read_posterior
from scuvae.pp._graph import nearest, rows, stability, times_near
from scuvae.pp._neighbors import draws_in_map

N, K = 60, 6


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> AnnData:
    """A small fit whose map is twice its latent space, so that distances are known."""
    monkeypatch.setattr("scuvae.pp._neighbors.place", lambda model, z, basis: 2 * z)
    adata = small_fit(small_counts())
    adata.obsm["X_scuvae_embed"] = 2 * adata.obsm["X_scuvae"]
    return adata


def set_posterior(adata: AnnData, mean: np.ndarray, scale: np.ndarray) -> None:
    adata.obsm["X_scuvae"] = mean.astype(np.float32)
    adata.obsm["X_scuvae_embed"] = 2 * adata.obsm["X_scuvae"]
    adata.obsm["X_scuvae_scale"] = scale.astype(np.float32)
    del adata.obsm["X_scuvae_covariance"]


# --- how often ----------------------------------------------------------------------------------


def chance_that_the_first_is_nearer(mean: np.ndarray, scale: np.ndarray, i: int, j: int) -> float:
    """P(|z_i − z_j| < |z_i − z_l|) for normal points on a line, by quadrature over z_i and z_j.

    Given z_i, the two distances are independent: the density of one, times the chance that the
    other is longer.
    """
    (other,) = {0, 1, 2} - {i, j}
    z, step = np.linspace(-8, 8, 401, retstep=True)
    d, width = np.linspace(0, 12, 2401, retstep=True)
    zi = mean[i] + scale[i] * z[:, None]
    density = norm.pdf(zi + d, mean[j], scale[j]) + norm.pdf(zi - d, mean[j], scale[j])
    within = norm.cdf(zi + d, mean[other], scale[other])
    within = within - norm.cdf(zi - d, mean[other], scale[other])
    given = trapezoid(density * (1 - within), dx=width, axis=1)
    return float(trapezoid(given * norm.pdf(z), dx=step))


def test_weights_and_stability_are_the_chances_of_being_neighbours() -> None:
    mean, scale = np.array([0.0, 0.7, 1.8]), np.array([0.5, 0.9, 0.3])
    truth = np.zeros((3, 3))
    for i in range(3):
        for j in {0, 1, 2} - {i}:
            truth[i, j] = chance_that_the_first_is_nearer(mean, scale, i, j)
    np.testing.assert_allclose(truth.sum(1), 1, atol=1e-5)
    n, rng = 2000, np.random.default_rng(0)
    draws = mean[:, None] + scale[:, None] * rng.normal(size=(n, 3, 1))
    times = times_near(iter(draws), 1)
    # Five standard errors of a share.
    atol = 5 * np.sqrt(0.25 / n)
    np.testing.assert_allclose(times.toarray() / n, truth, atol=atol)
    # Two draws have the one neighbour in common with chance Σ_j p_ij².
    np.testing.assert_allclose(stability(times, 1, n), np.square(truth).sum(1), atol=2 * atol)


def test_stability_is_the_mean_overlap_of_all_pairs_of_draws() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(5, 30, 2))
    sets = [[set(row) for row in nearest(points, 4)[0].tolist()] for points in draws]
    overlap = [
        np.mean([len(sets[a][i] & sets[b][i]) / 4 for a in range(5) for b in range(a)])
        for i in range(30)
    ]
    np.testing.assert_allclose(stability(times_near(draws, 4), 4, 5), overlap, rtol=1e-6)


def test_the_nearest_are_the_nearest() -> None:
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    distance = np.linalg.norm(points[:, None].astype(float) - points, axis=2)
    np.fill_diagonal(distance, np.inf)
    indices, found = nearest(points, 7)
    np.testing.assert_allclose(found, np.sort(distance, axis=1)[:, :7], atol=1e-5)
    matrix = rows(indices, found)
    for i in range(50):
        assert set(matrix[i].indices) == set(np.argsort(distance[i])[:7])
    points[1] = points[0]  # twins: each the other's nearest, not its own
    indices, _ = nearest(points, 7)
    assert (indices[0, 0], indices[1, 0]) == (1, 0)


class Descent:
    """In place of pynndescent's search, which compiles for half a minute: it finds too few of 3's,
    and the point itself first, but where another is as near."""

    def __init__(self, points: np.ndarray, n_neighbors: int, random_state: int) -> None:
        found = NearestNeighbors(n_neighbors=n_neighbors).fit(points)
        distances, indices = found.kneighbors(points)
        indices[7, :2] = indices[7, :2][np.argsort(indices[7, :2] == 7)]
        indices[3, -3:], distances[3, -3:] = -1, np.inf
        self.neighbor_graph = indices, distances


@pytest.mark.parametrize("search", [Descent, pytest.param(None, marks=pytest.mark.slow)])
def test_the_approximate_search_finds_nearly_the_same(
    search: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    points[7] = points[8]
    exact, _ = nearest(points, 9)
    if search is not None:
        monkeypatch.setitem(sys.modules, "pynndescent", SimpleNamespace(NNDescent=search))
    monkeypatch.setattr("scuvae.pp._graph.MOST_EXACT", 100)
    found, distances = nearest(points, 9)
    assert (found >= 0).all()
    assert not (found == np.arange(400)[:, None]).any()
    assert (np.diff(distances, axis=1) >= 0).all()
    shared = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    assert np.mean(shared) > 0.95 * 9


# --- the graph in AnnData -----------------------------------------------------------------------


def test_sure_posteriors_give_scanpys_neighbours(fitted: AnnData) -> None:
    rng = np.random.default_rng(0)
    set_posterior(fitted, rng.normal(size=(N, 3)), np.full((N, 3), 1e-6))
    pp.neighbors(fitted, n_neighbors=K, n_samples=3)
    theirs = sc.pp.neighbors(
        fitted, n_neighbors=K, use_rep="X_scuvae_embed", method="gauss", copy=True
    )
    # Of distances and slots alone: umap, of which the weights are, compiles for half a minute.
    theirs.uns["neighbors"]["params"]["method"] = "umap"
    ours, other = fitted.obsp["distances"], theirs.obsp["distances"]
    assert type(ours) is type(other)
    assert ours.dtype == other.dtype
    assert ours.indices.dtype == other.indices.dtype
    np.testing.assert_array_equal(np.diff(ours.indptr), K - 1)
    np.testing.assert_allclose(ours.toarray(), other.toarray(), atol=1e-5)
    assert (
        fingerprint(fitted.uns["neighbors"])
        == fingerprint({name: theirs.uns["neighbors"][name] for name in fitted.uns["neighbors"]})
        or fitted.uns["neighbors"] == theirs.uns["neighbors"]
    )
    assert set(theirs.uns["neighbors"]) == set(fitted.uns["neighbors"])
    is_near = (other.toarray() > 0).astype(float)
    weights = fitted.obsp["connectivities"]
    assert type(weights) is type(theirs.obsp["connectivities"])
    assert weights.dtype == np.float32  # as umap's
    np.testing.assert_allclose(weights.toarray(), (is_near + is_near.T) / 2)
    np.testing.assert_array_equal(fitted.obs["scuvae_neighbor_stability"], 1)


def test_a_cell_that_may_be_anywhere_has_many_light_edges(fitted: AnnData) -> None:
    rng = np.random.default_rng(0)
    scale = np.full((N, 3), 1e-3)
    scale[0] = 3.0
    set_posterior(fitted, rng.normal(size=(N, 3)), scale)
    pp.neighbors(fitted, n_neighbors=K, n_samples=20)
    weights = fitted.obsp["connectivities"]
    assert abs(weights - weights.T).max() == 0
    assert weights.diagonal().max() == 0
    # Each draw gives every cell K − 1 neighbours.
    np.testing.assert_allclose(weights.sum(), N * (K - 1), rtol=1e-5)
    assert weights[0].nnz > 3 * (K - 1)
    assert weights[0].max() < 0.6
    stays = fitted.obs["scuvae_neighbor_stability"]
    assert stays.dtype == np.float32
    assert stays.iloc[0] < 0.5
    assert stays.iloc[1:].mean() > 0.85  # but for the one that comes and goes
    assert stays.between(0, 1).all()


def test_draws_have_the_posteriors_covariance_and_cells_nothing_in_common(fitted: AnnData) -> None:
    q, model = read_posterior(fitted, None), get.model(fitted)
    basis = Basis(torch.empty(0), torch.empty(0), 1.0, ())
    draws = np.stack(list(draws_in_map(model, q, basis, 4000, np.random.default_rng(0))))
    assert draws.shape == (4000, N, 3)
    truth = 4 * q.covariance_matrix.numpy()
    sd = np.sqrt(np.diagonal(truth, axis1=1, axis2=2))
    found = np.einsum("snl,snk->nlk", *[draws - 2 * q.mean.numpy()] * 2) / 4000
    # A covariance over 4,000 draws has a standard error of at most √(2/4000) of the scales: 5 of
    # them, of some hundred.
    assert np.abs((found - truth) / (sd[:, :, None] * sd[:, None, :])).max() < 5 * np.sqrt(2 / 4000)
    cross = np.mean(
        (draws[:, 0] - 2 * q.mean[0].numpy()) * (draws[:, 1] - 2 * q.mean[1].numpy()), 0
    )
    assert np.abs(cross / (sd[0] * sd[1])).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("amortized", [False, True])
def test_cells_are_drawn_in_the_map_of_the_fit(amortized: bool) -> None:
    """With the real map: sure posteriors have the neighbours of the map that tl.fit wrote."""
    adata = small_fit(small_counts(), batch_key="batch", amortized=amortized, key_added="k")
    new = small_counts(seed=1)
    tl.project(new, adata, key="k", key_added="k")
    for data in (adata, new):
        data.obsm.pop("k_covariance", None)
        data.obsm["k_scale"] = np.full_like(data.obsm["k_scale"], 1e-6)
        pp.neighbors(data, key="k", n_neighbors=K, n_samples=2)
        graph, kept = data.obsp["distances"], data.obs["k_neighbor_stability"]
        theirs = sc.pp.neighbors(data, n_neighbors=K, use_rep="k_embed", method="gauss", copy=True)
        # Ties aside, of cells that the map puts in one place.
        assert kept.mean() > 0.99
        far = theirs.obsp["distances"].toarray()
        np.testing.assert_allclose(graph.toarray(), far, rtol=1e-3, atol=1e-3)
        is_near = (theirs.obsp["distances"] > 0).astype(float)
        wrong = abs(data.obsp["connectivities"] - (is_near + is_near.T) / 2)
        assert wrong.sum() < 0.01 * is_near.sum()


def in_two_groups(adata: AnnData) -> np.ndarray:
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], N // 2)
    mean = rng.normal(size=(N, 3)) + 20 * group[:, None]
    mean[0], mean[-1] = 9, 11  # two cells between: paga fails on groups without an edge
    set_posterior(adata, mean, np.full((N, 3), 0.3))
    return group


def test_scanpy_runs_on_it(fitted: AnnData) -> None:
    group = in_two_groups(fitted)
    for key, added in ((None, ""), ("own", "own_")):
        pp.neighbors(fitted, n_neighbors=K, key_added=key)
        assert {f"{added}connectivities", f"{added}distances"} <= set(fitted.obsp)
        arguments = {"neighbors_key": key} if key else {}
        sc.tl.leiden(fitted, flavor="igraph", n_iterations=2, resolution=0.05, **arguments)
        assert fitted.obs.groupby("leiden", observed=True).size().tolist() == [N // 2] * 2
        assert len(set(zip(fitted.obs["leiden"], group, strict=True))) == 2
        fitted.obs["group"] = fitted.obs["leiden"]
        sc.tl.paga(fitted, "group", **arguments)
        assert 0 < fitted.uns["paga"]["connectivities"].max() < 0.5
        sc.tl.diffmap(fitted, n_comps=5, **arguments)
        assert np.isfinite(fitted.obsm["X_diffmap"]).all()


@pytest.mark.slow
def test_a_umap_of_it_keeps_groups_apart(fitted: AnnData) -> None:
    """Half a minute, for which umap compiles; what it asks of a graph is asked in test_embed."""
    group = in_two_groups(fitted)
    pp.neighbors(fitted, n_neighbors=K)
    sc.tl.umap(fitted, maxiter=100)
    place = fitted.obsm["X_umap"]
    centres = np.array([place[group == g].mean(0) for g in (0, 1)])
    nearer = np.linalg.norm(place[:, None] - centres, axis=2).argmin(1)
    np.testing.assert_array_equal(nearer, group)


def test_the_same_seed_the_same_graph(fitted: AnnData, tmp_path) -> None:
    with unchanged(fitted):
        a, b = (pp.neighbors(fitted, n_neighbors=K, rng=3, copy=True) for _ in range(2))
        c = pp.neighbors(fitted, n_neighbors=K, rng=4, copy=True)
        d = pp.neighbors(fitted, n_neighbors=K, rng=np.random.default_rng(3), copy=True)
    assert fingerprint(a) == fingerprint(b)
    assert abs(a.obsp["connectivities"] - c.obsp["connectivities"]).max() > 0
    assert abs(a.obsp["connectivities"] - d.obsp["connectivities"]).max() == 0
    assert a.uns["neighbors"]["params"]["random_state"] == 3
    a.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    for name in ("connectivities", "distances"):
        assert abs(read.obsp[name] - a.obsp[name]).max() == 0
    sc.tl.leiden(read, flavor="igraph", n_iterations=2)


def test_views_become_data_of_their_own(fitted: AnnData) -> None:
    view = fitted[:40]
    with unchanged(fitted), pytest.warns(ad.ImplicitModificationWarning):
        pp.neighbors(view, n_neighbors=K)
    own = fitted[:40].copy()
    pp.neighbors(own, n_neighbors=K)
    assert abs(view.obsp["connectivities"] - own.obsp["connectivities"]).max() == 0


def test_what_has_no_graph(fitted: AnnData) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"key": "k"}, ValueError, r"uns\['k'\] holds no fit"),
        ({"n_neighbors": N}, ValueError, f"n_neighbors={N} for {N} cells"),
        ({"n_neighbors": 1}, ValueError, "n_neighbors=1"),
        ({"n_neighbors": 2.5}, TypeError, "n_neighbors=2.5"),
        ({"n_samples": 1}, ValueError, "n_samples=1"),
        ({"key_added": "scuvae"}, ValueError, "name of a fit"),
        ({"key_added": "a/b"}, ValueError, "'a/b' cannot name"),
        ({"rng": "0"}, TypeError, "rng='0'"),
        ({"rng": -1}, ValueError, "rng=-1"),
        ({"copy": 1}, TypeError, "copy=1"),
    ]
    for options, kind, text in cases:
        with unchanged(fitted), pytest.raises(kind, match=text):
            pp.neighbors(fitted, **options)
    with pytest.raises(ValueError, match=r"holds no fit: run scuvae.tl.fit"):
        pp.neighbors(small_counts())
    with pytest.raises(TypeError, match="not an AnnData"):
        pp.neighbors(fitted.X)
    coordinates = fitted.obsm.pop("X_scuvae_embed")
    with pytest.raises(ValueError, match=r"'X_scuvae_embed'\] holds no map.*tl.embed\(adata\)"):
        pp.neighbors(fitted)
    fitted.obsm["X_scuvae_embed"] = coordinates
    del unsealed(fitted)["embed"]
    with pytest.raises(ValueError, match=r"uns\['scuvae'\] holds no map"):
        pp.neighbors(fitted)


# --- thinned counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint16", "bool"])
def test_the_two_layers_sum_to_the_counts(dtype: str) -> None:
    counts = small_counts().X.astype(dtype)
    found = {}
    for kind in (np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array):
        if dtype == "float16" and kind is not np.asarray:
            continue  # scipy has no such matrices
        adata = AnnData(kind(counts))
        with unchanged(adata.X):
            pp.thin_counts(adata, fraction=0.3)
        dense = {}
        for name in ("thinned", "rest"):
            part = adata.layers[name]
            if sp.issparse(part):
                assert isinstance(part, sp.csr_array if kind is sp.csr_array else sp.csr_matrix)
                assert (part.data > 0).all()
                part = part.toarray()
            assert part.dtype == ("float32" if dtype == "float16" else dtype)
            dense[name] = part.astype(float)
        np.testing.assert_array_equal(dense["thinned"] + dense["rest"], counts.astype(float))
        found[kind] = dense["thinned"]
    # The same seed, the same split, however counts are stored.
    for split in found.values():
        np.testing.assert_array_equal(split, found[np.asarray])


def test_every_molecule_goes_to_the_first_layer_with_the_same_chance() -> None:
    """Against the binomial itself, count by count."""
    x = np.repeat([1, 2, 5], 4000).reshape(3, 4000)
    adata = AnnData(sp.csr_matrix(x.astype(np.float32)))
    pp.thin_counts(adata, fraction=0.3, rng=1)
    for row, count in enumerate((1, 2, 5)):
        seen = np.bincount(adata.layers["thinned"][row].toarray().ravel().astype(int))
        seen = np.pad(seen, (0, count + 1 - len(seen)))
        expected = 4000 * binom.pmf(np.arange(count + 1), count, 0.3)
        # One in ten thousand fixed seeds would fail.
        assert (np.square(seen - expected) / expected).sum() < chi2.ppf(0.9999, count)


def test_seeds_names_layers_and_copies() -> None:
    adata = small_counts()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    with unchanged(adata):
        one, two, three = (
            pp.thin_counts(adata, layer="counts", layers_added=["a", "b"], rng=rng, copy=True)
            for rng in (0, 0, 1)
        )
    np.testing.assert_array_equal(one.layers["a"], two.layers["a"])
    assert (one.layers["a"] != three.layers["a"]).any()
    np.testing.assert_array_equal(one.layers["a"] + one.layers["b"], adata.layers["counts"])
    large = AnnData(np.full((1, 3), 2.0**25 + 4, np.float32))
    pp.thin_counts(large)  # halves are odd as often as even
    total = large.layers["thinned"] + large.layers["rest"]
    np.testing.assert_array_equal(total, large.X)
    assert (large.layers["thinned"] % 1 == 0).all()


def test_stored_zeros_and_duplicates() -> None:
    data, indices, indptr = np.array([0.0, 3, 4, 2]), np.array([0, 2, 1, 1]), np.array([0, 2, 4])
    x = sp.csr_matrix((data, indices, indptr), shape=(2, 3))
    adata = AnnData(x.copy())
    pp.thin_counts(adata)
    total = adata.layers["thinned"] + adata.layers["rest"]
    np.testing.assert_array_equal(total.toarray(), [[0, 0, 3], [0, 6, 0]])


def test_counts_that_cannot_be_split() -> None:
    adata = small_counts()
    adata.X[3, 4] = 0.5
    for x in (adata.X, sp.csr_matrix(adata.X)):
        adata.X = x
        with (
            unchanged(adata),
            pytest.raises(ValueError, match=r"adata.X holds 0.5 at cell 'cell3', gene 'gene4'"),
        ):
            pp.thin_counts(adata)
    for wrong in (-1, np.nan, np.inf):
        adata = small_counts()
        adata.X[0, 0] = wrong
        with pytest.raises(ValueError, match="only whole counts can be split"):
            pp.thin_counts(adata)
    adata = small_counts()
    adata.layers["counts"] = adata.X
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"fraction": 0}, ValueError, "fraction=0"),
        ({"fraction": 1}, ValueError, "fraction=1"),
        ({"fraction": "0.5"}, TypeError, "fraction='0.5'"),
        ({"layer": "count"}, ValueError, "Did you mean 'counts'"),
        ({"layers_added": "ab"}, TypeError, "pass a list of names"),
        ({"layers_added": ("a", "a")}, ValueError, "two different names"),
        ({"layers_added": ("a",)}, ValueError, "two different names"),
        ({"layer": "counts", "layers_added": ("a", "counts")}, ValueError, "neither of them"),
        ({"rng": 1.5}, TypeError, "rng=1.5"),
    ]
    for options, kind, text in cases:
        with unchanged(adata), pytest.raises(kind, match=text):
            pp.thin_counts(adata, **options)
