"""tl.fit against its contract, for every likelihood and inference scheme."""

import logging
import random
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import helpers
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData, ImplicitModificationWarning
from helpers import (
    LIKELIHOOD_NAMES,
    N_LATENT,
    N_OBS,
    N_VARS,
    SCHEMES,
    SMALL,
    assert_same_posterior,
    fingerprint,
    posterior_of,
    random_states,
    small_counts,
    small_data,
    small_fit,
    unchanged,
    unsealed,
)
from scipy import sparse as sp

from scuvae import get, tl
from scuvae.inference.posteriors import POSTERIORS
from scuvae.inference.training.settings import INFERENCE
from scuvae.model.likelihoods import LIKELIHOODS

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOOD_NAMES)
every_scheme = pytest.mark.parametrize("amortized", SCHEMES)

NAMES = {
    None: {"X": "X_scuvae", "uns": "scuvae"},
    "k": {"X": "k", "uns": "k"},
}
# The same sums in another order; three epochs of training amplify float32's rounding little.
REORDERED = 1e-3
# Enough for the loss to fall well beyond the noise of its draws.
EPOCHS = 20


@cache
def _fitted(likelihood: str, amortized: bool | str, key_added: str | None) -> AnnData:
    adata = small_data(likelihood)
    epochs = EPOCHS if key_added is None else 2
    return small_fit(
        adata, likelihood=likelihood, amortized=amortized, key_added=key_added, max_epochs=epochs
    )


def fitted(likelihood: str, amortized: bool | str, key_added: str | None = None) -> AnnData:
    return _fitted(likelihood, amortized, key_added).copy()


def keys_by_slot(adata: AnnData) -> dict[str, set[str]]:
    slots = ("obs", "var", "uns", "obsm", "varm", "layers", "obsp", "varp")
    return {slot: set(getattr(adata, slot).keys()) for slot in slots}


# --- slots --------------------------------------------------------------------------------------


def test_every_registered_scheme_has_an_argument() -> None:
    assert set(INFERENCE.values()) == set(POSTERIORS)
    assert {kind.name for kind in LIKELIHOODS.values()} <= set(LIKELIHOODS)


@pytest.mark.parametrize("key_added", [None, "k"])
@every_scheme
@every_likelihood
def test_slots_are_those_of_the_contract(
    likelihood: str, amortized: bool | str, key_added: str | None
) -> None:
    before = small_data(likelihood)
    adata = fitted(likelihood, amortized, key_added)
    x, uns = NAMES[key_added]["X"], NAMES[key_added]["uns"]
    full = amortized is not True  # local steps are natural by default

    expected = keys_by_slot(before)
    expected["obsm"] |= {x, f"{x}_scale", f"{x}_embed"} | ({f"{x}_covariance"} if full else set())
    expected["uns"] |= {uns}
    expected["obs"] |= {f"{uns}_split", f"{uns}_scale"}
    assert keys_by_slot(adata) == expected
    assert fingerprint(adata.X) == fingerprint(before.X)

    widths = {x: N_LATENT, f"{x}_scale": N_LATENT, f"{x}_covariance": N_LATENT * (N_LATENT + 1) / 2}
    widths[f"{x}_embed"] = min(15, before.n_obs, before.n_vars)
    for name, values in adata.obsm.items():
        assert type(values) is np.ndarray
        assert values.dtype == np.float32
        assert values.shape == (N_OBS, widths[name])
        assert np.isfinite(values).all()
    assert (adata.obsm[f"{x}_scale"] > 0).all()

    split = adata.obs[f"{uns}_split"]
    assert list(split.cat.categories) == ["train", "validation"]
    assert (split == "validation").sum() == N_OBS // 10
    own = {"params", "history", "var_names", "state", "embed", "latent", "manifest"}
    assert set(adata.uns[uns]) == own


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@every_scheme
def test_the_covariance_slot_is_the_lower_triangle(amortized: bool | str, covariance: str) -> None:
    adata = small_fit(small_counts(), amortized=amortized, covariance=covariance)
    assert ("X_scuvae_covariance" in adata.obsm) == (covariance == "full")
    q = get.posterior(adata)
    np.testing.assert_array_equal(q.mean.numpy(), adata.obsm["X_scuvae"])
    np.testing.assert_allclose(  # the scales pass through a Cholesky factor in float64
        q.stddev.numpy(), adata.obsm["X_scuvae_scale"], rtol=1e-5
    )
    if covariance == "full":
        matrix = q.covariance_matrix.numpy()
        i, j = np.tril_indices(N_LATENT)  # row-major, as the contract says
        np.testing.assert_allclose(  # as above
            matrix[:, i, j], adata.obsm["X_scuvae_covariance"], rtol=1e-5, atol=1e-6
        )
        off_diagonal = adata.obsm["X_scuvae_covariance"][:, i != j]
        assert np.abs(off_diagonal).max() > 1e-4  # a full covariance that says something


@every_scheme
@every_likelihood
def test_history(likelihood: str, amortized: bool | str) -> None:
    history = fitted(likelihood, amortized).uns["scuvae"]["history"]
    columns = ["loss", "elbo", "reconstruction", "kl", "validation_elbo"]
    assert list(history) == columns
    assert (history.dtypes == np.float64).all()
    assert history.index.name == "epoch"
    assert history.index.tolist() == list(range(len(history)))
    assert np.isfinite(history[columns[:-1]]).all(axis=None)
    assert np.isfinite(history["validation_elbo"].iloc[-1])
    np.testing.assert_allclose(  # float64 sums of the same terms
        history["elbo"], history["reconstruction"] - history["kl"], rtol=1e-12
    )
    np.testing.assert_allclose(history["loss"], -history["elbo"], rtol=1e-12)  # KL weight 1
    loss = history["loss"].to_numpy()
    # A nat a cell is far beyond the noise of a draw; 40 bits hold about 17, and start near that.
    least = 0.1 if LIKELIHOODS[likelihood].support == "binary" else 1
    assert loss[-3:].mean() < loss[0] - least


def test_the_loss_weighs_the_kl() -> None:
    history = small_fit(small_counts(), kl_weight=0.25).uns["scuvae"]["history"]
    np.testing.assert_allclose(  # float64 sums of the same terms
        history["loss"], 0.25 * history["kl"] - history["reconstruction"], rtol=1e-12
    )


@every_scheme
@every_likelihood
def test_params_and_state(likelihood: str, amortized: bool | str) -> None:
    adata = fitted(likelihood, amortized)
    entry = adata.uns["scuvae"]
    params = entry["params"]
    resolved = {
        "amortized": amortized,
        "likelihood": likelihood,
        "n_latent": N_LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "covariance": "diagonal" if amortized is True else "full",
        "validation_fraction": 0.1,
        "max_epochs": EPOCHS,
        "batch_size": 32,
        "optimizer": "adam",
        "local_step": "natural",
        "n_samples": 1,
        "kl_weight": 1.0,
        "early_stopping": True,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "rng": 0,
    }
    assert {name: params[name] for name in resolved} == resolved
    assert params["learning_rate"] > 0
    assert {"version", "torch_version", "anndata_version"} <= set(params)
    assert entry["var_names"].tolist() == adata.var_names.tolist()

    state = entry["state"]
    assert set(state) == {"decoder", "likelihood"} | (set() if amortized is False else {"encoder"})
    # What is hidden, and z beside it.
    assert state["decoder"]["layers.1.weight"].shape == (N_VARS, 8 + N_LATENT)
    for part in state.values():
        assert all(np.isfinite(array).all() for array in part.values())
    model = get.model(adata)
    assert model.likelihood.name == likelihood
    assert (model.encoder is None) == (amortized is False)


@every_scheme
@every_likelihood
def test_only_plain_things_go_into_uns(likelihood: str, amortized: bool | str) -> None:
    adata = small_data(likelihood)
    small_fit(adata, likelihood=likelihood, amortized=amortized, batch_key="batch")
    frames = []

    def check(value: Any) -> None:
        if type(value) is dict:
            assert all(type(name) is str for name in value)
            for item in value.values():
                check(item)
        elif isinstance(value, pd.DataFrame):
            frames.append(value)
        elif type(value) is np.ndarray:
            strings = value.dtype == object and all(type(item) is str for item in value.ravel())
            assert value.dtype.kind in "fiub" or strings
        else:
            assert type(value) in (str, int, float, bool)

    check(adata.uns["scuvae"])
    assert len(frames) == 1


@every_likelihood
def test_an_instance_is_as_good_as_a_name(likelihood: str) -> None:
    by_name = small_fit(small_data(likelihood), likelihood=likelihood)
    instance = LIKELIHOODS[likelihood](N_VARS)
    initial = {name: value.clone() for name, value in instance.state_dict().items()}
    by_instance = small_fit(small_data(likelihood), likelihood=instance)
    assert fingerprint(by_name) == fingerprint(by_instance)
    for name, value in instance.state_dict().items():
        assert torch.equal(value, initial[name])  # the caller's own is not trained


@pytest.mark.parametrize("alias", [name for name in LIKELIHOODS if name not in LIKELIHOOD_NAMES])
def test_an_alias_is_recorded_under_the_full_name(alias: str) -> None:
    adata = small_fit(small_data(LIKELIHOODS[alias].name), likelihood=alias)
    assert adata.uns["scuvae"]["params"]["likelihood"] == LIKELIHOODS[alias].name


@pytest.mark.parametrize(
    ("values", "chosen"), [("counts", "negative_binomial"), ("logs", "gaussian")]
)
def test_auto_likelihood_is_logged_and_recorded(
    values: str, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    adata = small_counts() if values == "counts" else small_data("gaussian")
    with caplog.at_level(logging.INFO, logger="scuvae"):
        small_fit(adata, likelihood="auto")
    assert adata.uns["scuvae"]["params"]["likelihood"] == chosen
    assert any(f"using {chosen}" in message for message in caplog.messages)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    small_fit(small_counts())
    assert capfd.readouterr() == ("", "")


# --- containers ---------------------------------------------------------------------------------


def strided(x: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), x.dtype)
    wide[::2, ::3] = x
    return wide[::2, ::3]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def unsorted(x: np.ndarray) -> sp.csr_matrix:
    """Column indices of every row in falling order, and a stored zero."""
    out = sp.csr_matrix(x)
    for start, end in zip(out.indptr[:-1], out.indptr[1:], strict=True):
        out.indices[start:end] = out.indices[start:end][::-1].copy()
        out.data[start:end] = out.data[start:end][::-1].copy()
    out.has_sorted_indices = False
    return out


def duplicated(x: np.ndarray) -> sp.csr_matrix:
    """The first nonzero of the first row in two halves; scipy sums them."""
    row, column = np.nonzero(x)
    value = x[row, column]
    data = np.concatenate([[value[0] - 1], value[1:], [1]]).astype(x.dtype)
    order = np.argsort(np.append(row, row[0]), kind="stable")
    indices, rows = np.append(column, column[0])[order], np.append(row, row[0])[order]
    indptr = np.searchsorted(rows, np.arange(x.shape[0] + 1))
    return sp.csr_matrix((data[order], indices, indptr), shape=x.shape)


CONTAINERS: dict[str, Callable[[np.ndarray], Any]] = {
    "fortran": np.asfortranarray,
    "strided": strided,
    "read-only": read_only,
    "int64": lambda x: x.astype(np.int64),
    "uint16": lambda x: x.astype(np.uint16),
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "csr_array int64": lambda x: sp.csr_array(x.astype(np.int64)),
    "csr_matrix uint16": lambda x: sp.csr_matrix(x.astype(np.uint16)),
    "unsorted": unsorted,
    "duplicated": duplicated,
}


@pytest.fixture(scope="module")
def reference() -> AnnData:
    return small_fit(small_counts())


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_posterior(container: str, reference: AnnData) -> None:
    x = CONTAINERS[container](small_counts().X)
    adata = AnnData(x, obs=small_counts().obs, var=small_counts().var)
    before = fingerprint(adata.X)
    small_fit(adata)
    assert fingerprint(adata.X) == before
    sparse = sp.issparse(x)
    assert_same_posterior(adata, reference, atol=REORDERED if sparse else 0.0)


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
@every_likelihood
def test_boolean_values(likelihood: str, container: Callable[[Any], Any]) -> None:
    present = small_counts().X > 3
    numbers = small_fit(AnnData(present.astype(np.float32)), likelihood=likelihood)
    booleans = small_fit(AnnData(container(present)), likelihood=likelihood)
    # Sums in another order under a whole training run of a wide-posterior model.
    assert_same_posterior(booleans, numbers, atol=1e-3)


def test_memory_mapped(tmp_path: Path, reference: AnnData) -> None:
    np.save(tmp_path / "x.npy", small_counts().X)
    adata = AnnData(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert_same_posterior(small_fit(adata), reference)


def test_view(reference: AnnData) -> None:
    parent = ad.concat([small_counts(), small_counts(seed=1)], merge="same", index_unique="-")
    before = fingerprint(parent)
    view = parent[:N_OBS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_fit(view)
    assert [w.category for w in caught] == [ImplicitModificationWarning]
    assert_same_posterior(view, reference)
    assert fingerprint(parent) == before


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_backed(
    tmp_path: Path, reference: AnnData, container: Callable[[Any], Any], mode: str
) -> None:
    path = tmp_path / "in.h5ad"
    adata = small_counts()
    adata.X = container(adata.X)
    adata.write_h5ad(path)
    content = path.read_bytes()
    for copy in (False, True):
        backed = ad.read_h5ad(path, backed=mode)
        result = tl.fit(backed, **SMALL, copy=copy)
        assert_same_posterior(result if copy else backed, reference, atol=REORDERED)
        assert ("X_scuvae" in backed.obsm) != copy
        backed.file.close()
        assert path.read_bytes() == content


# --- where the values and the genes come from ---------------------------------------------------


def test_layer(reference: AnnData) -> None:
    adata = small_counts()
    adata.layers["counts"], adata.X = adata.X, np.log1p(adata.X)
    small_fit(adata, layer="counts")
    assert_same_posterior(adata, reference)
    assert adata.uns["scuvae"]["params"]["layer"] == "counts"

    adata.X = None
    assert_same_posterior(small_fit(adata, layer="counts"), reference)


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix, sp.csc_array])
@pytest.mark.parametrize("how", ["name", "array", "series"])
def test_mask_var_is_the_fit_of_these_genes(how: str, container: Callable[[Any], Any]) -> None:
    adata = small_counts()
    adata.X = container(adata.X)
    mask = adata.var["highly_variable"]
    subset = small_fit(adata[:, mask].copy())
    small_fit(
        adata,
        mask_var={"name": "highly_variable", "array": mask.to_numpy(), "series": mask}[how],
    )
    assert_same_posterior(adata, subset)
    assert adata.uns["scuvae"]["var_names"].tolist() == adata.var_names[mask].tolist()
    assert ("mask_var" in adata.uns["scuvae"]["params"]) == (how == "name")


@pytest.mark.parametrize("kind", ["categorical", "string", "integer", "boolean", "float"])
@every_scheme
def test_batch_key(amortized: bool | str, kind: str) -> None:
    adata = small_counts()
    second = (adata.obs["batch"] == "b1").to_numpy()
    columns = {
        "categorical": pd.Categorical(np.where(second, "y", "x"), categories=["z", "y", "x"]),
        "string": np.where(second, "y", "x"),
        "integer": second.astype(int),
        "boolean": second,
        "float": second.astype(float),
    }
    adata.obs["batch"] = columns[kind]
    small_fit(adata, amortized=amortized, batch_key="batch")
    names = {"categorical": ["x", "y"], "string": ["x", "y"], "integer": ["0", "1"]}
    names |= {"boolean": ["False", "True"], "float": ["0.0", "1.0"]}
    assert adata.uns["scuvae"]["params"]["batches"].tolist() == names[kind]
    offset = adata.uns["scuvae"]["state"]["decoder"]["offset.weight"]
    assert offset.shape == (8, 2)  # an unused category has no column

    # The labels alone decide, not how they are stored.
    reference = small_counts()
    reference.obs["batch"] = np.where(second, "b", "a")
    small_fit(reference, amortized=amortized, batch_key="batch")
    assert_same_posterior(adata, reference)


def test_a_batch_shifts_the_decoder() -> None:
    adata = small_counts()
    adata.X[(adata.obs["batch"] == "b1").to_numpy(), : N_VARS // 2] *= 5
    # A KL weight that leaves nothing to z: the batch alone can tell the cells apart.
    small_fit(adata, batch_key="batch", max_epochs=60, learning_rate=0.02, kl_weight=100.0)
    decoder = get.model(adata).decoder
    with torch.no_grad():
        share = decoder(torch.zeros(2, N_LATENT), torch.eye(2)).softmax(-1)
    first, second = share[:, : N_VARS // 2].sum(1).tolist()
    counted = [
        adata.X[adata.obs["batch"] == name][:, : N_VARS // 2].sum()
        / adata.X[adata.obs["batch"] == name].sum()
        for name in ("b0", "b1")
    ]
    assert counted[1] > counted[0] + 0.2
    assert second > first + 0.1
    # The shares of 60 epochs are on their way from the initial half and half.
    np.testing.assert_allclose([first, second], counted, atol=0.15)


def test_size_factor_key() -> None:
    adata = small_counts()
    totals = small_fit(adata.copy(), likelihood="poisson")
    adata.obs["total"] = adata.X.sum(1)
    same = small_fit(adata.copy(), likelihood="poisson", size_factor_key="total")
    assert_same_posterior(same, totals)
    adata.obs["total"] *= 10
    other = small_fit(adata.copy(), likelihood="poisson", size_factor_key="total")
    # Σμ = 10 ℓ in place of ℓ costs a Poisson cell 9 ℓ − x ln 10 = 6.7 ℓ nats.
    train = adata[totals.obs["scuvae_split"] == "train"]
    cost = (9 - np.log(10)) * train.X.sum(1).mean()
    first, tenfold = (fit.uns["scuvae"]["history"]["loss"].iloc[0] for fit in (totals, other))
    np.testing.assert_allclose(tenfold - first, cost, rtol=0.05)  # an epoch's own way down


@every_scheme
def test_copy(amortized: bool | str) -> None:
    adata = small_counts()
    with unchanged(adata):
        result = tl.fit(adata, amortized=amortized, copy=True, **SMALL)
    assert tl.fit(adata, amortized=amortized, **SMALL) is None
    assert fingerprint(result) == fingerprint(adata)


# --- shapes -------------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_one_cell(likelihood: str, amortized: bool | str) -> None:
    adata = small_data(likelihood, n_obs=1)
    small_fit(adata, likelihood=likelihood, amortized=amortized)
    assert np.isfinite(adata.obsm["X_scuvae"]).all()
    assert adata.obs["scuvae_split"].tolist() == ["train"]


@every_scheme
@every_likelihood
def test_one_gene(likelihood: str, amortized: bool | str) -> None:
    adata = small_data(likelihood, n_vars=1)
    if LIKELIHOODS[likelihood].support != "binary":
        adata.X += 1  # no empty cells
    small_fit(adata, likelihood=likelihood, amortized=amortized, n_latent=1)
    for values in posterior_of(adata).values():
        assert values.shape == (N_OBS, 1)
        assert np.isfinite(values).all()
    assert torch.isfinite(get.posterior(adata).stddev).all()


@pytest.mark.parametrize("batch_size", [N_OBS - N_OBS // 10 - 1, 1, N_OBS * 10])
@every_scheme
def test_last_batch_of_one_and_batches_beyond_the_cells(
    amortized: bool | str, batch_size: int
) -> None:
    adata = small_fit(small_counts(), amortized=amortized, batch_size=batch_size, max_epochs=1)
    assert all(np.isfinite(values).all() for values in posterior_of(adata).values())


@pytest.mark.parametrize("n_layers", [0, 1, 3])
@every_scheme
def test_depths(amortized: bool | str, n_layers: int) -> None:
    adata = small_fit(small_counts(), amortized=amortized, n_layers=n_layers)
    assert len(get.model(adata).decoder.layers) == n_layers + 1
    assert all(np.isfinite(values).all() for values in posterior_of(adata).values())


def test_as_many_latent_dimensions_as_genes_warns() -> None:
    with pytest.warns(UserWarning, match=r"n_latent=4 .* the 4 genes") as caught:
        adata = small_fit(small_counts(n_vars=4), n_latent=4)
    assert [w.filename for w in caught] == [helpers.__file__]  # the caller's line
    assert np.isfinite(adata.obsm["X_scuvae"]).all()


@every_scheme
@pytest.mark.parametrize(
    "likelihood", [n for n in LIKELIHOOD_NAMES if LIKELIHOODS[n].support == "counts"]
)
def test_an_empty_cell_warns_and_has_the_prior(likelihood: str, amortized: bool | str) -> None:
    adata = small_counts()
    adata.X[7] = 0
    with pytest.warns(UserWarning, match="1 cells have no counts") as caught:
        small_fit(adata, likelihood=likelihood, amortized=amortized)
    assert [w.filename for w in caught] == [helpers.__file__]  # the caller's line
    # Its likelihood is flat: the best q is N(0, I), to the float32 of a few local steps.
    np.testing.assert_allclose(adata.obsm["X_scuvae"][7], 0, atol=1e-3)
    np.testing.assert_allclose(adata.obsm["X_scuvae_scale"][7], 1, atol=1e-3)
    assert all(np.isfinite(values).all() for values in posterior_of(adata).values())


@every_scheme
@every_likelihood
def test_an_all_zero_gene(likelihood: str, amortized: bool | str) -> None:
    adata = small_data(likelihood)
    adata.X[:, 5] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_fit(adata, likelihood=likelihood, amortized=amortized)
    assert all(np.isfinite(values).all() for values in posterior_of(adata).values())


def test_duplicate_cell_names() -> None:
    with pytest.warns(UserWarning, match="Observation names are not unique"):
        adata = AnnData(small_counts().X, obs=pd.DataFrame(index=["cell"] * N_OBS))
    assert_same_posterior(small_fit(adata), small_fit(small_counts()))


def test_no_held_out_cells_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="scuvae"):
        adata = small_fit(small_counts(), validation_fraction=0.0)
    assert any("early stopping is off" in message for message in caplog.messages)
    assert (adata.obs["scuvae_split"] == "train").all()
    assert adata.uns["scuvae"]["history"]["validation_elbo"].isna().all()


# --- determinism --------------------------------------------------------------------------------


@every_scheme
@every_likelihood
def test_the_same_seed_writes_the_same_bytes(likelihood: str, amortized: bool | str) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        states = random_states()
        adata = small_fit(small_data(likelihood), likelihood=likelihood, amortized=amortized)
        assert random_states() == states
        runs.append(fingerprint(adata))
    assert runs[0] == runs[1]

    other = small_fit(small_data(likelihood), likelihood=likelihood, amortized=amortized, rng=1)
    assert fingerprint(other.obsm) != runs[0]["obsm"]


def test_every_seed_holds_out_the_same_cells() -> None:
    """Maps of two seeds then differ by training alone, and validation ELBOs can be compared."""
    one, other = (
        small_fit(small_data("negative_binomial"), rng=seed, max_epochs=1) for seed in (0, 1)
    )
    assert list(one.obs["scuvae_split"]) == list(other.obs["scuvae_split"])
    assert not np.allclose(one.obsm["X_scuvae"], other.obsm["X_scuvae"])
    # Not the first or the last: cells are often in the order of their samples.
    held_out = np.flatnonzero(one.obs["scuvae_split"] == "validation")
    assert (np.diff(held_out) > 1).any()


def test_rng_takes_a_generator_or_none() -> None:
    runs = [small_fit(small_counts(), rng=np.random.default_rng(3)) for _ in range(2)]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    assert "rng" not in runs[0].uns["scuvae"]["params"]
    states = random_states()
    unseeded = [small_fit(small_counts(), rng=None) for _ in range(2)]
    assert random_states() == states
    assert fingerprint(unseeded[0].obsm) != fingerprint(unseeded[1].obsm)


def test_random_state_is_an_alias() -> None:
    by_rng = small_fit(small_counts(), rng=4)
    by_alias = small_fit(small_counts(), random_state=4)
    assert fingerprint(by_rng) == fingerprint(by_alias)


# --- a second fit, and what follows ---------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "k"])
def test_a_second_fit_replaces_all_of_the_first(key: str | None) -> None:
    options = {"amortized": True, "covariance": "diagonal", "key_added": key}
    fresh = small_fit(small_counts(), **options)
    adata = small_fit(small_counts(), amortized="semi", batch_key="batch", key_added=key)
    tl.score(adata, key=key, n_samples=2)
    tl.amortization_gap(adata, key=key, max_steps=1)
    tl.denoise(adata, key=key, n_samples=0)
    small_fit(adata, **options)
    assert fingerprint(adata) == fingerprint(fresh)


def test_fits_under_two_names_do_not_meet() -> None:
    adata = small_fit(small_counts())
    first = fingerprint(adata)
    small_fit(adata, amortized=True, key_added="k")
    for slot in ("obsm", "uns", "obs"):
        now = fingerprint(adata)[slot]
        before = first[slot]
        if slot == "obs":
            now, before = (dict(zip(t["order"], t["columns"], strict=True)) for t in (now, before))
        assert {name: now[name] for name in before} == before


def test_scanpy_goes_on() -> None:
    """A UMAP, for which umap compiles for a minute, is drawn from the README's lines."""
    adata = fitted("negative_binomial", SCHEMES[0])
    sc.pp.neighbors(adata, use_rep="X_scuvae", n_neighbors=10, method="gauss")
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    assert adata.obs["leiden"].nunique() > 1
    for slot in ("X_scuvae", "X_scuvae_embed"):  # what compiled searches for neighbours ask
        assert adata.obsm[slot].dtype == np.float32
        assert adata.obsm[slot].flags.c_contiguous


@pytest.mark.slow
def test_scanpy_goes_on_by_the_path_of_many_cells() -> None:
    """Above 8,192 cells scanpy takes its neighbours from pynndescent, which compiles long."""
    adata = fitted("negative_binomial", SCHEMES[0])
    sc.pp.neighbors(adata, use_rep="X_scuvae", n_neighbors=10, transformer="pynndescent")
    assert (np.diff(adata.obsp["distances"].indptr) > 0).all()


def test_fits_of_before_the_linear_path_are_read_as_they_were() -> None:
    adata = small_fit(small_counts(), optimizer="rmsprop")
    assert adata.uns["scuvae"]["params"]["linear_path"] is False
    z = torch.randn(3, N_LATENT)
    expected = get.model(adata).decoder(z)
    del unsealed(adata)["params"]["linear_path"]  # as files of then have it
    torch.testing.assert_close(get.model(adata).decoder(z), expected, rtol=0, atol=0)
