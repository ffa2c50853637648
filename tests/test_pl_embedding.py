"""Scores and moves on embeddings, against the numbers they are drawn from."""

from collections.abc import Iterator
from typing import Any

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import unchanged
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from scipy.stats import gmean
from sklearn.decomposition import PCA

from scuvae import pl

N, L = 200, 4


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    before = mpl.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture
def adata() -> ad.AnnData:
    """Two groups of cells, far apart in the latent space and on the embedding."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], N // 2)
    centre = np.where(group[:, None] == 0, -5.0, 5.0)
    obs = pd.DataFrame(
        {
            "group": pd.Categorical(np.array(["a", "b"])[group]),
            "scuvae_amortization_gap": rng.exponential(2, N) - 0.05,
            "scuvae_pareto_k": rng.normal(size=N),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    adata = ad.AnnData(np.zeros((N, 3), np.float32), obs=obs)
    adata.uns["group_colors"] = ["#ff0000", "#0000ff"]
    adata.obsm["X_umap"] = rng.normal(size=(N, 2)) + 2 * centre
    spread = np.array([3.0, 2.0, 0.5, 0.4])
    adata.obsm["X_scuvae"] = (rng.normal(size=(N, L)) * spread + centre).astype(np.float32)
    adata.obsm["X_scuvae_scale"] = rng.uniform(0.05, 0.9, (N, L)).astype(np.float32)
    moved = adata.obsm["X_scuvae"] + rng.normal(size=(N, L)).astype(np.float32)
    adata.obsm["X_scuvae_encoder"] = moved
    return adata


def bar_of(ax: Axes) -> Axes:
    return ax.collections[-1].colorbar.ax


def arrows_of(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends."""
    (quiver,) = (c for c in ax.collections if isinstance(c, Quiver))
    start = np.asarray(quiver.XY)
    return start, start + np.stack([quiver.U, quiver.V], axis=1)


# --- scores -------------------------------------------------------------------------------------


def test_points_have_the_values_of_their_cells_high_ones_on_top(adata: ad.AnnData) -> None:
    axes = pl.embedding_scores(adata)
    truth = {
        "Posterior scale": gmean(adata.obsm["X_scuvae_scale"].astype(float), axis=1),
        "Amortization gap": adata.obs["scuvae_amortization_gap"].to_numpy(),
    }
    assert [ax.get_title() for ax in axes] == list(truth)
    for ax in axes:
        values = truth[ax.get_title()]
        order = np.argsort(values)
        points = ax.collections[-1]
        np.testing.assert_allclose(points.get_array(), values[order], rtol=1e-12)
        np.testing.assert_allclose(points.get_offsets(), adata.obsm["X_umap"][order])
        assert points.get_rasterized()
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP1", "UMAP2")
    assert [bar_of(ax).get_ylabel() for ax in axes] == [
        "prior standard deviations",
        "nats per cell",
    ]


def test_by_default_what_the_fit_has(adata: ad.AnnData) -> None:
    def drawn(**options: Any) -> list[str]:
        return [ax.get_title() for ax in pl.embedding_scores(adata, **options)]

    stays = np.linspace(0, 1, N).astype(np.float32)
    del adata.obs["scuvae_amortization_gap"]
    assert drawn() == ["Posterior scale"]  # all that tl.fit leaves
    adata.obs["scuvae_novelty"] = np.nan  # of no cell
    adata.obs["scuvae_neighbor_stability"] = stays
    adata.obs["scuvae_elbo"] = -stays
    assert drawn() == ["Posterior scale", "Neighbor stability", "ELBO"]
    axes = pl.embedding_scores(adata)
    np.testing.assert_array_equal(axes[1].collections[-1].get_array(), stays)
    assert bar_of(axes[1]).get_ylabel() == "share of neighbours that stay"
    # Another fit has its own columns alone, also one whose posterior is gone.
    adata.obs["k_novelty"] = stays
    assert drawn(key="k") == ["Novelty"]
    with pytest.raises(ValueError, match=r"nothing to draw: .* no 'q_scale'"):
        pl.embedding_scores(adata, key="q")


def test_colours_end_at_the_percentiles_and_say_where_cells_lie_beyond(adata: ad.AnnData) -> None:
    adata.obs["scuvae_amortization_gap"] = np.arange(N, dtype=float)
    adata.obs.loc["cell7", "scuvae_amortization_gap"] = 1e6
    gap, k = pl.embedding_scores(adata, color=["amortization_gap", "pareto_k"])
    values = adata.obs["scuvae_pareto_k"]
    assert k.collections[-1].get_clim() == pytest.approx(tuple(np.percentile(values, (1, 99))))
    assert k.collections[-1].colorbar.extend == "both"
    # The gap of a perfect encoder is zero: no cell lies below.
    low, high = gap.collections[-1].get_clim()
    assert (low, gap.collections[-1].colorbar.extend) == (0, "max")
    assert high < N


def test_cells_without_a_value_or_a_place(adata: ad.AnnData) -> None:
    adata.obs.loc[["cell1", "cell2"], "scuvae_amortization_gap"] = np.nan
    adata.obsm["X_umap"][5] = np.nan
    (ax,) = pl.embedding_scores(adata, color="amortization_gap")
    missing, points = ax.collections
    np.testing.assert_array_equal(missing.get_offsets(), adata.obsm["X_umap"][[1, 2]])
    np.testing.assert_array_equal(missing.get_facecolors(), [to_rgba("lightgray")])
    assert len(points.get_offsets()) == N - 3


def test_other_fits_and_embeddings(adata: ad.AnnData) -> None:
    adata.obsm["X_scvi_scale"] = adata.obsm["X_scuvae_scale"] / 2
    adata.obsm["k_scale"] = adata.obsm["X_scuvae_scale"] / 3
    adata.obsm["own"] = adata.obsm["X_umap"][:, ::-1]
    whole = pl.embedding_scores(adata, color="scale")[0].collections[-1].get_array()
    for key, share in (("scvi", 2), ("k", 3)):
        (ax,) = pl.embedding_scores(adata, color="scale", key=key, basis="own")
        np.testing.assert_allclose(ax.collections[-1].get_array(), whole / share, rtol=1e-6)
        assert ax.get_xlabel() == "own 1"


def test_scores_that_cannot_be_drawn(adata: ad.AnnData) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"basis": "tsne"}, ValueError, "no embedding 'tsne'"),
        ({"basis": 3}, TypeError, "basis=3 is a int"),
        ({"color": "scales"}, ValueError, "Did you mean 'scale'"),
        ({"color": "split"}, ValueError, "'split' is no score"),
        ({"color": []}, ValueError, "color is empty"),
        ({"color": "elbo"}, ValueError, r"scuvae.tl.score\(adata\) first"),
        ({"color": "neighbor_stability"}, ValueError, r"scuvae.pp.neighbors\(adata\) first"),
        ({"color": "novelty"}, ValueError, r"scuvae.tl.novelty\(adata, reference\) first"),
        ({"key": "k", "color": "scale"}, ValueError, "no 'k_scale'"),
    ]
    for options, kind, text in cases:
        with pytest.raises(kind, match=text):
            pl.embedding_scores(adata, **options)
    _, one = plt.subplots()
    with pytest.raises(ValueError, match="ax has 1 axes for 2 panels"):
        pl.embedding_scores(adata, ax=one)
    adata.obs["scuvae_pareto_k"] = np.nan
    with pytest.raises(ValueError, match="'pareto_k' has no finite value"):
        pl.embedding_scores(adata, color="pareto_k")
    del adata.obsm["X_umap"]
    with pytest.raises(ValueError, match=r"scanpy\.tl\.umap"):
        pl.embedding_scores(adata)


# --- arrows -------------------------------------------------------------------------------------


def test_arrows_are_the_moves_in_the_plane_of_the_principal_components(adata: ad.AnnData) -> None:
    ax = pl.refinement_arrows(adata)
    start, end = arrows_of(ax)
    before, after = (adata.obsm[k].astype(float) for k in ("X_scuvae_encoder", "X_scuvae"))
    pca = PCA(2).fit(after)
    truth = np.stack([pca.transform(before), pca.transform(after)])
    sign = np.sign((truth[1] * end).sum(axis=0))
    np.testing.assert_allclose(start, truth[0] * sign, atol=1e-5)
    np.testing.assert_allclose(end, truth[1] * sign, atol=1e-5)
    move = after - before
    share = np.square(move @ pca.components_.T).sum() / np.square(move).sum()
    assert f"{share:.0%} of the squared moves" in ax.get_title()
    assert f"all {N} cells" in ax.get_title()


def test_with_one_latent_dimension_the_plane_is_a_line(adata: ad.AnnData) -> None:
    for slot in ("X_scuvae", "X_scuvae_encoder"):
        adata.obsm[slot] = adata.obsm[slot][:, :1]
    ax = pl.refinement_arrows(adata)
    start, end = arrows_of(ax)
    np.testing.assert_array_equal(np.stack([start, end])[..., 1], 0)
    assert "100% of the squared moves" in ax.get_title()


def test_arrows_on_an_embedding_come_from_where_the_encoder_was(adata: ad.AnnData) -> None:
    adata.obsm["X_scuvae_encoder"] = adata.obsm["X_scuvae"].copy()
    # The encoder took the last cell for one of the other group.
    adata.obsm["X_scuvae_encoder"][-1] = adata.obsm["X_scuvae"][: N // 2].mean(axis=0)
    start, end = arrows_of(pl.refinement_arrows(adata, basis="umap"))
    np.testing.assert_allclose(end, adata.obsm["X_umap"])
    np.testing.assert_array_equal(start[:-1], adata.obsm["X_umap"][:-1])
    # The groups lie 20 apart on either axis, with a spread of 1: 4 of them off at most.
    np.testing.assert_allclose(end[-1] - start[-1], [20, 20], atol=4)


def test_two_fits_and_the_bridge_draw_the_same(adata: ad.AnnData) -> None:
    whole = np.stack(arrows_of(pl.refinement_arrows(adata)))
    adata.obsm["first"], adata.obsm["second"] = (
        adata.obsm["X_scuvae_encoder"],
        adata.obsm["X_scuvae"],
    )
    adata.obsm["X_scvi"], adata.obsm["X_scvi_encoder"] = adata.obsm["second"], adata.obsm["first"]
    for options in ({"key": "first", "refined_key": "second"}, {"key": "scvi"}):
        np.testing.assert_array_equal(arrows_of(pl.refinement_arrows(adata, **options)), whole)


def test_no_more_arrows_than_asked_in_the_colours_of_their_groups(adata: ad.AnnData) -> None:
    ax = pl.refinement_arrows(adata, max_arrows=30, groupby="group")
    _, every = arrows_of(pl.refinement_arrows(adata))
    _, end = arrows_of(ax)
    assert len(end) == 30
    assert f"30 of {N} cells" in ax.get_title()
    cells = [int(np.flatnonzero((every == place).all(axis=1))[0]) for place in end]
    (quiver,) = (c for c in ax.collections if isinstance(c, Quiver))
    colours = {"a": to_rgba("#ff0000"), "b": to_rgba("#0000ff")}
    wanted = [colours[adata.obs["group"].iloc[cell]] for cell in cells]
    np.testing.assert_allclose(quiver.get_facecolors(), wanted)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_cells_without_a_mean_have_no_arrow(adata: ad.AnnData) -> None:
    adata.obsm["X_scuvae_encoder"][3] = np.nan
    for basis in (None, "umap"):
        start, end = arrows_of(pl.refinement_arrows(adata, basis=basis))
        assert start.shape == end.shape == (N - 1, 2)
        assert np.isfinite(start).all()
    adata.obsm["X_scuvae_encoder"][:] = np.nan
    with pytest.raises(ValueError, match="0 cells have both means"):
        pl.refinement_arrows(adata)


def test_both_ends_of_every_arrow_lie_within_the_axes(adata: ad.AnnData) -> None:
    adata.obsm["X_scuvae_encoder"][0] += 100
    ax = pl.refinement_arrows(adata)
    ax.figure.canvas.draw()
    for ends in arrows_of(ax):
        for axis, (low, high) in enumerate((ax.get_xlim(), ax.get_ylim())):
            assert low <= ends[:, axis].min()
            assert ends[:, axis].max() <= high


def test_arrows_that_cannot_be_drawn(adata: ad.AnnData) -> None:
    adata.obsm["narrow"] = adata.obsm["X_scuvae"][:, :2]
    adata.obsm["alone"] = adata.obsm["X_scuvae"]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"key": "alone"}, ValueError, "no 'alone_encoder'.*refined_key="),
        ({"key": "gone"}, ValueError, "no 'gone_encoder'"),
        ({"refined_key": "refind"}, ValueError, "no 'refind'"),
        ({"refined_key": "narrow"}, ValueError, r"\(200, 4\).*\(200, 2\)"),
        ({"basis": "tsne"}, ValueError, "no embedding 'tsne'"),
        ({"groupby": "grup"}, ValueError, "Did you mean 'group'"),
        ({"max_arrows": 0}, ValueError, "max_arrows=0"),
        ({"max_arrows": 1.5}, TypeError, "max_arrows=1.5"),
    ]
    for options, kind, text in cases:
        with pytest.raises(kind, match=text):
            pl.refinement_arrows(adata, **options)


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [pl.embedding_scores, pl.refinement_arrows])
def test_axes_of_the_caller_and_what_is_returned(draw, adata: ad.AnnData) -> None:
    with unchanged(adata):
        assert isinstance(draw(adata, return_fig=True), Figure)
        assert draw(adata, show=True) is None
        n = 2 if draw is pl.embedding_scores else 1
        figure, axes = plt.subplots(1, n)
        out = draw(adata, ax=axes)
    assert list(np.ravel(out)) == list(np.ravel(axes))
    # Beside those given there are the colour bars alone.
    assert len(figure.axes) == (2 * n if draw is pl.embedding_scores else n)


@pytest.mark.parametrize("draw", [pl.embedding_scores, pl.refinement_arrows])
def test_a_picture_from_a_file_is_the_same(draw, adata: ad.AnnData, tmp_path) -> None:
    adata.write_h5ad(tmp_path / "a.h5ad")
    pictures = []
    for data in (adata, ad.read_h5ad(tmp_path / "a.h5ad")):
        figure = draw(data, return_fig=True)
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()))
    np.testing.assert_array_equal(*pictures)
