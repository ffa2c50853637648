"""Every slot survives files, and what anndata does to cells keeps the posterior beside them."""

import pickle
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import (
    LIKELIHOOD_NAMES,
    N_OBS,
    SCHEMES,
    fingerprint,
    posterior_of,
    small_counts,
    small_data,
    small_fit,
)
from scipy import sparse as sp

from scuvae import get, tl

Written = Callable[[str, bool | str, str], tuple[AnnData, AnnData]]

# "semi" has the slots of the others. A zarr store is hundreds of small files, which take seconds:
# one fit stands for them.
every_file = pytest.mark.parametrize(
    ("likelihood", "amortized", "suffix"),
    [
        *product(LIKELIHOOD_NAMES, ["semi"], ["h5ad"]),
        *product(["negative_binomial"], [s for s in SCHEMES if s != "semi"], ["h5ad"]),
        ("zero_inflated_negative_binomial", "semi", "zarr"),
    ],
)


def everything(likelihood: str, amortized: bool | str, key: str | None = None) -> AnnData:
    """A fit with every slot that there is."""
    adata = small_data(likelihood)
    small_fit(
        adata,
        likelihood=likelihood,
        amortized=amortized,
        batch_key="batch",
        mask_var="highly_variable",
        size_factor_key="expected",
        key_added=key,
    )
    tl.score(adata, key=key, n_samples=2)
    tl.denoise(adata, key=key, n_samples=0)
    tl.sample(adata, key=key, n_samples=2)
    tl.calibration(adata, key=key, n_cells=3, max_steps=1)
    tl.predictive_check(adata, key=key, n_samples=0)
    if amortized is not False:
        tl.amortization_gap(adata, key=key, max_steps=1)
    return adata


def through(adata: AnnData, path: Path) -> AnnData:
    """Written, read, and once more."""
    suffix = path.suffix[1:]
    for turn in ("once", "twice"):
        file = path.with_stem(f"{path.stem}_{turn}")
        getattr(adata, f"write_{suffix}")(file)
        adata = getattr(ad, f"read_{suffix}")(file)
    return adata


def assert_same(a: Any, b: Any) -> None:
    """Equal values and dtypes; files may hand back numpy scalars and other string dtypes."""
    if hasattr(a, "keys") and not isinstance(a, pd.DataFrame):
        assert set(a) == set(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_index_type="equiv")
    elif sp.issparse(a):
        assert fingerprint(a) == fingerprint(b)
    elif isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert a.shape == b.shape
        if a.dtype.kind in "OU":
            assert a.tolist() == b.tolist()
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    else:
        assert a == b
        assert isinstance(b, str) == isinstance(a, str)
        assert isinstance(b, bool | np.bool_) == isinstance(a, bool)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A fit with every slot, and what came back from files of a format."""

    @cache
    def write(likelihood: str, amortized: bool | str, suffix: str) -> tuple[AnnData, AnnData]:
        adata = everything(likelihood, amortized)
        return adata, through(adata, tmp_path_factory.mktemp("files") / f"fit.{suffix}")

    return write


@every_file
def test_every_slot_survives(
    likelihood: str, amortized: bool | str, suffix: str, written: Written
) -> None:
    assert_survived(*written(likelihood, amortized, suffix))


def test_every_slot_survives_under_a_name(tmp_path: Path) -> None:
    adata = everything("negative_binomial", "semi", "k")
    assert_survived(adata, through(adata, tmp_path / "fit.h5ad"), "k")


def assert_survived(adata: AnnData, back: AnnData, key: str = "scuvae") -> None:
    for slot in ("uns", "obsm", "layers", "varm"):
        assert_same(dict(getattr(adata, slot)), dict(getattr(back, slot)))
    pd.testing.assert_frame_equal(adata.obs, back.obs, check_exact=True)
    assert back.obs[f"{key}_split"].dtype == "category"
    assert set(back.uns[key]) == {
        *("params", "history", "var_names", "state", "embed", "latent", "manifest")
    }


@every_file
def test_the_verbs_go_on_from_a_file(
    likelihood: str, amortized: bool | str, suffix: str, written: Written
) -> None:
    adata, back = (part.copy() for part in written(likelihood, amortized, suffix))
    cells = [small_data(likelihood, seed=5) for _ in range(2)]
    for new, reference in zip(cells, (adata, back), strict=True):
        tl.project(new, reference)
        tl.score(new, n_samples=3)
    assert fingerprint(cells[0].obsm) == fingerprint(cells[1].obsm)
    assert fingerprint(cells[0].obs) == fingerprint(cells[1].obs)
    for fitted in (adata, back):
        tl.score(fitted, n_samples=3, rng=1)
        tl.denoise(fitted)
        tl.refine(fitted, key_added="k")
        if amortized is not False:
            tl.amortization_gap(fitted)
    assert fingerprint(adata.obsm) == fingerprint(back.obsm)
    assert fingerprint(adata.layers) == fingerprint(back.layers)
    pd.testing.assert_frame_equal(adata.obs, back.obs, check_exact=True)
    pd.testing.assert_frame_equal(
        get.history(adata), get.history(back), check_exact=True, check_index_type="equiv"
    )


def test_a_projection_is_a_model_of_its_own_in_a_file(tmp_path: Path) -> None:
    reference, adata = everything("poisson", "semi"), small_counts(seed=5)
    tl.project(adata, reference)
    back = through(adata, tmp_path / "projected.h5ad")
    third, fourth = small_counts(seed=6), small_counts(seed=6)
    tl.project(third, back)
    tl.project(fourth, reference)
    assert fingerprint(third.obsm) == fingerprint(fourth.obsm)


# --- anndata's own operations -------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    return everything("negative_binomial", "semi")


def test_subsets(fitted: AnnData) -> None:
    rows = np.random.default_rng(0).permutation(N_OBS)[:17]
    for subset in (fitted[rows], fitted[rows].copy()):
        for name, values in posterior_of(subset).items():
            np.testing.assert_array_equal(values, fitted.obsm[name][rows])
        assert get.posterior(subset).batch_shape == (17,)
    subset = fitted[rows].copy()
    tl.score(subset, n_samples=3)
    whole = fitted.copy()
    tl.score(whole, n_samples=3)
    # The KL has no draws; float32 sums in another order.
    np.testing.assert_allclose(
        subset.obs["scuvae_kl"], whole.obs["scuvae_kl"].iloc[rows], rtol=1e-5
    )


def test_fewer_genes_than_the_fit(fitted: AnnData) -> None:
    some = fitted[:, 5:].copy()
    tl.score(some, n_samples=3)
    tl.denoise(some)
    assert np.isfinite(some.obs["scuvae_elbo"]).all()
    assert (some.obs["scuvae_reconstruction"] > fitted.obs["scuvae_reconstruction"]).mean() > 0.9


def test_copy_and_pickle(fitted: AnnData) -> None:
    assert fingerprint(fitted.copy()) == fingerprint(fitted)
    again = pickle.loads(pickle.dumps(fitted))
    assert fingerprint(again.obsm) == fingerprint(fitted.obsm)
    assert fingerprint(again.uns) == fingerprint(fitted.uns)
    new, other = small_counts(seed=5), small_counts(seed=5)
    tl.project(new, again)
    tl.project(other, fitted)
    assert fingerprint(new.obsm) == fingerprint(other.obsm)


def test_concat(fitted: AnnData) -> None:
    new = small_counts(seed=5)
    new.obs_names = [f"new{i}" for i in range(N_OBS)]
    tl.project(new, fitted)
    both = ad.concat([new, fitted], uns_merge="first")
    for name, values in posterior_of(both).items():
        np.testing.assert_array_equal(values, np.vstack([new.obsm[name], fitted.obsm[name]]))
    tl.score(both, n_samples=2)
    np.testing.assert_allclose(  # no draws; float32 sums in another order
        both.obs["scuvae_kl"].to_numpy()[N_OBS:], fitted.obs["scuvae_kl"], rtol=1e-5
    )
    bare = ad.concat([new, fitted])
    with pytest.raises(ValueError, match="holds no fit"):
        tl.score(bare)
