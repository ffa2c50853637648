"""Fits that past versions wrote are read, and are what they were.

``tests/data/`` has them, compressed. 8ecac6c: format 1, no digests; cells of ``small_counts``' kind
with an unamortized-and-encoder fit, a linear one and a zero-inflated encoder's, scores of the
first, and in ``uns["expected"]`` where it put 24 new cells.
"""

import gzip
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData

from scuvae import get, io, tl

DATA = Path(__file__).parent / "data"
KEYS = ["scuvae", "linear", "zinb"]


@pytest.fixture
def old(tmp_path: Path) -> AnnData:
    path = tmp_path / "fit.h5ad"
    path.write_bytes(gzip.decompress((DATA / "fit_8ecac6c.h5ad.gz").read_bytes()))
    return ad.read_h5ad(path)


@pytest.mark.parametrize("key", KEYS)
def test_a_fit_of_8ecac6c_is_read(
    key: str, old: AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "scuvae"):
        model = get.model(old, key=key)
    assert "is of format 1 (scuvae 0.1.0)" in caplog.text
    assert len(get.history(old, key=key)) == 2
    for part, arrays in old.uns[key]["state"].items():
        found = getattr(model, part).state_dict()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name].numpy().ravel(), np.ravel(array))
    q = get.posterior(old, key=key)
    slot = "X_scuvae" if key == "scuvae" else key
    np.testing.assert_array_equal(q.mean, old.obsm[slot])
    io.write_model(tmp_path / "model.scuvae", old, key=key)  # migrated: of the present format
    again = get.model(io.read_model(tmp_path / "model.scuvae"))
    z = torch.ones(1, 2)
    covariates = model.decoder.output.weight.new_zeros(1, 2) if key == "scuvae" else None
    assert torch.equal(model.decoder(z, covariates), again.decoder(z, covariates))


@pytest.mark.parametrize("key", KEYS)
def test_its_fits_are_trained_on(key: str, old: AnnData) -> None:
    tl.fit(old, reference=old, key=key, fine_tune=True, max_epochs=1, key_added="grown")
    was, found = old.uns[key]["params"], old.uns["grown"]["params"]
    for name in ("likelihood", "n_latent", "covariance", "optimizer", "local_step"):
        assert found[name] == was[name]
    assert np.isfinite(old.obsm["grown"]).all()
    get.model(old, key="grown")


def test_its_scores_are_what_they_were(old: AnnData) -> None:
    """ELBOs of 200 draws then and now: within 6 standard errors of their difference."""
    then, error = old.uns["expected"]["elbo"], old.obs["scuvae_elbo_se"].to_numpy()
    tl.score(old, n_samples=200, rng=1)
    apart = old.obs["scuvae_elbo"].to_numpy() - then
    assert np.abs(apart / np.hypot(error, old.obs["scuvae_elbo_se"])).max() < 6


def test_new_cells_go_where_they_went(old: AnnData) -> None:
    """Refinement has changed since: q may differ by a part of its width."""
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(24, 2)), rng.normal(size=(2, 12))
    x = rng.poisson(3 * np.exp(np.clip(z @ w, -3, 3))).astype(np.float32)
    new = AnnData(x)
    new.obs["batch"] = rng.choice(["b0", "b1"], 24)
    new.var_names = old.var_names
    tl.project(new, old)
    apart = np.abs(new.obsm["X_scuvae"] - old.uns["expected"]["mean"])
    assert np.median(apart / new.obsm["X_scuvae_scale"]) < 0.5
