"""Labels by likelihood: against scipy's densities and a small simulation whose labels are known."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import fingerprint, small_counts, small_data, small_fit, unchanged
from scipy import sparse as sp
from scipy import special, stats
from small_models import UNIQUE, batch_of, model_of

from scuvae import get, tl
from scuvae.inference.mapping.label_transfer import votes
from scuvae.inference.refinement import profile_likelihood as module
from scuvae.inference.refinement.profile_likelihood import profile_log_likelihood

pytestmark = pytest.mark.usefixtures("fixed_random_state")

# --- how well points explain cells --------------------------------------------------------------


@pytest.mark.parametrize("covariates", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", UNIQUE)
def test_affinities_are_scipys_log_densities(
    name: str, sparse: bool, missing: bool, covariates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 30)  # a few points at a time
    model = model_of(name, n_covariates=2 if covariates else 0)
    z = torch.randn(7, 2).double()
    kind = torch.arange(6) % 2
    one_hot = torch.eye(2).double()[kind] if covariates else None
    support = model.likelihood.support
    x = torch.poisson(torch.full((6, model.n_vars), 3.0)).double()
    if support == "real":
        x = x - 3
    if support == "binary":
        x = (x > 3).double()
    observed = torch.arange(model.n_vars) % 3 != 0 if missing else None
    seen = torch.ones(model.n_vars, dtype=torch.bool) if observed is None else observed
    given = torch.where(seen, x, 0.0)
    batch = batch_of(
        given, covariates=one_hot, observed=observed, sparse=sparse and support != "real"
    )
    found = profile_log_likelihood(model, batch, z).numpy()
    expected = np.empty((6, 7))
    for i in range(6):
        given_batch = None if one_hot is None else one_hot[i].expand(7, -1)
        eta = model.decoder(z, given_batch)[:, seen].detach().numpy()
        if support == "counts":
            share = special.softmax(eta, 1)
            values = x[i, seen].numpy()
            expected[i] = [stats.multinomial(values.sum(), p).logpmf(values) for p in share]
        elif support == "binary":
            p = special.expit(eta)
            expected[i] = stats.bernoulli(p).logpmf(x[i, seen].numpy()).sum(1)
        else:
            scale = model.likelihood.scale[seen].detach().numpy()
            expected[i] = stats.norm(eta, scale).logpdf(x[i, seen].numpy()).sum(1)
    # up to a term of the cell; float64 roundings
    found, expected = (a - a.mean(1, keepdims=True) for a in (found, expected))
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-9)


# --- votes --------------------------------------------------------------------------------------


def test_shares_are_bayes_rule_where_there_are_enough_voters() -> None:
    affinities = torch.randn(20, 50).double()
    found = votes(affinities, 5)
    np.testing.assert_allclose(found, special.softmax(affinities.numpy(), 1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_least", [2, 15, 50, 80])
def test_shares_are_evened_out_until_there_are(at_least: int, dtype: torch.dtype) -> None:
    affinities = (300 * torch.randn(20, 50)).to(dtype)
    found = votes(affinities, at_least).double()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)  # float32 sums of 50 shares
    effective = 1 / found.square().sum(1)
    # halvings end within 3e-8 of the power, which may be a thousandth; all are even for all 50
    np.testing.assert_allclose(effective, min(at_least, 50), rtol=1e-3)
    order = affinities.argsort(1)
    assert (found.gather(1, order).diff(dim=1) >= 0).all()


# --- the verb -----------------------------------------------------------------------------------


def by_hand(adata: AnnData, reference: AnnData, genes: Any, n_neighbors: int) -> np.ndarray:
    """Shares of the labels "down" and "up", by scipy and a search for each cell's power."""
    model = get.model(reference)
    z = torch.tensor(reference.obsm["X_scuvae"])
    places = reference.var_names.get_indexer(genes)
    with torch.no_grad():
        share = special.softmax(model.decoder(z).double().numpy()[:, places], 1)
    x = adata[:, genes].X
    x = (x.toarray() if sp.issparse(x) else x).astype(float)
    log_p = x @ np.log(share).T
    codes = reference.obs["cell_type"].cat.codes.to_numpy()
    out = np.empty((len(x), 2))
    for i, row in enumerate(log_p):
        power = 1.0
        if 1 / np.square(special.softmax(row)).sum() < n_neighbors:
            powers = np.exp(np.linspace(-12, 0, 200_001))
            low, high = 0, len(powers) - 1
            while high - low > 1:
                middle = (low + high) // 2
                enough = 1 / np.square(special.softmax(powers[middle] * row)).sum() >= n_neighbors
                low, high = (middle, high) if enough else (low, middle)
            power = powers[low]
        weight = special.softmax(power * row)
        out[i] = [weight[codes == code].sum() for code in (0, 1)]
    return out


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_labels_are_those_by_hand(sparse: bool, missing: bool) -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    adata = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    genes = adata.var_names[:25] if missing else adata.var_names
    given = adata[:, genes].copy() if missing else adata
    with unchanged(reference):
        tl.transfer_labels(given, reference, n_neighbors=5)
    shares = by_hand(adata, reference, genes, 5)
    assert given.obs["scuvae_label"].cat.categories.tolist() == ["down", "up"]
    clear = np.abs(shares[:, 0] - shares[:, 1]) > 1e-3  # else roundings decide
    assert clear.mean() > 0.9
    assert (given.obs["scuvae_label"].cat.codes.to_numpy() == shares.argmax(1))[clear].all()
    # steps of the power of 6e-5, and float32's roundings of log p
    np.testing.assert_allclose(given.obs["scuvae_label_share"], shares.max(1), atol=1e-3)


def test_clear_types_are_found_with_a_quarter_of_the_genes() -> None:
    rng = np.random.default_rng(0)
    kind = np.arange(120) % 3
    profiles = np.exp(rng.normal(size=(3, 40)))
    x = rng.poisson(200 * profiles[kind] / profiles.sum(1)[kind, None]).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["a", "b", "c"])[kind])})
    adata = AnnData(x, obs=obs.set_index(np.arange(120).astype(str)))
    old, new = adata[:90].copy(), adata[90:, ::4].copy()
    tl.fit(old, n_latent=3, max_epochs=60, validation_fraction=0, progress=False)
    tl.transfer_labels(new, old, labels="kind")
    assert (new.obs["scuvae_label"].astype(str) == new.obs["kind"].astype(str)).all()


def test_a_cell_is_labelled_by_itself() -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    tl.transfer_labels(adata, reference)
    few = small_counts(seed=3)[[7, 3, 21]].copy()
    tl.transfer_labels(few, reference)
    assert few.obs["scuvae_label"].tolist() == adata.obs["scuvae_label"].iloc[[7, 3, 21]].tolist()
    np.testing.assert_allclose(
        few.obs["scuvae_label_share"],
        adata.obs["scuvae_label_share"].iloc[[7, 3, 21]],
        atol=1e-4,  # products round otherwise in other batches
    )


def test_cells_without_a_label_have_no_vote_and_their_categories_none() -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    kept = reference.obs["cell_type"].astype(object)
    kept[kept == "up"] = None
    reference.obs["cell_type"] = pd.Categorical(kept, categories=["up", "down", "never"])
    tl.transfer_labels(adata, reference)
    assert (adata.obs["scuvae_label"] == "down").all()
    assert adata.obs["scuvae_label"].cat.categories.tolist() == ["down"]
    np.testing.assert_allclose(adata.obs["scuvae_label_share"], 1, atol=1e-5)


def test_empty_cells_warn_and_get_the_most_common_label() -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    adata.X[4] = 0
    match = "1 cells have no counts.*most common label"
    with pytest.warns(UserWarning, match=match) as warned:
        tl.transfer_labels(adata, reference)
    assert warned[0].filename == __file__
    common = reference.obs["cell_type"].value_counts(normalize=True)
    assert adata.obs["scuvae_label"].iloc[4] == common.index[0]
    assert adata.obs["scuvae_label_share"].iloc[4] == pytest.approx(common.iloc[0], rel=1e-5)


def test_of_many_reference_cells_some_vote() -> None:
    reference = small_fit(small_counts())
    found = []
    for rng in (0, 0, 1):
        adata = small_counts(seed=3)
        tl.transfer_labels(adata, reference, n_reference=20, n_neighbors=1, rng=rng)
        found.append(adata.obs["scuvae_label_share"].to_numpy())
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_genes_that_a_projection_left_out_are_left_out() -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    genes = adata.var_names[::3]
    tl.project(adata, reference, genes=genes)
    tl.transfer_labels(adata, reference)
    truth = small_counts(seed=3)[:, genes].copy()
    tl.transfer_labels(truth, reference)
    shares = [a.obs["scuvae_label_share"] for a in (adata, truth)]
    np.testing.assert_allclose(*shares, atol=1e-4)  # roundings
    tl.transfer_labels(adata, reference, key_added="all")
    assert (adata.obs["all_label_share"] - shares[1]).abs().max() > 1e-2


def test_slots_survive_a_file_and_go_with_a_refit(tmp_path: Path) -> None:
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    reference.write_h5ad(tmp_path / "reference.h5ad")
    tl.transfer_labels(adata, tmp_path / "reference.h5ad")
    adata.write_h5ad(tmp_path / "new.h5ad")
    back = ad.read_h5ad(tmp_path / "new.h5ad")
    for name in ("scuvae_label", "scuvae_label_share"):
        assert fingerprint(back.obs[name]) == fingerprint(adata.obs[name])
    tl.project(adata, reference)
    assert not [name for name in adata.obs if name.startswith("scuvae_label")]


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson"])
def test_other_likelihoods_and_batches(likelihood: str) -> None:
    cells = small_data(likelihood, n_obs=160)
    reference, adata = cells[:100].copy(), cells[100:].copy()
    small_fit(reference, likelihood=likelihood, batch_key="batch", max_epochs=30)
    tl.transfer_labels(adata, reference)
    assert ((adata.obs["scuvae_label_share"] > 0.5) & adata.obs["scuvae_label"].notna()).all()
    assert (adata.obs["scuvae_label"] == adata.obs["cell_type"]).mean() > 0.8


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": ({"labels": "celltype"}, "'celltype' is no column.*'cell_type'"),
    "a measurement": ({"labels": "expected"}, "'expected'.*measurement.*astype"),
    "no labels": ({"labels": "nothing"}, "'nothing'.*has no label"),
    "another fit": ({"key": "other"}, "other"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be(case: str) -> None:
    arguments, message = BAD[case]
    reference, adata = small_fit(small_counts()), small_counts(seed=3)
    reference.obs["nothing"] = pd.Categorical([None] * reference.n_obs, categories=["a"])
    with unchanged(reference), unchanged(adata), pytest.raises(ValueError, match=message):
        tl.transfer_labels(adata, reference, **arguments)
