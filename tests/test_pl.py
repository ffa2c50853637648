"""The pictures against the numbers they are drawn from."""

import subprocess
import sys
from collections.abc import Iterator

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import sparse

from scuvae import datasets, pl
from scuvae.pl import _predicted


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    before = mpl.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def history(start: float, end: float, *, epochs: int = 40, validation: bool = True) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    loss = end + (start - end) * np.exp(-epoch / 10)
    held_out = np.where(epoch % 5 == 0, -(loss + 3), np.nan) if validation else np.nan
    columns = {"loss": loss, "elbo": -loss, "reconstruction": 2 - loss, "kl": 2.0}
    return pd.DataFrame(
        {**columns, "validation_elbo": held_out}, index=pd.Index(epoch, name="epoch")
    )


def fit(*arguments: float, validation: bool = True, **params: object) -> dict:
    return {"params": params, "history": history(*arguments, validation=validation)}


@pytest.fixture
def simulated() -> ad.AnnData:
    """Two fits whose predictions are the best ones of rank two and three."""
    adata = datasets.linear_factor()
    u, s, v = np.linalg.svd(adata.X, full_matrices=False)
    for key, rank in (("amortized", 2), ("scuvae", 3)):
        adata.uns[key] = fit(900.0, 120.0 + rank, layer="")
        adata.layers[f"{key}_denoised"] = (u[:, :rank] * s[:rank]) @ v[:rank]
    # Neither is a fit.
    adata.uns["pca"] = {"params": {}}
    adata.uns["note"] = "history"
    return adata


@pytest.fixture
def counts() -> ad.AnnData:
    adata = datasets.pbmc68k_counts()
    share = np.asarray(adata.X.sum(axis=0)).ravel() / adata.X.sum()
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.uns["scuvae"] = fit(760.0, 665.0)
    adata.layers["scuvae_denoised"] = np.outer(totals, share).astype(np.float32)
    return adata


def lines(ax: Axes, style: str) -> list:
    return [line for line in ax.get_lines() if line.get_linestyle() == style]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_loss_draws_the_history(simulated: ad.AnnData) -> None:
    ax = pl.loss(simulated)
    assert isinstance(ax, Axes)
    assert legend(ax) == ["scuvae", "amortized", "−ELBO, held-out cells"]
    for key, solid, dashed in zip(
        ["scuvae", "amortized"], lines(ax, "-"), lines(ax, "--"), strict=True
    ):
        table = simulated.uns[key]["history"]
        np.testing.assert_array_equal(solid.get_xdata(), table.index)
        np.testing.assert_array_equal(solid.get_ydata(), table["loss"])
        measured = table["validation_elbo"].dropna()
        np.testing.assert_array_equal(dashed.get_xdata(), measured.index)
        np.testing.assert_array_equal(dashed.get_ydata(), -measured)
        assert solid.get_color() == dashed.get_color()
    assert ax.get_xlabel() == "Epoch"
    assert ax.get_ylabel() == "Loss (nats per cell)"


def test_loss_axis_is_logarithmic_where_it_can_be(simulated: ad.AnnData) -> None:
    assert pl.loss(simulated).get_yscale() == "log"
    simulated.uns["amortized"]["history"].iloc[-1, 0] = np.nan
    assert pl.loss(simulated).get_yscale() == "log"
    simulated.uns["scuvae"] = fit(50.0, -20.0)
    assert pl.loss(simulated).get_yscale() == "linear"
    assert pl.loss(simulated, keys="amortized").get_yscale() == "log"


@pytest.mark.parametrize(("start", "end"), [(760.0, 665.0), (120.4, 120.1), (900.0, 120.0)])
def test_loss_axis_has_readable_ticks_within_a_decade(start: float, end: float) -> None:
    adata = datasets.linear_factor(5, 4)
    adata.uns["scuvae"] = fit(start, end)
    ax = pl.loss(adata)
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    ticks = [t for t in ax.get_yticks() if low <= t <= high]
    assert 2 <= len(ticks) <= 8
    labels = [t.get_text() for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert len(set(labels)) == len(labels)
    assert not any("10^" in label for label in labels)


def test_loss_without_validation_and_with_one_epoch() -> None:
    adata = datasets.linear_factor(5, 4)
    adata.uns["k"] = fit(10.0, 5.0, validation=False)
    ax = pl.loss(adata, keys="k")
    assert legend(ax) == ["k"]
    assert not lines(ax, "--")
    adata.uns["k"]["history"] = adata.uns["k"]["history"].iloc[:1]
    # A line of one point would be invisible.
    assert pl.loss(adata).get_lines()[0].get_marker() == "o"


def test_loss_of_many_fits_keeps_the_legend_off_the_lines() -> None:
    adata = datasets.linear_factor(5, 4)
    for i in range(12):
        adata.uns[f"k{i}"] = fit(10.0 + i, 5.0)
    ax = pl.loss(adata)
    colours = {line.get_color() for line in lines(ax, "-")}
    assert len(colours) == 12
    ax.figure.canvas.draw()
    box, room = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert box.x0 >= ax.get_window_extent().x1
    assert box.x1 <= room.x1
    assert box.y0 >= room.y0


@pytest.mark.parametrize("draw", [pl.loss, pl.observed_vs_predicted])
def test_wrong_keys(draw, simulated: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"no fit 'amortised'\. Did you mean 'amortized'\?"):
        draw(simulated, keys=["scuvae", "amortised"])
    with pytest.raises(ValueError, match="no fit 'pca'"):
        draw(simulated, keys="pca")
    with pytest.raises(ValueError, match=r"Call scuvae\.tl\.fit\(adata\) first"):
        draw(datasets.linear_factor(5, 4))
    assert not plt.get_fignums(), "a failed call leaves no figure"


def test_history_that_is_no_table(simulated: ad.AnnData) -> None:
    simulated.uns["scuvae"]["history"] = [3.0, 2.0]
    with pytest.raises(ValueError, match=r"uns\['scuvae'\]\['history'\]"):
        pl.loss(simulated)


@pytest.mark.parametrize("draw", [pl.loss, pl.observed_vs_predicted])
def test_show_and_return(draw, simulated: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))

    # No display: the axes come back.
    assert draw(simulated, keys="scuvae") is not None
    assert isinstance(draw(simulated, keys="scuvae", return_fig=True), Figure)
    assert not shown
    assert draw(simulated, keys="scuvae", show=True) is None
    assert len(shown) == 1
    assert isinstance(draw(simulated, keys="scuvae", show=True, return_fig=True), Figure)
    assert len(shown) == 2

    # An interactive session or a notebook: as scanpy does, unless the caller will use the result.
    monkeypatch.setattr(plt, "isinteractive", lambda: True)
    assert draw(simulated, keys="scuvae") is None
    assert len(shown) == 3
    _, ax = plt.subplots()
    drawn = draw(simulated, keys="scuvae", ax=ax)
    assert drawn is ax or drawn == [ax]
    assert draw(simulated, keys="scuvae", show=False) is not None
    assert draw(simulated, keys="scuvae", return_fig=True) is not None
    assert len(shown) == 3


def test_a_subfigure_s_axes_return_the_whole_figure(simulated: ad.AnnData) -> None:
    figure = plt.figure()
    ax = figure.subfigures(1, 2)[1].subplots()
    assert pl.loss(simulated, ax=ax, return_fig=True) is figure


def test_predictions_are_drawn_point_by_point(simulated: ad.AnnData) -> None:
    axes = pl.observed_vs_predicted(simulated, oracle="oracle")
    layers = ["oracle", "scuvae_denoised", "amortized_denoised"]
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["Oracle", "scuvae", "amortized"]
    for ax, layer in zip(axes, layers, strict=True):
        x, y = ax.collections[0].get_offsets().T
        np.testing.assert_allclose(x, simulated.layers[layer].ravel(), rtol=1e-6)
        np.testing.assert_allclose(y, simulated.X.ravel(), rtol=1e-6)
        r = np.corrcoef(x, y)[0, 1]
        assert ax.get_title().split("\n")[1] == f"r = {r:.3f}"
    assert axes[0].get_ylabel() == "Observed value"


def test_the_correlation_is_of_all_entries_however_few_are_drawn(
    simulated: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pl.observed_vs_predicted(simulated)
    monkeypatch.setattr(_predicted, "BLOCK", 3 * simulated.n_vars)
    thinned = pl.observed_vs_predicted(simulated, max_points=5000)
    again = pl.observed_vs_predicted(simulated, max_points=5000)
    for one, two, three in zip(whole, thinned, again, strict=True):
        assert one.get_title() == two.get_title()
        points = two.collections[0].get_offsets()
        assert 4000 < len(points) <= 5000
        np.testing.assert_array_equal(points, three.collections[0].get_offsets())


@pytest.mark.parametrize("max_points", [1, 2, 699, 12_345])
def test_no_more_points_than_asked(simulated: ad.AnnData, max_points: int) -> None:
    (ax,) = pl.observed_vs_predicted(simulated, keys="scuvae", max_points=max_points)
    assert 1 <= len(ax.collections[0].get_offsets()) <= max_points


def test_counts_are_drawn_as_a_density(counts: ad.AnnData) -> None:
    (ax,) = pl.observed_vs_predicted(counts, max_points=10**6)
    density = ax.collections[0].get_array()
    assert density.sum() == counts.n_obs * counts.n_vars
    # The first row is the zeros.
    assert density[0].sum() == counts.n_obs * counts.n_vars - counts.X.nnz
    r = np.corrcoef(
        np.log1p(counts.X.toarray()).ravel(), np.log1p(counts.layers["scuvae_denoised"]).ravel()
    )[0, 1]
    assert ax.get_title() == f"scuvae\nr = {r:.3f} (log1p)"
    assert ax.get_ylabel() == "Observed count"


@pytest.mark.parametrize(
    "container", [sparse.csr_array, sparse.csc_matrix, np.asfortranarray, np.asarray]
)
def test_any_container_gives_the_same_picture(container, counts: ad.AnnData) -> None:
    (one,) = pl.observed_vs_predicted(counts)
    dense = container in (np.asfortranarray, np.asarray)
    counts.X = container(counts.X.toarray() if dense else counts.X)
    (two,) = pl.observed_vs_predicted(counts)
    assert one.get_title() == two.get_title()
    np.testing.assert_array_equal(one.collections[0].get_array(), two.collections[0].get_array())


def test_backed_data(counts: ad.AnnData, tmp_path) -> None:
    (one,) = pl.observed_vs_predicted(counts)
    counts.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    (two,) = pl.observed_vs_predicted(backed)
    assert one.get_title() == two.get_title()
    assert pl.loss(backed).get_yscale() == "log"
    backed.file.close()


def test_no_matrix_is_made_dense_whole(counts: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    dense = _predicted._dense
    monkeypatch.setattr(_predicted, "_dense", lambda b: sizes.append(b.shape) or dense(b))
    monkeypatch.setattr(_predicted, "BLOCK", 10_000)
    pl.observed_vs_predicted(counts, max_points=8_000)
    assert max(rows * columns for rows, columns in sizes) <= 10_000


def test_the_observed_layer_is_the_one_fitted_to(counts: ad.AnnData) -> None:
    (one,) = pl.observed_vs_predicted(counts)
    counts.layers["counts"] = counts.X
    counts.X = None
    with pytest.raises(ValueError, match=r"adata\.X is None: pass layer="):
        pl.observed_vs_predicted(counts)
    (two,) = pl.observed_vs_predicted(counts, layer="counts")
    counts.uns["scuvae"]["params"]["layer"] = "counts"
    (three,) = pl.observed_vs_predicted(counts)
    assert one.get_title() == two.get_title() == three.get_title()


def test_only_modelled_genes_and_finite_values_count(simulated: ad.AnnData) -> None:
    genes = simulated.var_names[::2]
    (one,) = pl.observed_vs_predicted(simulated[:, genes].copy(), keys="scuvae")
    simulated.uns["scuvae"]["var_names"] = np.array(genes, dtype=object)
    (two,) = pl.observed_vs_predicted(simulated, keys="scuvae")
    del simulated.uns["scuvae"]["var_names"]
    simulated.layers["scuvae_denoised"][:, 1::2] = np.nan
    (three,) = pl.observed_vs_predicted(simulated, keys="scuvae")
    assert one.get_title() == two.get_title() == three.get_title()

    simulated.uns["scuvae"]["var_names"] = np.array(["elsewhere"], dtype=object)
    with pytest.raises(ValueError, match="none of the genes of the fit 'scuvae'"):
        pl.observed_vs_predicted(simulated, keys="scuvae")


def test_a_constant_prediction_has_no_correlation(simulated: ad.AnnData) -> None:
    simulated.layers["scuvae_denoised"][:] = 0.0
    (ax,) = pl.observed_vs_predicted(simulated, keys="scuvae")
    assert ax.get_title() == "scuvae\nr undefined"


def test_missing_layers_name_the_remedy(simulated: ad.AnnData) -> None:
    del simulated.layers["amortized_denoised"]
    with pytest.raises(
        ValueError,
        match=r"scuvae\.tl\.denoise\(adata, key='amortized', layer_added='amortized_denoised'\)",
    ):
        pl.observed_vs_predicted(simulated)
    del simulated.layers["scuvae_denoised"]
    with pytest.raises(
        ValueError, match=r"scuvae\.tl\.denoise\(adata, layer_added='scuvae_denoised'\)"
    ):
        pl.observed_vs_predicted(simulated)
    with pytest.raises(ValueError, match=r"Did you mean 'oracle'\?"):
        pl.observed_vs_predicted(simulated, keys=[], oracle="orcale")
    with pytest.raises(ValueError, match="Nothing to draw"):
        pl.observed_vs_predicted(simulated, keys=[])
    assert not plt.get_fignums()


def test_axes_of_the_caller(simulated: ad.AnnData) -> None:
    _, grid = plt.subplots(1, 2)
    assert pl.observed_vs_predicted(simulated, ax=grid) == list(grid)
    with pytest.raises(ValueError, match="ax has 1 axes for 2 panels"):
        pl.observed_vs_predicted(simulated, ax=grid[0])
    with pytest.raises(ValueError, match="max_points must be at least 1"):
        pl.observed_vs_predicted(simulated, max_points=0)


def test_pictures_change_neither_adata_nor_global_random_states(simulated: ad.AnnData) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    copy = simulated.copy()
    pl.loss(simulated)
    pl.observed_vs_predicted(simulated, oracle="oracle", max_points=100)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(copy.X, simulated.X)
    assert list(copy.uns) == list(simulated.uns)
    assert list(copy.layers) == list(simulated.layers)
    assert copy.uns["scuvae"]["history"].equals(simulated.uns["scuvae"]["history"])


def test_fits_survive_h5ad_and_are_drawn_the_same(simulated: ad.AnnData, tmp_path) -> None:
    simulated.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert legend(pl.loss(again)) == legend(pl.loss(simulated))


def test_pl_does_not_import_torch_or_scanpy() -> None:
    code = "import sys, scuvae.pl; assert not {'torch', 'scanpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
