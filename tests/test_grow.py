"""tl.fit(reference=): cells added to a finished fit, its decoder frozen or trained further."""

import logging
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import N_OBS, assert_same_posterior, fingerprint, small_counts, small_fit
from helpers import unchanged as left_alone
from scipy import sparse as sp

from scuvae import cli, get, io, tl
from scuvae.inference.training import loop
from scuvae.tl._grow import Growth

N_OLD = 40
SLOTS = ("X_scuvae", "X_scuvae_scale", "X_scuvae_covariance", "X_scuvae_embed")
# What a test that trains asks for; the rest is the reference's.
SHORT: dict[str, Any] = {"max_epochs": 3, "batch_size": 32}


@pytest.fixture(scope="module")
def _reference() -> AnnData:
    return small_fit(small_counts()[:N_OLD].copy(), batch_key="batch", max_epochs=10)


@pytest.fixture
def reference(_reference: AnnData) -> AnnData:
    return _reference.copy()


def decoder_of(adata: AnnData, key: str = "scuvae") -> dict[str, Any]:
    return {
        f"{part}/{name}": values
        for part in ("decoder", "likelihood")
        for name, values in adata.uns[key]["state"][part].items()
    }


def assert_same_decoder(one: AnnData, other: AnnData) -> None:
    mine, theirs = decoder_of(one), decoder_of(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


# --- the decoder frozen ---------------------------------------------------------------------------


def test_frozen_known_cells_stay_and_new_ones_are_projected(reference: AnnData) -> None:
    # In any order of cells and genes, beside genes that the fit does not know.
    rng = np.random.default_rng(1)
    every = small_counts()
    wider = AnnData(
        np.hstack([every.X, np.ones((N_OBS, 2), np.float32)]),
        obs=every.obs,
        var={"name": [*every.var_names, "other1", "other2"]},
    )
    wider.var_names = wider.var.pop("name")
    adata = wider[rng.permutation(N_OBS), rng.permutation(wider.n_vars)].copy()
    projected = tl.project(
        adata[~adata.obs_names.isin(reference.obs_names)].copy(), reference, copy=True
    )
    before = fingerprint(reference)
    tl.fit(adata, reference=reference)
    assert fingerprint(reference) == before
    assert_same_decoder(adata, reference)
    for slot in SLOTS:
        known = adata[reference.obs_names].obsm[slot]
        np.testing.assert_array_equal(known, reference.obsm[slot], err_msg=slot)
        new = adata[projected.obs_names].obsm[slot]
        np.testing.assert_array_equal(new, projected.obsm[slot], err_msg=slot)
    for name in ("scuvae_scale", "scuvae_split"):
        assert list(adata[reference.obs_names].obs[name]) == list(reference.obs[name])
    assert set(adata[projected.obs_names].obs["scuvae_split"]) == {"added"}
    note = adata.uns["scuvae"]["reference"]
    assert (note["n_known"], note["n_new"], note["fine_tuned"]) == (N_OLD, N_OBS - N_OLD, False)
    assert "genes" not in adata.uns["scuvae"]
    tl.score(adata)
    assert f"{N_OBS} cells" in str(get.fit(adata))


@pytest.mark.parametrize("kind", ["AnnData", ".h5ad", ".zarr", ".scuvae", "no values"])
def test_frozen_new_cells_alone_are_a_projection(
    kind: str, reference: AnnData, tmp_path: Path
) -> None:
    new = small_counts()[N_OLD:].copy()
    source: Any = reference
    if kind == "no values":
        source = AnnData(obs=reference.obs, obsm=dict(reference.obsm), uns=dict(reference.uns))
    elif kind != "AnnData":
        source = tmp_path / f"reference{kind}"
        if kind == ".scuvae":
            io.write_model(source, reference)
        else:
            getattr(reference, f"write_{kind[1:]}")(source)
    expected = tl.project(new, reference, copy=True)
    assert tl.fit(new, reference=source) is None
    assert_same_posterior(new, expected)
    np.testing.assert_array_equal(new.obsm["X_scuvae_embed"], expected.obsm["X_scuvae_embed"])
    assert_same_decoder(new, reference)


def test_frozen_new_batches_are_estimated(reference: AnnData) -> None:
    adata = small_counts()
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.obs.loc[adata.obs_names[N_OLD:], "batch"] = "b7"
    projected = tl.project(adata[N_OLD:].copy(), reference, new_batches="estimate", copy=True)
    tl.fit(adata, reference=reference)
    assert list(adata.uns["scuvae"]["params"]["batches"]) == ["b0", "b1", "b7"]
    assert_same_decoder(adata, projected)
    for slot in SLOTS:
        np.testing.assert_array_equal(adata.obsm[slot][:N_OLD], reference.obsm[slot])
        np.testing.assert_array_equal(adata.obsm[slot][N_OLD:], projected.obsm[slot])


def test_frozen_training_arguments_are_said_to_be_unused(
    reference: AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    new = small_counts()[N_OLD:].copy()
    with caplog.at_level(logging.WARNING, logger="scuvae"):
        tl.fit(new, reference=reference, max_epochs=3)
    assert any("max_epochs=" in text and "fine_tune" in text for text in caplog.messages)


# --- fine-tuned -----------------------------------------------------------------------------------


def test_fine_tuned_explains_held_out_cells_of_all_no_worse() -> None:
    # The new cells are of a kind that the reference has none of.
    adata = small_counts(n_obs=200)
    known = (adata.obs["cell_type"] == "up").to_numpy()
    reference = small_fit(adata[known].copy(), max_epochs=20)
    frozen = tl.fit(adata, reference=reference, copy=True)
    tuned = tl.fit(adata, reference=reference, fine_tune=True, batch_size=32, copy=True)
    held_out = (tuned.obs["scuvae_split"] == "validation").to_numpy()
    assert held_out[~known].sum() == 0.1 * (~known).sum() // 1
    # Those that the reference held out, and no others of its own.
    was = (reference.obs["scuvae_split"] == "validation").to_numpy()
    np.testing.assert_array_equal(held_out[known], was)
    for one in (frozen, tuned):
        tl.score(one)
    gain = (tuned.obs["scuvae_elbo"] - frozen.obs["scuvae_elbo"])[held_out]
    assert gain.mean() > 0
    assert gain[~known[held_out]].mean() > 1  # nats a cell


def test_fine_tuned_starts_from_what_there_is(reference: AnnData) -> None:
    adata = small_counts()
    growth = Growth(adata, reference, None, None, "cpu", {})
    order = torch.randperm(N_OBS, generator=torch.Generator().manual_seed(0))[:50]
    seen = []
    for index, q in growth._begin(growth.fit.model, order):
        seen += index.tolist()
        for row, mean, scale in zip(index.tolist(), q.mean, q.stddev, strict=True):
            if row < N_OLD:
                np.testing.assert_array_equal(mean, reference.obsm["X_scuvae"][row])
                np.testing.assert_allclose(scale, reference.obsm["X_scuvae_scale"][row], rtol=1e-4)
    assert sorted(seen) == sorted(order.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"amortized": True},
        {"amortized": "semi"},
        {"amortized": "distilled"},
        {"prior": "mixture"},
        {"likelihood": "gaussian"},
        {"optimizer": "rmsprop", "local_step": "gradient"},
        {"size_factor_key": "expected"},
        {"mask_var": "highly_variable"},
    ],
)
def test_every_kind_of_fit_can_grow(options: dict[str, Any]) -> None:
    adata = small_counts()
    distilled = options.get("amortized") == "distilled"
    if "likelihood" in options:
        adata.X = np.log1p(adata.X)
    reference = small_fit(adata[:N_OLD].copy(), **({} if distilled else options))
    if distilled:
        tl.to_encoder(reference, max_epochs=1)
    grown = tl.fit(adata, reference=reference, fine_tune=True, **SHORT, copy=True)
    params = grown.uns["scuvae"]["params"]
    for name in ("likelihood", "n_latent", "n_hidden", "optimizer", "covariance"):
        assert params[name] == reference.uns["scuvae"]["params"][name]
    assert list(grown.uns["scuvae"]["var_names"]) == list(reference.uns["scuvae"]["var_names"])
    # It is a fit as any: read back, scored.
    get.model(grown)
    tl.score(grown, n_samples=5)
    assert np.isfinite(grown.obs["scuvae_elbo"]).all()


def test_a_grown_fit_grows_on_and_added_cells_are_trained_on_then(reference: AnnData) -> None:
    adata = small_counts()
    tl.fit(adata, reference=reference)
    tl.fit(adata, reference=adata, fine_tune=True, validation_fraction=0.25, **SHORT)
    split = adata.obs["scuvae_split"]
    assert set(split) == {"train", "validation"}
    assert (split[N_OLD:] == "validation").sum() == 5
    assert list(split[:N_OLD]) == list(reference.obs["scuvae_split"])
    assert adata.uns["scuvae"]["reference"]["n_known"] == N_OBS


def test_fine_tuned_new_batches_are_batches_as_others(reference: AnnData) -> None:
    adata = small_counts()
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.obs.loc[adata.obs_names[N_OLD:], "batch"] = "b7"
    tl.fit(adata, reference=reference, fine_tune=True, **SHORT)
    params = adata.uns["scuvae"]["params"]
    assert list(params["batches"]) == ["b0", "b1", "b7"]
    assert "new_batches" not in params
    tl.denoise(adata, batch="b7")


def test_fine_tuned_the_same_from_a_file_and_by_names_alone(
    reference: AnnData, tmp_path: Path
) -> None:
    adata = small_counts()
    adata.X = sp.csr_matrix(adata.X)
    expected = tl.fit(adata, reference=reference, fine_tune=True, **SHORT, copy=True)
    reference.write_h5ad(tmp_path / "reference.h5ad")
    adata.write_h5ad(tmp_path / "all.h5ad")
    backed = anndata.read_h5ad(tmp_path / "all.h5ad", backed="r")
    tl.fit(backed, reference=tmp_path / "reference.h5ad", fine_tune=True, **SHORT)
    assert_same_posterior(backed, expected)
    again = tl.fit(adata[::-1].copy(), reference=reference, copy=True)
    frozen = tl.fit(adata, reference=reference, copy=True)
    np.testing.assert_array_equal(
        again[frozen.obs_names].obsm["X_scuvae"][:N_OLD], frozen.obsm["X_scuvae"][:N_OLD]
    )


def test_fine_tuned_from_a_checkpoint(
    reference: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = small_counts()
    options = {"reference": reference, "fine_tune": True, **SHORT}
    expected = tl.fit(adata, **options, copy=True)
    kept = {"checkpoint": tmp_path / "kept", "checkpoint_every": 0}
    with monkeypatch.context() as patch:
        calls = iter(range(4))

        def killed(*_: Any) -> None:
            if next(calls) == 3:
                raise MemoryError

        original = loop.Losses.add
        patch.setattr(loop.Losses, "add", lambda *a: (killed(), original(*a))[1])
        with left_alone(adata), pytest.raises(MemoryError):
            tl.fit(adata, **options, **kept)
    other = small_fit(adata[:N_OLD].copy(), batch_key="batch", rng=1)
    with pytest.raises(ValueError, match="reference"):
        tl.fit(adata, **{**options, "reference": other}, **kept)
    tl.fit(adata, **options, **kept)
    assert_same_posterior(adata, expected)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n_latent": 7}, r"n_latent=7, .* n_latent=3"),
        ({"likelihood": "poisson"}, r"likelihood='poisson', .*'negative_binomial'"),
        ({"amortized": True}, r"amortized=True, .*amortized=False"),
        ({"prior": "mixture"}, r"prior='mixture', .*prior="),
        ({"batch_key": "cell_type"}, r"batch_key='cell_type', .*batch_key='batch'"),
        ({"mask_var": "highly_variable"}, r"mask_var='highly_variable', .*mask_var=None"),
        ({"categorical_covariate_keys": ["cell_type"]}, r"categorical_covariate_keys="),
        ({"size_factor_key": "expected"}, r"size_factor_key='expected', .*None"),
        ({"kl_weight": 0.5}, r"kl_weight=0.5, .*1.0"),
        ({"fine_tune": "yes"}, "fine_tune"),
        ({"key": "other"}, "holds no fit"),
        ({"layer": "raw"}, "raw"),
    ],
)
def test_arguments_that_contradict_the_reference(
    arguments: dict[str, Any], text: str, reference: AnnData
) -> None:
    adata = small_counts()
    with (
        left_alone(adata),
        left_alone(reference),
        pytest.raises((ValueError, TypeError), match=text),
    ):
        tl.fit(adata, reference=reference, **arguments)


def test_arguments_that_agree_with_the_reference(reference: AnnData) -> None:
    same = {"n_latent": 3, "n_hidden": 8, "likelihood": "nb", "batch_key": "batch"}
    assert tl.fit(small_counts(), reference=reference, **same, copy=True).n_obs == N_OBS


def test_cells_and_genes_that_do_not_fit_the_reference(reference: AnnData) -> None:
    adata = small_counts()

    def refused(adata: AnnData, text: str, **arguments: Any) -> None:
        named = {"reference": reference, **arguments}
        with left_alone(adata), pytest.raises(ValueError, match=text):
            tl.fit(adata, **named)

    refused(adata[:, 3:].copy(), r"lack 3 of the reference's 40 genes .*'gene0'.*tl.project")
    refused(adata[:N_OLD].copy(), "none to add.*fine_tune=True")
    other = adata.copy()
    other.X[3, :5] += 1
    refused(other, r"1 cells have names .*'cell3'.*total")
    other = adata.copy()
    other.obs["batch"] = other.obs["batch"].cat.rename_categories({"b0": "b1", "b1": "b0"})
    refused(other, r"obs\['batch'\]")
    twice = adata.copy()
    twice.obs_names = ["cell0", *twice.obs_names[:-1]]
    refused(twice, "'cell0' twice")
    unknown = adata.copy()
    unknown.obs["batch"] = None
    refused(unknown, "missing")
    refused(AnnData(adata.X, obs=adata.obs), "share no gene")
    refused(adata, "holds no fit", reference=small_counts())
    refused(adata, r"fine_tune=True.*reference=", reference=None, fine_tune=True)
    refused(adata, r"key='k'.*key_added=", reference=None, key="k")
    panel = tl.project(adata[:N_OLD, 5:].copy(), reference, copy=True)
    refused(adata, r"do without 5 of the fit's genes", reference=panel)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("fine_tune", [False, True])
def test_from_the_command_line(fine_tune: bool, reference: AnnData, tmp_path: Path) -> None:
    adata = small_counts()
    reference.write_h5ad(tmp_path / "reference.h5ad")
    adata.write_h5ad(tmp_path / "all.h5ad")
    words = ["fit", str(tmp_path / "all.h5ad"), "-o", str(tmp_path / "out.h5ad"), "-q"]
    words += ["--reference", str(tmp_path / "reference.h5ad"), "--json", str(tmp_path / "j.json")]
    if fine_tune:
        words += ["--fine-tune", "--max-epochs", "3", "--batch-size", "32"]
    assert cli.main(words) == 0
    tl.fit(adata, reference=reference, fine_tune=fine_tune, **(SHORT if fine_tune else {}))
    assert_same_posterior(anndata.read_h5ad(tmp_path / "out.h5ad"), adata)


def test_the_command_line_never_writes_over_the_reference(
    reference: AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reference.h5ad"
    reference.write_h5ad(path)
    small_counts().write_h5ad(tmp_path / "all.h5ad")
    words = ["fit", str(tmp_path / "all.h5ad"), "-o", str(path), "--reference", str(path)]
    before = path.read_bytes()
    assert cli.main(words) == 1
    assert re.search("would overwrite", capsys.readouterr().err)
    assert path.read_bytes() == before
