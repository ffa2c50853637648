"""Pictures can be read: labels do not touch, colours differ, the end of a loss is seen, files."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text

from scuvae import datasets, pl
from scuvae.pl._common import colours


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    before = mpl.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture
def adata() -> ad.AnnData:
    """A fit's slots, as far as pictures read them."""
    cells = datasets.pbmc68k_counts()
    rng = np.random.default_rng(0)
    epoch = np.arange(100)
    loss = 640 + 20 * np.exp(-epoch / 20) + 400 * np.exp(-epoch / 2)
    held_out = np.where(epoch % 3 == 0, -loss - 5 - epoch / 100, np.nan)
    history = pd.DataFrame({"loss": loss, "elbo": -loss, "validation_elbo": held_out})
    cells.uns["scuvae"] = {"params": {}, "history": history}
    cells.obsm["X_scuvae"] = rng.normal(size=(cells.n_obs, 4))
    cells.obsm["X_scuvae_encoder"] = cells.obsm["X_scuvae"] + 0.3
    cells.obsm["X_scuvae_scale"] = np.full((cells.n_obs, 4), 0.3)
    cells.obsm["X_scuvae_embed"] = rng.normal(size=(cells.n_obs, 15))
    cells.obs["scuvae_elbo"] = -np.linspace(300, 900, cells.n_obs)
    cells.obs["scuvae_amortization_gap"] = rng.gamma(2, 1, cells.n_obs)
    return cells


def with_groups(adata: ad.AnnData, n: int) -> ad.AnnData:
    codes = np.arange(adata.n_obs) % n
    adata.obs["group"] = pd.Categorical([f"a type of a long name {code}" for code in codes])
    return adata


def boxes(ax: Axes) -> list:
    ax.figure.canvas.draw()
    return [t.get_window_extent() for t in ax.get_legend().get_texts()]


def touch(a, b) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 - 0.5 and b.y0 < a.y1 - 0.5


@pytest.mark.parametrize("n", [3, 20, 40])
@pytest.mark.parametrize("draw", [pl.elbo_by_size, pl.refinement_arrows])
def test_legends_leave_room_and_do_not_overlap(draw, n: int, adata: ad.AnnData) -> None:
    ax = draw(with_groups(adata, n), groupby="group")
    found = boxes(ax)
    assert len(found) == n
    assert not any(touch(a, b) for a, b in combinations(found, 2))
    room, own = ax.figure.bbox, ax.get_window_extent()
    assert all(box.x0 > own.x1 and box.x1 <= room.x1 + 1 for box in found)
    assert own.width > 2.5 * ax.figure.dpi  # the legend has not eaten the picture


@pytest.mark.parametrize("n", [3, 40])
def test_names_of_boxes_do_not_overlap(n: int, adata: ad.AnnData) -> None:
    ax = pl.amortization_gap(with_groups(adata, n), groupby="group")
    ax.figure.canvas.draw()
    labels = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(labels) == n
    assert not any(touch(a, b) for a, b in combinations(labels, 2))


def test_long_names_leave_room_for_what_is_drawn(adata: ad.AnnData) -> None:
    """Without their middle where they differ outside of it, as they are where they do not."""
    ends = [
        f"{n} of the very same long name that nobody would ever want to read {n}" for n in "abc"
    ]
    middles = [f"{'x' * 40} {n} {'y' * 40}" for n in "abc"]
    for names, cut in ((ends, True), (middles, False)):
        adata.obs["group"] = pd.Categorical(np.resize(names, adata.n_obs))
        ax = pl.amortization_gap(adata, groupby="group")
        ax.figure.canvas.draw()
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert len(set(labels)) == 3
        assert all(("…" in label) == cut for label in labels)
        if cut:
            assert ax.get_window_extent().width > 2.5 * ax.figure.dpi
        texts = pl.elbo_by_size(adata, groupby="group").get_legend().get_texts()
        assert len({text.get_text() for text in texts}) == 3
        assert all(len(text.get_text()) <= 36 for text in texts) == cut


def ranked(n: int) -> ad.AnnData:
    """What tl.rank_genes writes, of n sure genes that go up."""
    found = {"names": [f"GENE{i}" for i in range(n)], "scores": np.arange(n, 0, -1.0)}
    found |= {"logfoldchanges": np.linspace(1, 5, n), "prob_de": np.full(n, 1 - 1e-6)}
    found |= {"expected_fdr": np.full(n, 1e-6)}
    slot = {name: pd.DataFrame({"a": v}).to_records(index=False) for name, v in found.items()}
    return ad.AnnData(uns={"rank_genes_groups": {**slot, "params": {"reference": "rest"}}})


@pytest.mark.parametrize("own", [True, False])
def test_names_of_many_genes_stay_within_the_axes(own: bool) -> None:
    ax = None if own else plt.subplots()[1]
    ax = pl.volcano(ranked(40), n_genes=40, ax=ax, show=False)
    ax.figure.canvas.draw()
    names = [text for text in ax.texts if text.get_text()]
    assert len(names) == 40 if own else 10 < len(names) < 20
    inside = ax.get_window_extent()
    placed = [Text.get_window_extent(text) for text in names]  # without the lines to points
    assert all(box.y0 >= inside.y0 - 1 for box in placed)
    if own:
        assert not any(touch(a, b) for a, b in combinations(placed, 2))


@pytest.mark.parametrize("spread", [1e-4, 1e-3, 1e-2, 0.1])
def test_zero_fraction_ticks_do_not_overprint(spread: float) -> None:
    zeros = np.linspace(spread, 1 - spread, 60)
    columns = {"zero_fraction": zeros, "mean": 0.1 + zeros, "variance": 0.2 + zeros}
    table = pd.DataFrame(columns | {f"{k}_predicted": v * 0.99 for k, v in columns.items()})
    for name in ("zero_fraction", "mean"):
        table[f"{name}_predicted_scale"] = 0.001
    table.index = pd.Index([f"gene{i}" for i in range(60)], name="gene")
    adata = datasets.linear_factor(5, 4)
    adata.uns["scuvae_predictive_check"] = table
    ax = pl.predictive_check(adata)[0]
    ax.figure.canvas.draw()
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        shown = [t for t in axis.get_ticklabels() if low <= _place(t, axis) <= high]
        assert len(shown) >= 2
        found = [t.get_window_extent() for t in shown]
        assert not any(touch(a, b) for a, b in combinations(found, 2))


def _place(label, axis) -> float:
    return label.get_position()[0 if axis.axis_name == "x" else 1]


def test_the_farthest_genes_have_their_names() -> None:
    mean = np.geomspace(0.1, 10, 50)
    off = np.ones(50)
    off[[7, 30]] = 3.0, 1 / 3
    table = pd.DataFrame({"mean": mean * off, "mean_predicted": mean}, index=_genes(50))
    table["mean_predicted_scale"] = 0.05 * mean
    table["variance"], table["variance_predicted"] = mean * off, mean
    adata = datasets.linear_factor(5, 4)
    adata.uns["scuvae_predictive_check"] = table.rename_axis("gene")
    for ax in pl.predictive_check(adata):
        assert {"gene7", "gene30"} == _named(ax)
    assert not _named(pl.predictive_check(adata, n_genes=0)[0])


def _genes(n: int) -> pd.Index:
    return pd.Index([f"gene{i}" for i in range(n)])


def _named(ax: Axes) -> set[str]:
    return {t.get_text() for t in ax.texts if isinstance(t, Annotation)}


def test_the_end_of_a_loss_takes_most_of_the_height(adata: ad.AnnData) -> None:
    ax = pl.loss(adata)
    history = adata.uns["scuvae"]["history"]
    late = history["loss"][history.index >= 10]
    low, high = np.log(ax.get_ylim())
    assert (np.log(late.max()) - np.log(late.min())) / (high - low) > 0.5
    lost = -history["validation_elbo"].dropna()
    (dot,) = [c.get_offsets()[0] for c in ax.collections]
    assert tuple(dot) == (lost.idxmin(), lost.min())
    # One that falls evenly is shown whole.
    history["loss"], history["validation_elbo"] = np.linspace(700, 600, 100), np.nan
    low, high = pl.loss(adata).get_ylim()
    assert low < 600
    assert high > 700


def test_of_two_fits_with_one_history_both_are_seen(adata: ad.AnnData) -> None:
    adata.uns["refined"] = adata.uns["scuvae"]
    first, second = [line for line in pl.loss(adata).get_lines() if line.get_linestyle() == "-"]
    assert first.get_linewidth() > 2 * second.get_linewidth()


def test_scores_of_a_default_fit_are_drawn_without_a_umap(adata: ad.AnnData) -> None:
    (scale, *_) = pl.embedding_scores(adata)
    assert scale.get_xlabel() == "Map 1"
    points = np.concatenate([c.get_offsets() for c in scale.collections])
    assert {tuple(p) for p in points} == {tuple(p) for p in adata.obsm["X_scuvae_embed"][:, :2]}
    adata.obsm["X_umap"] = adata.obsm["X_scuvae"][:, :2]
    assert pl.embedding_scores(adata)[0].get_xlabel() == "UMAP1"


# --- colours ------------------------------------------------------------------------------------

# Linear RGB as seen without red or green cones (Machado, Oliveira & Fernandes 2009, severity 1).
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
     [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]],
]  # fmt: skip
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175],
     [0.0193339, 0.119192, 0.9503041]]
)  # fmt: skip


def lab(linear: np.ndarray) -> np.ndarray:
    relative = linear @ XYZ.T / np.array([0.95047, 1, 1.08883])
    f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@pytest.mark.parametrize(("n", "least"), [(2, 20), (8, 13), (20, 12), (40, 11), (60, 8)])
def test_colours_can_be_told_apart(n: int, least: float) -> None:
    """CIE76 differences; some 2.3 is what is just noticed side by side."""
    srgb = np.array(colours(n))[:, :3]
    assert len({tuple(c) for c in srgb}) == n
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for view in (np.eye(3), *np.array(BLIND)):
        seen = lab(np.clip(linear @ view.T, 0, 1))
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[~np.eye(n, dtype=bool)].min() > least
    assert lab(linear)[:, 0].max() < 90  # seen on white


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_a_picture_is_saved(name: str, start: bytes, adata: ad.AnnData, tmp_path: Path) -> None:
    path = tmp_path / name
    assert isinstance(pl.loss(adata, save=path), Axes)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_cannot_be_saved(adata: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no kind of picture\. Did you mean 'png'"):
        pl.loss(adata, save=tmp_path / "a.pgn")
    with pytest.raises(ValueError, match="no such folder"):
        pl.loss(adata, save=tmp_path / "b" / "a.png")


@pytest.mark.parametrize("draw", [pl.elbo_by_size, pl.embedding_scores])
def test_points_are_rasterised(draw, adata: ad.AnnData) -> None:
    axes = np.ravel(np.asarray(draw(adata), dtype=object))
    assert all(
        c.get_rasterized() for ax in axes for c in ax.collections if len(c.get_offsets()) > 99
    )
