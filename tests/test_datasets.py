"""The data sets against an independent recomputation, and the stored files against both."""

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from scuvae import datasets

DATA = Path(__file__).parents[1] / "data"
# Source distributions go without the files.
stored_files = pytest.mark.skipif(not DATA.exists(), reason="no data/ beside tests/")


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    return datasets.pbmc68k_counts()


@pytest.fixture(scope="module")
def reduced() -> ad.AnnData:
    return sc.datasets.pbmc68k_reduced()


def test_linear_factor_draws_what_its_source_draws() -> None:
    rng = np.random.default_rng(1)
    l = rng.normal(scale=0.5, size=(200, 3))  # noqa: E741
    f = rng.normal(scale=0.5, size=(500, 3))
    x = rng.normal(loc=l @ f.T, scale=0.3)

    adata = datasets.linear_factor()
    assert adata.X.dtype == adata.layers["oracle"].dtype == np.float32
    np.testing.assert_array_equal(adata.X, x.astype(np.float32))
    np.testing.assert_array_equal(adata.obsm["factors"], l)
    np.testing.assert_array_equal(adata.varm["loadings"], f)
    np.testing.assert_array_equal(adata.layers["oracle"], (l @ f.T).astype(np.float32))


def test_linear_factor_has_the_oracle_likelihood_on_record() -> None:
    adata = datasets.linear_factor()
    scale = adata.uns["linear_factor"]["noise_scale"]
    assert (adata.X - adata.layers["oracle"]).std() == pytest.approx(scale, rel=0.01)
    # Factors integrated out: x ~ N(0, f f' / 4 + 0.09 I).
    w = adata.varm["loadings"] * adata.uns["linear_factor"]["factor_scale"]
    covariance = w @ w.T + scale**2 * np.eye(adata.n_vars)
    solved = np.linalg.solve(covariance, adata.X.T.astype(np.float64))
    marginal = -0.5 * (
        np.sum(adata.X.T * solved, axis=0)
        + np.linalg.slogdet(covariance)[1]
        + adata.n_vars * np.log(2 * np.pi)
    )
    assert marginal.mean() == pytest.approx(-114.9, abs=0.05)


def test_linear_factor_sizes_and_generator() -> None:
    adata = datasets.linear_factor(7, 5, 2, rng=np.random.default_rng(3))
    assert adata.shape == (7, 5)
    assert adata.obsm["factors"].shape == (7, 2)
    np.testing.assert_array_equal(adata.X, datasets.linear_factor(7, 5, 2, rng=3).X)
    generator = np.random.default_rng(3)
    first, second = (datasets.linear_factor(7, 5, 2, rng=generator).X for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_obs": 0}, ValueError, "n_obs=0: pass a whole number >= 1"),
        ({"n_vars": -1}, ValueError, "n_vars=-1: pass a whole number >= 1"),
        ({"n_factors": 2.5}, TypeError, "n_factors=2.5 is a float"),
        ({"n_obs": True}, TypeError, "n_obs=True is a bool"),
        ({"n_obs": "10"}, TypeError, "n_obs='10' is a str"),
        ({"n_obs": 10**7, "n_vars": 10**9}, ValueError, "n_obs=10000000 with n_vars=.*GiB"),
        ({"n_obs": 10**400}, ValueError, "of at most"),
        ({"n_vars": np.timedelta64(3, "s")}, TypeError, "is a timedelta64"),
        ({"rng": np.timedelta64(3, "s")}, TypeError, "rng=.* is a timedelta64"),
        ({"rng": 1.5}, TypeError, "pass an int, a numpy.random.Generator"),
        ({"rng": True}, TypeError, "pass an int, a numpy.random.Generator"),
        ({"rng": -1}, ValueError, "a seed is not negative"),
    ],
)
def test_linear_factor_refuses(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        datasets.linear_factor(**arguments)


def test_pbmc_counts_are_whole_and_normalise_to_scanpy_s_values(
    pbmc: ad.AnnData, reduced: ad.AnnData
) -> None:
    assert pbmc.shape == (700, 765)
    assert pbmc.X.format == "csr"
    assert pbmc.X.dtype == np.float32
    assert pbmc.X.has_canonical_format
    np.testing.assert_array_equal(pbmc.X.data, np.rint(pbmc.X.data))
    assert pbmc.X.data.min() == 1

    # By way of dense matrices and names: nothing shared with the code under test.
    counts = pbmc.X.toarray().astype(np.float64)
    again = np.log1p(counts / pbmc.obs["n_counts"].to_numpy(np.float64)[:, None] * 1e4)
    np.testing.assert_allclose(again, reduced.raw.X.toarray(), rtol=0, atol=0.000501)
    assert list(pbmc.obs_names) == list(reduced.obs_names)
    assert list(pbmc.var_names) == list(reduced.raw.var_names)


def test_pbmc_counts_agree_with_what_scanpy_recorded(pbmc: ad.AnnData, reduced: ad.AnnData) -> None:
    totals = np.asarray(pbmc.X.sum(axis=1)).ravel()
    assert (totals > 0).all()
    assert (totals <= reduced.obs["n_counts"]).all()
    assert (np.diff(pbmc.X.indptr) <= reduced.obs["n_genes"]).all()
    # var["n_counts"] is of another, normalised matrix of all 68k cells: proportional, not equal.
    per_gene = np.asarray(pbmc.X.sum(axis=0)).ravel()
    correlation = np.corrcoef(np.log(per_gene), np.log(reduced.var["n_counts"]))[0, 1]
    assert correlation > 0.9


def test_pbmc_labels(pbmc: ad.AnnData, reduced: ad.AnnData) -> None:
    assert pbmc.obs["cell_type"].dtype == "category"
    assert list(pbmc.obs["cell_type"]) == list(reduced.obs["bulk_labels"])
    assert len(pbmc.uns["cell_type_colors"]) == len(pbmc.obs["cell_type"].cat.categories) == 10


@pytest.mark.parametrize("damage", ["value", "total", "shape", "column"])
def test_pbmc_notices_that_scanpy_s_copy_changed(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = sc.datasets.pbmc68k_reduced()
    if damage == "value":
        changed.raw.X.data[1000] += 0.01
    elif damage == "total":
        changed.obs.loc[changed.obs_names[5], "n_counts"] += 30
    elif damage == "shape":
        changed = changed[:, :100].copy()
        changed.raw = changed
    else:
        del changed.obs["n_counts"]
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: changed)
    with pytest.raises(RuntimeError, match="Exact counts cannot be recovered"):
        datasets.pbmc68k_counts()


def test_data_sets_are_silent_and_leave_global_random_states(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # anndata 0.13 asks pandas 3 for an option that pandas means to drop
        warnings.filterwarnings("ignore", message=".*infer_string.*")
        datasets.linear_factor()
        datasets.pbmc68k_counts()
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", datasets.__all__)
def test_data_sets_survive_h5ad(name: str, tmp_path: Path) -> None:
    adata = getattr(datasets, name)()
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert abs(again.X - adata.X).max() == 0
    assert again.obs.equals(adata.obs)
    assert dict(again.uns.get(name, {})) == adata.uns.get(name, {})


def test_data_sets_do_not_import_torch() -> None:
    code = (
        "import sys; from scuvae import datasets; "
        "datasets.linear_factor(); datasets.pbmc68k_counts(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@stored_files
def test_stored_files_hold_the_data_sets(pbmc: ad.AnnData) -> None:
    for line in (DATA / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
    stored = ad.read_h5ad(DATA / "pbmc68k_counts.h5ad")
    assert (stored.X != pbmc.X).nnz == 0
    assert stored.obs.equals(pbmc.obs)
    assert list(stored.var_names) == list(pbmc.var_names)

    simulated = datasets.linear_factor()
    with np.load(DATA / "linear_factor.npz") as arrays:
        np.testing.assert_array_equal(simulated.obsm["factors"], arrays["l"])
        np.testing.assert_array_equal(simulated.varm["loadings"], arrays["f"])
        # The last digit of the product is the BLAS library's own.
        np.testing.assert_allclose(simulated.X, arrays["x"], rtol=1e-6, atol=1e-7)


@stored_files
def test_stored_files_can_be_remade() -> None:
    command = [sys.executable, str(DATA / "make.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_treatment_changes_what_the_truth_says() -> None:
    """Pooled counts against the truth: many donors and cells leave little noise."""
    adata = datasets.two_conditions(n_donors=24, n_cells=300, depth=3000, rng=5)
    truth = adata.varm["log2_change"]
    treated = (adata.obs["condition"] == "treated").to_numpy()
    assert adata.obs.groupby("donor", observed=True)["condition"].nunique().eq(1).all()
    for kind in truth:
        of_type = (adata.obs["cell_type"] == kind).to_numpy()
        sums = [
            np.asarray(adata.X[of_type & arm].sum(0), float).ravel() for arm in (treated, ~treated)
        ]
        enough = (sums[0] > 500) & (sums[1] > 500)
        ratio = np.log2(sums[0] / sums[1])
        ratio -= np.median(ratio[enough])  # composition moves all genes alike
        off = (ratio - truth[kind].to_numpy())[enough]
        # Donors: a mean of 12 against one of 12 with sd .15 in ln is .09 in log2.
        assert np.abs(off).mean() < 0.15
        assert np.abs(off).max() < 0.6
    assert adata.X.sum(1).mean() == pytest.approx(3000 * np.exp(0.35**2 / 2), rel=0.03)


@pytest.mark.parametrize(
    "wrong", [{"n_donors": 5}, {"n_donors": 2}, {"n_cells": 0}, {"depth": 0}, {"rng": True}]
)
def test_wrong_donors(wrong: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        datasets.two_conditions(**wrong)
