"""get.fit against what the fit was asked for and wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import small_counts, small_fit

from scuvae import get, io, tl


def test_on_what_how_and_how_good() -> None:
    adata = small_counts()
    adata.layers["counts"] = adata.X
    options = {"layer": "counts", "mask_var": "highly_variable", "batch_key": "batch"}
    small_fit(adata, amortized=True, key_added="k", **options)
    fit = get.fit(adata, key="k")
    said = fit.to_dict()
    assert (said["key"], said["n_obs"], said["n_vars"]) == (
        "k",
        adata.n_obs,
        int(adata.var["highly_variable"].sum()),
    )
    assert said["data"] == options
    assert (said["inference"], said["encoder"], said["likelihood"]) == (
        "amortized",
        True,
        "negative_binomial",
    )
    history = get.history(adata, key="k")
    assert said["epochs"] == len(history)
    assert said["held_out_elbo"] == pytest.approx(history["validation_elbo"].max())
    assert said["best_epoch"] == history["validation_elbo"].idxmax()
    assert said["posterior_scale"] == pytest.approx(np.median(adata.obsm["k_scale"]))
    for slot in said["slots"]:
        part, name = slot.removesuffix('"]').split('["')
        assert name in getattr(adata, part)
    json.dumps(said)


def test_what_is_next_can_be_called() -> None:
    adata = small_fit(small_counts())
    text = repr(get.fit(adata))
    assert "scuvae.tl.score(adata)" in text
    assert "amortization_gap" not in text  # there is no encoder
    tl.score(adata)
    said = get.fit(adata)
    assert "scuvae.tl.score(adata)" not in repr(said)
    elbo = float(adata.obs["scuvae_elbo"].mean())
    assert said.to_dict()["measures"]["elbo"] == pytest.approx(elbo, rel=1e-6)
    assert f"ELBO {elbo:.1f}" in repr(said)


def test_without_held_out_cells_and_of_a_projection(tmp_path: Path) -> None:
    adata = small_fit(small_counts(), validation_fraction=0.0, early_stopping=False)
    assert get.fit(adata).to_dict()["held_out_elbo"] is None
    assert "nothing says how good" in repr(get.fit(adata))
    new = small_counts(20, seed=4)[:, :30].copy()
    tl.project(new, adata)
    said = get.fit(new).to_dict()
    assert (said["projected"], said["n_missing"], said["n_obs"]) == (True, 10, 20)
    io.write_model(tmp_path / "m.scuvae", adata)
    assert "no cells are kept with a model" in repr(get.fit(io.read_model(tmp_path / "m.scuvae")))


def test_names_are_escaped_in_html() -> None:
    adata = small_fit(small_counts(), key_added="a<b>")
    page = get.fit(adata, key="a<b>")._repr_html_()
    assert "a&lt;b&gt;" in page
    assert "<b>" not in page


def test_no_fit() -> None:
    with pytest.raises(ValueError, match="holds no fit"):
        get.fit(small_counts())


def test_a_model_says_its_size() -> None:
    model = get.model(small_fit(small_counts()))
    numbers = sum(p.numel() for p in model.parameters())
    assert f"3 latent dimensions -> 40 genes, {numbers:,} parameters" in repr(model)
