"""Probabilities of labels: their parts against scikit-learn and numpy, the whole by simulation."""

from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import fingerprint, small_counts, small_fit, unchanged
from matplotlib import pyplot as plt
from scipy import sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from small_models import batch_of, model_of

from scuvae import pl, tl
from scuvae._reliability import expected_calibration_error, reliability
from scuvae.inference.mapping.label_probabilities import Voters, combine, terms, weigh
from scuvae.inference.mapping.label_regression import LabelRegression

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def profiles(seed: int = 0) -> tuple[AnnData, AnnData]:
    """Cells of four types, two of them hard to tell apart, at depths of 20 to 400 counts."""
    rng = np.random.default_rng(seed)
    n, n_vars = 800, 40
    kind = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    effect = rng.normal(size=(4, n_vars))
    effect[1] = effect[0] + 0.25 * rng.normal(size=n_vars)
    share = np.exp(0.6 * effect + rng.normal(size=n_vars))
    share /= share.sum(1, keepdims=True)
    size = np.exp(rng.uniform(np.log(20), np.log(400), n))
    x = sp.csr_matrix(rng.poisson(size[:, None] * share[kind]).astype(np.float32))
    names = np.array(["T/helper", "T/killer", "B", "NK"])
    obs = pd.DataFrame({"cell_type": pd.Categorical(names[kind], categories=names[::-1])})
    adata = AnnData(x, obs=obs.set_index(pd.Index([f"cell{i}" for i in range(n)])))
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    return adata[:400].copy(), adata[400:].copy()


@cache
def fitted() -> AnnData:
    return small_fit(profiles()[0], max_epochs=25)


def labelled(reference: AnnData | None = None, **options: Any) -> AnnData:
    new = profiles()[1]
    tl.transfer_labels(new, fitted() if reference is None else reference, **options)
    return new


# --- the parts ----------------------------------------------------------------------------------


def test_bins_and_their_error_by_hand() -> None:
    sure, right = np.array([0.05, 0.05, 0.7, 0.71, 1.0]), np.array([0, 1, 1, 0, 1])
    bins = reliability(sure, right, 10)
    assert bins["count"].tolist() == [2, 0, 0, 0, 0, 0, 0, 2, 0, 1]
    np.testing.assert_allclose(bins["accuracy"][[0, 7, 9]], [0.5, 0.5, 1.0])
    np.testing.assert_allclose(bins["probability"][[0, 7, 9]], [0.05, 0.705, 1.0])
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.45 + 2 * 0.205) / 5)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_regression_is_scikit_learns(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (150, 12)).astype(np.float32)
    x[:, 3] = 2  # tells nothing
    label = (x[:, 0] + rng.normal(size=150) > 1).astype(int) + (x[:, 1] > 2)
    found = LabelRegression.fit(sp.csr_matrix(x) if sparse else x, label, 3)
    scaler = StandardScaler().fit(x)
    truth = LogisticRegression(C=1 / (0.1 * 12), tol=1e-8, max_iter=1000)
    truth.fit(scaler.transform(x), label)
    # L-BFGS ends where a thousandth of a nat is left.
    expected = truth.predict_proba(scaler.transform(x))
    np.testing.assert_allclose(found.probabilities(x), expected, atol=5e-3)


def test_weights_undo_what_made_opinions_too_sure() -> None:
    """Labels drawn with known probabilities, whose cube is the one opinion; the other is noise."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(4, 0.7), 4000)
    label = (truth.cumsum(1) > rng.random((4000, 1))).argmax(1)
    sure = truth**3 / (truth**3).sum(1, keepdims=True)
    noise = rng.dirichlet(np.ones(4), 4000)
    depth = rng.normal(size=4000)
    both = terms(sure, noise, depth)
    weights = weigh(both, label)
    # The floor of a hundredth bends what was a cube; standard errors are some hundredths.
    assert weights[0] == pytest.approx(0.4, abs=0.12)
    np.testing.assert_allclose(weights[1:], 0, atol=0.1)
    found = combine(weights, both)
    right = found.argmax(1) == label
    before = expected_calibration_error(reliability(sure.max(1), sure.argmax(1) == label))
    after = expected_calibration_error(reliability(found.max(1), right))
    assert before > 0.15
    assert after < 0.05


def test_own_votes_are_left_out() -> None:
    model = model_of("poisson").float()
    x = torch.poisson(torch.full((5, model.n_vars), 3.0))
    z, of_label = torch.randn(6, 2), torch.eye(6)
    batch = batch_of(x, sparse=True)
    without = torch.rand(5, 6) < 0.4
    without[:, 0] = False
    with torch.no_grad():
        found = Voters(model, z, of_label, 1).shares(batch, without)
    every = Voters(model, z, of_label, 1).shares(batch)
    expected = np.where(without, 0, every)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=1e-5)


# --- the verb -----------------------------------------------------------------------------------


def test_what_is_written(tmp_path: Path) -> None:
    new = labelled()
    table = new.obsm["scuvae_label_probabilities"]
    assert list(table) == ["NK", "B", "T_killer", "T_helper"]
    assert table.index.equals(new.obs_names)
    assert set(table.dtypes) == {np.dtype("float32")}
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-5)
    label = new.obs["scuvae_label"]
    assert list(label.cat.categories) == ["NK", "B", "T/killer", "T/helper"]
    assert (label.cat.codes.to_numpy() == table.to_numpy().argmax(1)).all()
    np.testing.assert_array_equal(new.obs["scuvae_label_probability"], table.max(1))
    new.write_h5ad(tmp_path / "new.h5ad")
    back = ad.read_h5ad(tmp_path / "new.h5ad")
    for held in ("obs", "obsm", "uns"):
        assert fingerprint(getattr(back, held)) == fingerprint(getattr(new, held))
    again = labelled()
    assert fingerprint(again.obsm["scuvae_label_probabilities"]) == fingerprint(table)


@pytest.mark.parametrize("condition", ["all", "a quarter of the genes", "30 counts"])
def test_probabilities_hold(condition: str) -> None:
    new = profiles()[1]
    if condition == "30 counts":
        x = new.X.toarray().astype(int)
        keep = np.minimum(1, 30 / x.sum(1, keepdims=True))
        new.X = sp.csr_matrix(np.random.default_rng(1).binomial(x, keep).astype(np.float32))
    if condition == "a quarter of the genes":
        new = new[:, ::4].copy()
    tl.transfer_labels(new, fitted())
    right = (new.obs["scuvae_label"] == new.obs["cell_type"]).to_numpy()
    sure = new.obs["scuvae_label_probability"].to_numpy(float)
    # 400 answers: the share of right ones has a standard error of .02, and exact probabilities
    # an expected calibration error of about .04; both for weights from as many cells once more.
    assert abs(right.mean() - sure.mean()) < 0.07
    assert expected_calibration_error(reliability(sure, right)) < 0.09
    surest = np.argsort(-sure)[:100]
    assert right[surest].mean() > right.mean() + 0.03
    assert 0.5 < right.mean() < 0.97


def test_the_report_is_of_the_references_cells() -> None:
    report = labelled().uns["scuvae_label_calibration"]
    assert report["labels"] == "cell_type"
    assert report["n"] == 400 == report["count"].sum() == report["thinned_count"].sum()
    bins = {name: report[name] for name in ("count", "probability", "accuracy")}
    assert report["ece"] == pytest.approx(expected_calibration_error(bins))
    assert report["ece"] < 0.1
    # Thinned to as few as ten counts more are wrong.
    share = [(report[f"{p}accuracy"] * report[f"{p}count"]).sum() for p in ("", "thinned_")]
    assert share[1] < share[0]


def test_a_cell_is_judged_by_itself() -> None:
    new = labelled()
    few = profiles()[1][[7, 300, 21]].copy()
    tl.transfer_labels(few, fitted())
    slot = "scuvae_label_probabilities"
    np.testing.assert_allclose(few.obsm[slot], new.obsm[slot].iloc[[7, 300, 21]], atol=1e-4)


def test_without_calibration_all_is_as_by_votes() -> None:
    new = labelled()
    tl.transfer_labels(new, fitted(), calibrate=False)
    slots = {*new.obs, *new.obsm, *new.uns}
    assert not slots & {"scuvae_label_probability", "scuvae_label_probabilities"}
    assert "scuvae_label_calibration" not in slots
    few = fitted().copy()
    few.obs["cell_type"] = few.obs["cell_type"].where(np.arange(few.n_obs) < 199)
    tl.transfer_labels(new, few)
    assert "scuvae_label_probability" not in new.obs
    bare = fitted().copy()
    del bare.X
    tl.transfer_labels(new, bare)
    assert "scuvae_label_probability" not in new.obs


def test_unsure_and_novel_cells_are_unassigned() -> None:
    every, some = labelled(), labelled(min_probability=0.8)
    sure = (every.obs["scuvae_label_probability"] >= 0.8).to_numpy()
    assert 0.1 < sure.mean() < 0.9
    assert (some.obs["scuvae_label"] == "unassigned").to_numpy().tolist() == (~sure).tolist()
    assert some.obs["scuvae_label"][sure].tolist() == every.obs["scuvae_label"][sure].tolist()
    assert list(some.obs["scuvae_label"].cat.categories)[-1] == "unassigned"
    for slot in ("scuvae_label_share", "scuvae_label_probability"):
        np.testing.assert_array_equal(some.obs[slot], every.obs[slot])
    novelty = np.random.default_rng(0).exponential(size=every.n_obs)
    every.obs["scuvae_novelty"] = novelty
    tl.transfer_labels(every, fitted(), max_novelty=1.5, calibrate=False)
    assert ((every.obs["scuvae_label"] == "unassigned") == (novelty > 1.5)).all()


def test_other_values_than_counts() -> None:
    rng = np.random.default_rng(0)
    kind = rng.choice(3, 500)
    x = 1.2 * rng.normal(size=(3, 20))[kind] + rng.normal(size=(500, 20))
    adata = AnnData(x.astype(np.float32))
    adata.obs["cell_type"] = np.array(["a", "b", "c"])[kind]
    old, new = adata[:300].copy(), adata[300:, ::4].copy()
    small_fit(old, likelihood="gaussian", max_epochs=20)
    tl.transfer_labels(new, old)
    right = (new.obs["scuvae_label"].astype(str) == new.obs["cell_type"]).to_numpy()
    sure = new.obs["scuvae_label_probability"].to_numpy(float)
    assert abs(right.mean() - sure.mean()) < 0.08  # 200 answers
    assert "thinned_ece" not in new.uns["scuvae_label_calibration"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "few cells": ({"calibrate": True}, "60 of the reference's cells.*fewer than 200"),
    "a threshold of few": ({"min_probability": 0.5}, "min_probability=0.5 needs probabilities"),
    "a threshold of none": (
        {"min_probability": 0.5, "calibrate": False},
        "min_probability=0.5 needs prob",
    ),
    "above one": ({"min_probability": 1.5}, "min_probability=1.5"),
    "no novelty": ({"max_novelty": 2.0}, "no 'scuvae_novelty'.*scuvae.tl.novelty"),
    "a label of that name": ({"max_novelty": 2.0, "labels": "odd"}, "rename it"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be(case: str) -> None:
    arguments, message = BAD[case]
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    reference.obs["odd"] = "unassigned"
    if "rename" in message:
        adata.obs["scuvae_novelty"] = 1.0
    with unchanged(reference), unchanged(adata), pytest.raises(ValueError, match=message):
        tl.transfer_labels(adata, reference, **arguments)


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_has_the_bins() -> None:
    new = labelled(min_probability=0.5)
    with unchanged(new):
        ax = pl.label_reliability(new, show=False)
    report = new.uns["scuvae_label_calibration"]
    points = ax.containers[0][0].get_xydata()
    there = report["count"] > 0
    expected = np.stack([report["probability"][there], report["accuracy"][there]], 1)
    np.testing.assert_allclose(points, expected)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == f"400 reference's cells, ECE {report['ece']:.3f}"
    ax = pl.label_reliability(new, labels="cell_type", show=False)
    table = new.obsm["scuvae_label_probabilities"].to_numpy()
    names = np.array(["NK", "B", "T/killer", "T/helper"])
    right = names[table.argmax(1)] == new.obs["cell_type"].astype(str)
    bins = reliability(table.max(1), right)
    np.testing.assert_allclose(
        ax.containers[0][0].get_ydata(), bins["accuracy"][bins["count"] > 0], atol=1e-6
    )
    # Of some cells AnnData drops the labels that they lack: the rest must not move up.
    some = new[new.obs["scuvae_label"].astype(str) != "NK"].copy()
    assert "NK" not in some.obs["scuvae_label"].cat.categories
    ax = pl.label_reliability(some, labels="cell_type", show=False)
    kept = new.obs_names.isin(some.obs_names)
    bins = reliability(table.max(1)[kept], right.to_numpy()[kept])
    np.testing.assert_allclose(
        ax.containers[0][0].get_ydata(), bins["accuracy"][bins["count"] > 0], atol=1e-6
    )
    with pytest.raises(ValueError, match="'kind' is no column"):
        pl.label_reliability(new, labels="kind")
    with pytest.raises(ValueError, match="no 'scuvae_label_calibration'"):
        pl.label_reliability(profiles()[1])
    plt.close("all")


def test_dense_counts_are_as_good_as_sparse_ones() -> None:
    """Whichever the reference holds, and whichever the new cells do."""
    old, new = small_fit(small_counts(n_obs=220), max_epochs=1), small_counts(n_obs=60, seed=1)
    found = []
    for of_reference in (np.asarray, sp.csr_matrix):
        for of_new in (np.asarray, sp.csr_matrix):
            reference, adata = old.copy(), new.copy()
            reference.X, adata.X = of_reference(reference.X), of_new(adata.X)
            tl.transfer_labels(adata, reference)
            table = np.asarray(adata.obsm["scuvae_label_probabilities"])
            found.append((table, adata.uns["scuvae_label_calibration"]["ece"]))
    for table, error in found[1:]:
        # Float32's sums of the same numbers in another order.
        np.testing.assert_allclose(table, found[0][0], atol=1e-3)
        assert error == pytest.approx(found[0][1], abs=1e-3)
