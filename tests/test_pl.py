"""The pictures against the numbers they are drawn from."""

import re
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
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy import sparse, stats

from scuvae import datasets, pl
from scuvae.pl import _predicted, _size


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
    dense = _predicted.dense
    monkeypatch.setattr(_predicted, "dense", lambda b: sizes.append(b.shape) or dense(b))
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
    with pytest.raises(ValueError, match="max_points=0: pass a whole number >= 1"):
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


@pytest.fixture
def scored() -> ad.AnnData:
    """Gaps and ELBOs of a fit to a layer, in cells of ten types with scanpy's colours."""
    adata = datasets.pbmc68k_counts()
    generator = np.random.default_rng(0)
    gap = generator.gamma(3.0, 2.0, adata.n_obs) + adata.obs["cell_type"].cat.codes.to_numpy() % 4
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["scuvae_amortization_gap"] = gap.astype(np.float32)
    adata.obs["scuvae_elbo"] = (-totals + generator.normal(size=adata.n_obs)).astype(np.float32)
    adata.uns["scuvae"] = fit(760.0, 665.0, amortized=True)
    return adata


def colour_of(adata: ad.AnnData, column: str) -> dict:
    names = adata.obs[column].cat.categories
    return {name: to_rgba(c) for name, c in zip(names, adata.uns[f"{column}_colors"], strict=True)}


def box_edges(ax: Axes) -> list[np.ndarray]:
    return [np.unique(patch.get_path().vertices[:4, 0]) for patch in ax.patches[:10]]


def test_boxes_are_those_of_the_data(scored: ad.AnnData) -> None:
    ax = pl.amortization_gap(scored, groupby="cell_type")
    groups = scored.obs.groupby("cell_type", observed=True)["scuvae_amortization_gap"]
    truth = groups.median().sort_values(kind="stable")
    sizes = scored.obs["cell_type"].value_counts()
    # From the bottom up, so that the largest is at the top.
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        f"{n} ({sizes[n]})" for n in truth.index
    ]
    np.testing.assert_array_equal(ax.get_yticks(), np.arange(1, 11))
    assert ax.get_ylim()[0] < 1 < 10 < ax.get_ylim()[1]

    medians = [line for line in ax.get_lines() if line.get_linewidth() == 1.4]
    np.testing.assert_allclose([line.get_xdata()[0] for line in medians], truth, rtol=1e-6)
    np.testing.assert_allclose([line.get_ydata().mean() for line in medians], np.arange(1, 11))
    colour = colour_of(scored, "cell_type")
    for patch, edges, name in zip(ax.patches, box_edges(ax), truth.index, strict=True):
        quartiles = np.percentile(groups.get_group(name), [25, 75])
        np.testing.assert_allclose(edges, quartiles, rtol=1e-6)
        assert patch.get_facecolor() == colour[name]

    (zero,) = lines(ax, "--")
    assert list(zero.get_xdata()) == [0, 0]
    assert ax.get_xlim()[0] < 0
    assert ax.get_xlabel() == "Amortization gap (nats per cell)"
    assert ax.get_ylabel() == "cell_type"


def test_cells_without_a_category_or_a_gap_are_left_out_and_counted(scored: ad.AnnData) -> None:
    scored.obs.iloc[:7, scored.obs.columns.get_loc("cell_type")] = np.nan
    scored.obs.iloc[5:9, scored.obs.columns.get_loc("scuvae_amortization_gap")] = np.nan
    ax = pl.amortization_gap(scored, groupby="cell_type")
    assert ax.get_xlabel().split("\n")[1:] == [
        "(7 of 700 cells have no cell_type, not drawn)",
        "(2 of 700 cells have no gap, not drawn)",
    ]
    drawn = [int(re.findall(r"\((\d+)\)$", t.get_text())[0]) for t in ax.get_yticklabels()]
    assert sum(drawn) == 691
    scored.obs["scuvae_amortization_gap"] = np.float32(np.nan)
    with pytest.raises(ValueError, match=r"No cell has both .*obs\['cell_type'\]"):
        pl.amortization_gap(scored, groupby="cell_type")


def test_cells_far_out_do_not_flatten_the_boxes(scored: ad.AnnData) -> None:
    column = scored.obs.columns.get_loc("scuvae_amortization_gap")
    scored.obs.iloc[:2, column] = [2_000.0, -700.0]
    ax = pl.amortization_gap(scored, groupby="cell_type")
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "symlog"
    assert ax.get_xlabel().endswith("\n(shaded: logarithmic)")
    low, high = ax.get_xlim()
    assert low < -700 < 2_000 < high
    ticks = ax.get_xticks()
    assert ((ticks > 50) & (ticks < high)).sum() >= 2
    assert ((ticks < -50) & (ticks > low)).any()
    assert "0" in [t.get_text() for t in ax.get_xticklabels()]
    # The middle halves still have room.
    to_axes = ax.transData + ax.transAxes.inverted()
    widths = [np.ptp([to_axes.transform((x, 1))[0] for x in edges]) for edges in box_edges(ax)]
    assert max(widths) > 0.08


def test_labels_and_axes_lie_within_the_figure(scored: ad.AnnData) -> None:
    scored.obs.iloc[0, scored.obs.columns.get_loc("cell_type")] = np.nan
    scored.obs.iloc[1, scored.obs.columns.get_loc("scuvae_amortization_gap")] = 500.0
    for figure in (
        pl.amortization_gap(scored, groupby="cell_type", return_fig=True),
        pl.elbo_by_size(scored, groupby="cell_type", return_fig=True),
    ):
        figure.canvas.draw()
        (ax,) = figure.axes
        names = ax.get_yticklabels() if ax.get_legend() is None else [ax.get_legend()]
        boxes = [ax.xaxis.label, ax.yaxis.label, *names]
        for box in [b.get_window_extent() for b in boxes]:
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("stored", [None, ["red", "blue"], ["no colour"] * 10])
def test_colours_that_do_not_fit_are_replaced(stored: list | None, scored: ad.AnnData) -> None:
    del scored.uns["cell_type_colors"]
    if stored is not None:
        scored.uns["cell_type_colors"] = np.array(stored, dtype=object)
    ax = pl.amortization_gap(scored, groupby="cell_type")
    assert len({patch.get_facecolor() for patch in ax.patches}) == 10


def test_colours_go_with_their_categories_even_where_these_have_no_cells(
    scored: ad.AnnData,
) -> None:
    colour = colour_of(scored, "cell_type")
    kept = scored.obs["cell_type"].isin(["Dendritic", "CD19+ B"]).to_numpy()
    scored.obs.loc[~kept, "cell_type"] = np.nan
    ax = pl.amortization_gap(scored, groupby="cell_type")
    found = {
        t.get_text().rsplit(" ", 1)[0]: p
        for t, p in zip(ax.get_yticklabels(), ax.patches, strict=True)
    }
    assert set(found) == {"Dendritic", "CD19+ B"}
    assert all(patch.get_facecolor() == colour[name] for name, patch in found.items())
    assert legend(pl.elbo_by_size(scored, groupby="cell_type")) == ["CD19+ B", "Dendritic", "NA"]


@pytest.mark.parametrize("kind", ["str", "bool", "int", "float"])
def test_columns_that_resemble_categories(kind: str, scored: ad.AnnData) -> None:
    scored.obs["group"] = (np.arange(700) % 2).astype(kind)
    ax = pl.amortization_gap(scored, groupby="group")
    assert len(ax.patches) == 2
    assert len(legend(pl.elbo_by_size(scored, groupby="group"))) == 2


@pytest.mark.parametrize("draw", [pl.amortization_gap, pl.elbo_by_size])
def test_wrong_groups(draw, scored: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"obs has no 'celltype'\. Did you mean 'cell_type'\?"):
        draw(scored, groupby="celltype")
    with pytest.raises(
        ValueError, match=r"'percent_mito'\] holds \d+ different values \(float.*'cell_type'"
    ):
        draw(scored, groupby="percent_mito")
    scored.obs["barcode"] = scored.obs_names
    with pytest.raises(ValueError, match=r"'barcode'\] holds 700 different values"):
        draw(scored, groupby="barcode")
    scored.obs["none"] = np.nan
    with pytest.raises(ValueError, match=r"'none'\] has no value in any of the 700 cells"):
        draw(scored, groupby="none")
    with pytest.raises(TypeError, match="is a list: pass the name of one column"):
        draw(scored, groupby=["cell_type"])
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("draw", "name", "verb"),
    [
        (pl.amortization_gap, "amortization_gap", "amortization_gap"),
        (pl.elbo_by_size, "elbo", "score"),
    ],
)
def test_a_missing_score_names_the_call_that_writes_it(
    draw, name: str, verb: str, scored: ad.AnnData
) -> None:
    with pytest.raises(ValueError, match=rf"no 'scuva_{name}'.* Did you mean 'scuvae'\?"):
        draw(scored, groupby="cell_type", key="scuva")
    scored.uns["k"] = fit(3.0, 2.0, amortized="semi")
    with pytest.raises(
        ValueError, match=rf"no 'k_{name}'\. Call scuvae\.tl\.{verb}\(adata, key='k'\) first"
    ):
        draw(scored, groupby="cell_type", key="k")
    with pytest.raises(ValueError, match=r"Call scuvae\.external\.scvi\.refine\(model\) first"):
        draw(without(scored, name), groupby="cell_type", key="scvi")
    scored = without(scored, name)
    with pytest.raises(ValueError, match=rf"Call scuvae\.tl\.{verb}\(adata\) first"):
        draw(scored, groupby="cell_type")
    scored.obs[f"scuvae_{name}"] = "high"
    with pytest.raises(ValueError, match="not numbers"):
        draw(scored, groupby="cell_type")
    assert not plt.get_fignums()


def without(adata: ad.AnnData, name: str) -> ad.AnnData:
    out = adata.copy()
    del out.obs[f"scuvae_{name}"]
    return out


def test_a_fit_without_an_encoder_has_no_gap(scored: ad.AnnData) -> None:
    scored.uns["k"] = fit(3.0, 2.0, amortized=np.False_)
    with pytest.raises(ValueError, match=r"uns\['k'\] is a fit with amortized=False"):
        pl.amortization_gap(scored, groupby="cell_type", key="k")


def by_cell(ax: Axes) -> np.ndarray:
    """The points, sorted by their x and y, for they are drawn in a random order."""
    points = np.asarray(ax.collections[0].get_offsets())
    return points[np.lexsort(points.T)]


def sorted_pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pairs = np.column_stack([x, y]).astype(float)
    return pairs[np.lexsort(pairs.T)]


def test_every_cell_is_a_point_of_its_colour(scored: ad.AnnData) -> None:
    ax = pl.elbo_by_size(scored, groupby="cell_type")
    totals = np.asarray(scored.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(by_cell(ax), sorted_pairs(totals, scored.obs["scuvae_elbo"]))
    (cloud,) = ax.collections
    assert cloud.get_rasterized()
    # No two cells share an ELBO, so a point's tells whose colour it should be.
    colour = colour_of(scored, "cell_type")
    type_of = dict(
        zip(scored.obs["scuvae_elbo"].astype(float), scored.obs["cell_type"], strict=True)
    )
    assert len(type_of) == 700
    for (_, y), found in zip(cloud.get_offsets(), cloud.get_facecolors(), strict=True):
        assert tuple(found[:3]) == colour[type_of[float(y)]][:3]
    assert legend(ax) == list(scored.obs["cell_type"].cat.categories)
    assert ax.get_legend().get_title().get_text() == "cell_type"
    for handle, name in zip(ax.get_legend().legend_handles, legend(ax), strict=True):
        assert to_rgba(handle.get_color()) == colour[name]
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "Total counts of 765 genes"
    assert ax.get_ylabel() == "ELBO (nats per cell)"


def test_without_groups_there_is_no_legend(scored: ad.AnnData) -> None:
    ax = pl.elbo_by_size(scored)
    assert ax.get_legend() is None
    assert len(ax.collections[0].get_offsets()) == 700


def test_sizes_are_of_the_fitted_genes_and_layer(
    scored: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    genes = scored.var_names[::3]
    truth = np.asarray(scored[:, genes].X.sum(axis=1)).ravel()
    scored.layers["counts"] = scored.X.copy()
    scored.X = np.log1p(scored.X)
    scored.uns["scuvae"]["params"]["layer"] = "counts"
    scored.uns["scuvae"]["var_names"] = np.array(genes, dtype=object)
    monkeypatch.setattr(_size, "BLOCK", 100_000)
    ax = pl.elbo_by_size(scored)
    np.testing.assert_array_equal(
        by_cell(ax)[:, 0], sorted_pairs(truth, scored.obs["scuvae_elbo"])[:, 0]
    )
    assert ax.get_xlabel() == "Total counts of 255 genes"

    # Not a fit of ours: X, or the layer that is named.
    scored.obs["scvi_elbo"] = scored.obs["scuvae_elbo"]
    scored.uns["scvi"] = {"params": {}}
    assert pl.elbo_by_size(scored, key="scvi").get_xlabel() == "Sum of values over 765 genes"
    ax = pl.elbo_by_size(scored, key="scvi", layer="counts")
    assert ax.get_xlabel() == "Total counts of 765 genes"
    with pytest.raises(ValueError, match=r"layers has no 'count'\. Did you mean 'counts'\?"):
        pl.elbo_by_size(scored, layer="count")


@pytest.mark.parametrize(
    "container", [sparse.csr_array, sparse.csc_matrix, np.asfortranarray, "backed"]
)
def test_sizes_in_any_container(container, scored: ad.AnnData, tmp_path) -> None:
    expected = by_cell(pl.elbo_by_size(scored))
    if container == "backed":
        scored.write_h5ad(tmp_path / "a.h5ad")
        scored = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    else:
        scored.X = container(scored.X.toarray() if container is np.asfortranarray else scored.X)
    scored.uns["scuvae"]["var_names"] = np.array(scored.var_names, dtype=object)
    np.testing.assert_array_equal(by_cell(pl.elbo_by_size(scored)), expected)
    if container == "backed":
        scored.file.close()


def test_the_size_axis_suits_the_sizes(scored: ad.AnnData) -> None:
    for factor in (1, 1000):
        scored.layers["counts"] = scored.X * factor
        ax = pl.elbo_by_size(scored, layer="counts")
        ax.figure.canvas.draw()
        low, high = ax.get_xlim()
        assert 2 <= sum(low <= t <= high for t in ax.get_xticks()) <= 8
    scored.X = sparse.diags_array(np.arange(700) > 0, dtype=np.float32) @ scored.X
    ax = pl.elbo_by_size(scored)
    assert ax.get_xscale() == "symlog"
    assert by_cell(ax)[:, 0].min() == 0
    scored.layers["values"] = scored.X.toarray() - 5.5
    assert pl.elbo_by_size(scored, layer="values").get_xscale() == "linear"
    scored.obs.iloc[:3, scored.obs.columns.get_loc("scuvae_elbo")] = np.nan
    ax = pl.elbo_by_size(scored)
    assert "(3 of 700 cells have no score or total, not drawn)" in ax.get_xlabel()
    assert len(ax.collections[0].get_offsets()) == 697


@pytest.mark.parametrize("draw", [pl.amortization_gap, pl.elbo_by_size])
def test_pictures_of_cells_change_nothing(draw, scored: ad.AnnData) -> None:
    before, state = scored.copy(), np.random.get_state()[1].copy()  # noqa: NPY002
    del scored.uns["cell_type_colors"]
    _, ax = plt.subplots()
    assert draw(scored, groupby="cell_type", ax=ax) is ax
    assert isinstance(draw(scored, groupby="cell_type", return_fig=True), Figure)
    assert len(plt.get_fignums()) == 2
    pd.testing.assert_frame_equal(scored.obs, before.obs)
    assert set(before.uns) - set(scored.uns) == {"cell_type_colors"}
    assert (scored.X != before.X).nnz == 0
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_pl_does_not_import_torch_or_scanpy() -> None:
    code = "import sys, scuvae.pl; assert not {'torch', 'scanpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- calibration and predictive checks ------------------------------------------------------------


def calibrated(n_cells: int = 400, n_latent: int = 3) -> ad.AnnData:
    """A calibration whose full posteriors are exact and whose diagonal ones are .7 as wide."""
    adata = datasets.linear_factor(5, 4)
    levels = np.array([0.5, 0.8, 0.95])
    z = np.random.default_rng(0).normal(size=(n_cells, n_latent))
    pit = {"full": stats.norm.cdf(z), "diagonal": stats.norm.cdf(z / 0.7)}
    columns = {}
    for name, u in pit.items():
        inside = np.abs(2 * u - 1)[None] <= levels[:, None, None]
        columns[name] = inside.mean((1, 2))
        columns[f"{name}_se"] = inside.mean(2).std(1) / n_cells**0.5
    adata.uns["scuvae_calibration"] = {
        "coverage": pd.DataFrame(columns, index=pd.Index(levels, name="level")),
        "pit": {name: u.astype(np.float32) for name, u in pit.items()},
        "scale_ratio": np.full((n_cells, n_latent), 0.7, np.float32),
    }
    return adata


def test_calibration_draws_coverage() -> None:
    adata = calibrated()
    table = adata.uns["scuvae_calibration"]["coverage"]
    left, right = pl.calibration(adata)
    assert legend(right) == ["exact, 95 %", "full", "diagonal", "diagonal, predicted"]
    diagonal, full, points, *_ = left.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]
    np.testing.assert_allclose(points.get_xdata(), 100 * table.index)
    np.testing.assert_allclose(points.get_ydata(), 100 * table["full"])
    at = {round(x): y for x, y in zip(full.get_xdata(), full.get_ydata(), strict=True)}
    for level, share in table["full"].items():
        assert at[round(100 * level)] == pytest.approx(100 * share, abs=0.1)  # float32
    (predicted,) = [line for line in left.get_lines() if line.is_dashed()]
    z = stats.norm.ppf(0.5 + predicted.get_xdata() / 200)
    np.testing.assert_allclose(
        predicted.get_ydata(), 100 * (2 * stats.norm.cdf(0.7 * z) - 1), rtol=1e-5
    )
    # The band at 50 %: 1.96 standard errors of a share of 1,200.
    band = right.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(196 * (0.25 / 1200) ** 0.5, rel=1e-3)
    shown = next(line for line in right.get_lines() if line.get_label() == "full")
    np.testing.assert_allclose(shown.get_ydata(), full.get_ydata() - full.get_xdata())


def checked(counts: bool = True, n: int = 50) -> ad.AnnData:
    adata = datasets.linear_factor(5, 4)
    rng = np.random.default_rng(0)
    mean = rng.lognormal(size=n) if counts else rng.normal(size=n)
    columns = {"mean": mean, "mean_predicted": 1.1 * mean, "mean_predicted_scale": 0.03 + 0 * mean}
    columns |= {"variance": mean**2 + 0.1, "variance_predicted": mean**2 + 0.2}
    if counts:
        zero = np.linspace(0, 1, n)  # with genes that are always and never seen
        columns |= {"zero_fraction": zero, "zero_fraction_predicted": zero.clip(0.001, 0.999)}
        columns["zero_fraction_predicted_scale"] = np.full(n, 0.01)
    adata.uns["scuvae_predictive_check"] = pd.DataFrame(columns)
    return adata


def test_predictive_check_draws_every_gene() -> None:
    adata = checked()
    table = adata.uns["scuvae_predictive_check"]
    axes = pl.predictive_check(adata)
    assert [ax.get_xscale() for ax in axes] == ["logit", "log", "log"]
    assert [ax.get_yscale() for ax in axes] == ["logit", "log", "log"]
    far = (table["mean_predicted"] - table["mean"]).abs() > 1.96 * 0.03
    assert 0 < far.sum() < len(far)
    assert axes[1].get_title() == f"Mean\n{far.sum()} of 50 genes outside 95 %"
    assert axes[0].get_title() == "Zero fraction\n0 of 50 genes outside 95 %"
    assert axes[2].get_title() == "Variance"
    near, outside = (c.get_offsets() for c in axes[1].collections)
    np.testing.assert_allclose(near, table.loc[~far, ["mean_predicted", "mean"]])
    np.testing.assert_allclose(outside, table.loc[far, ["mean_predicted", "mean"]])
    for ax in axes:
        assert ax.get_xlim() == ax.get_ylim()
        drawn = np.concatenate([c.get_offsets() for c in ax.collections])
        assert len(drawn) == 50
        low, high = ax.get_xlim()
        assert ((drawn >= low) & (drawn <= high)).all()
    assert axes[0].collections[0].get_offsets()[0, 1] == axes[0].get_xlim()[0]


def test_predictive_check_of_values_that_are_no_counts() -> None:
    mean, variance = pl.predictive_check(checked(counts=False))
    assert mean.get_xscale() == "linear"
    assert variance.get_xscale() == "log"


@pytest.mark.parametrize(
    ("draw", "make", "n"), [(pl.calibration, calibrated, 2), (pl.predictive_check, checked, 3)]
)
def test_pictures_of_checks(draw, make, n: int) -> None:
    adata = make()
    slot = next(name for name in adata.uns if name.startswith("scuvae_"))
    _, axes = plt.subplots(1, n)
    assert draw(adata, ax=axes) == list(axes)
    assert isinstance(draw(adata, return_fig=True), Figure)
    with pytest.raises(ValueError, match=f"ax has 1 axes for {n} panels"):
        draw(adata, ax=axes[:1])
    with pytest.raises(ValueError, match=r"no 'scuva_.*tl\.\w+\(adata, key='scuva'\).*'scuvae'\?"):
        draw(adata, key="scuva")
    del adata.uns[slot]
    with pytest.raises(ValueError, match=rf"no '{slot}'\. Call scuvae\.tl\.\w+\(adata\) first"):
        draw(adata)
