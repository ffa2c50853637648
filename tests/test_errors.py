"""Wrong input: the error names slot, value and remedy, and nothing is touched."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import (
    LIKELIHOOD_NAMES,
    N_OBS,
    N_VARS,
    SCHEMES,
    SMALL,
    TABLES,
    WITH_REFERENCE,
    fingerprint,
    small_counts,
    small_fit,
    unchanged,
    verb_of,
)
from helpers import VERBS as ANY_FIT
from scipy import sparse as sp

from scuvae import get, tl
from scuvae.inference.training.loop import TrainingError
from scuvae.io.inputs import read_matrix
from scuvae.model.likelihoods import LIKELIHOODS
from scuvae.model.likelihoods.negative_binomial import NegativeBinomial

COUNTS = [name for name in LIKELIHOOD_NAMES if LIKELIHOODS[name].support == "counts"]


@cache
def _fitted(amortized: bool | str) -> AnnData:
    return small_fit(small_counts(), amortized=amortized, batch_key="batch", max_epochs=2)


def fitted(amortized: bool | str = True) -> AnnData:
    return _fitted(amortized).copy()


def fails(
    call: Callable[[], object], kind: type[Exception], parts: list[str], *values: Any
) -> Exception:
    """The call raises exactly ``kind``, says every part, and leaves the values as they were."""
    with unchanged(*values), pytest.raises(kind) as caught:
        call()
    assert caught.type is kind
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return caught.value


# --- values -------------------------------------------------------------------------------------


def with_value(value: float, container: Callable[[Any], Any] = np.asarray) -> AnnData:
    adata = small_counts()
    adata.X[3, 7] = adata.X[5, 2] = value
    adata.X = container(adata.X)
    return adata


NOT_FINITE = "no finite number"
VALUES: dict[str, tuple[float, list[str]]] = {
    "nan": (np.nan, ["holds nan", NOT_FINITE, "drop it"]),
    "inf": (np.inf, ["holds inf", NOT_FINITE]),
    "-inf": (-np.inf, ["holds -inf", NOT_FINITE]),
    "negative": (-2, ["holds -2", "needs whole counts", "layer=", "likelihood='gaussian'"]),
    "fraction": (0.5, ["holds 0.5", "needs whole counts", "layer=", "check_values=False"]),
}


@pytest.mark.parametrize("container", [np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_array])
@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_named_with_its_cell_and_gene(
    value: str, container: Callable[[Any], Any]
) -> None:
    number, parts = VALUES[value]
    adata = with_value(number, container)
    place = ["adata.X", "cell 'cell3'", "gene 'gene7'", "(2 such values in all)"]
    for likelihood in COUNTS:
        expected = [*place, *parts]
        if NOT_FINITE not in parts:
            expected.append(repr(likelihood))
        fails(
            lambda name=likelihood: small_fit(adata, likelihood=name), ValueError, expected, adata
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_no_likelihood_takes_what_float32_cannot_hold(value: float) -> None:
    adata = small_counts()
    adata.X = adata.X.astype(np.float64)
    adata.X[3, 7] = value
    parts = ["adata.X holds", "'cell3'", "'gene7'", NOT_FINITE]
    for likelihood in ("auto", *LIKELIHOOD_NAMES):
        fails(lambda name=likelihood: small_fit(adata, likelihood=name), ValueError, parts, adata)


def test_the_gene_is_named_among_all_genes_under_a_mask() -> None:
    adata = with_value(-1)
    mask = np.arange(N_VARS) >= 5
    fails(
        lambda: small_fit(adata, likelihood="poisson", mask_var=mask),
        ValueError,
        ["holds -1", "'cell3'", "'gene7'"],
        adata,
    )
    # A value outside the modelled genes is none of the fit's business.
    small_fit(adata, likelihood="poisson", mask_var=np.arange(N_VARS) > 7)


def test_negative_integers() -> None:
    adata = with_value(-1)
    adata.X = adata.X.astype(np.int32)
    fails(lambda: small_fit(adata, likelihood="nb"), ValueError, ["holds -1", "'cell3'"], adata)


@pytest.mark.parametrize("likelihood", COUNTS)
def test_log_values_under_a_count_likelihood_name_the_layer_of_counts(likelihood: str) -> None:
    adata = small_counts()
    adata.layers["logs"] = np.log1p(adata.X)
    adata.layers["spliced"] = sp.csr_matrix(adata.X)
    adata.X = np.log1p(adata.X)
    for layer, slot in ((None, "adata.X"), ("logs", "adata.layers['logs']")):
        parts = [slot, "Pass layer='spliced', which holds whole counts"]
        fails(
            lambda layer=layer: small_fit(adata, likelihood=likelihood, layer=layer),
            ValueError,
            parts,
            adata,
        )
    adata.X = adata.layers.pop("spliced")
    fails(
        lambda: small_fit(adata, likelihood=likelihood, layer="logs"),
        ValueError,
        ["Pass layer=None (adata.X), which holds whole counts"],
        adata,
    )


@pytest.mark.parametrize("likelihood", COUNTS)
def test_fractions_pass_where_asked_for(likelihood: str) -> None:
    adata = small_counts()
    adata.X[3, 7] = 0.5
    small_fit(adata, likelihood=likelihood, check_values=False)
    assert np.isfinite(adata.obsm["X_scuvae"]).all()
    tl.score(adata, n_samples=2)  # the opt-in goes with the fit
    adata.X[3, 7] = -0.5
    fails(
        lambda: small_fit(adata, likelihood=likelihood, check_values=False),
        ValueError,
        ["holds -0.5"],
        adata,
    )


@pytest.mark.parametrize("likelihood", ["auto", *LIKELIHOOD_NAMES])
def test_all_zero_matrix(likelihood: str) -> None:
    for zeros in (np.zeros((9, 5), np.float32), sp.csr_matrix((9, 5)), np.zeros((9, 5), int)):
        adata = AnnData(zeros)
        fails(
            lambda adata=adata: small_fit(adata, likelihood=likelihood),
            ValueError,
            ["adata.X is zero everywhere", "layer="],
            adata,
        )


DTYPES: dict[str, tuple[Callable[[np.ndarray], Any], list[str]]] = {
    "masked": (lambda x: np.ma.array(x, mask=x > 5), ["masked array", "filled"]),
    "complex": (lambda x: x.astype(complex), ["complex128", "real numbers", "astype"]),
    "object": (lambda x: x.astype(object), ["object", "real numbers", "astype"]),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    make, parts = DTYPES[dtype]
    adata = small_counts()
    adata.layers["l"] = make(adata.X)
    fails(lambda: small_fit(adata, layer="l"), TypeError, ["adata.layers['l']", *parts], adata)
    adata = AnnData(make(small_counts().X))
    fails(lambda: small_fit(adata), TypeError, ["adata.X", *parts], adata)


# --- containers ---------------------------------------------------------------------------------


def test_containers_that_anndata_itself_keeps_out_today() -> None:
    class Lazy:
        pass

    Lazy.__module__ = "dask.array.core"
    for x, part in (
        (sp.coo_matrix(np.eye(3)), "tocsr()"),
        (sp.coo_array(np.eye(3)), "tocsr()"),
        (Lazy(), "to_memory()"),
        (pd.DataFrame(np.eye(3)), "numpy array"),
    ):
        holder = SimpleNamespace(X=x, layers={})
        with pytest.raises(TypeError, match=r"adata\.X is a") as caught:
            read_matrix(holder, None)  # type: ignore[arg-type]
        assert part in str(caught.value)


def test_missing_layer_lists_near_matches() -> None:
    adata = small_counts()
    fails(lambda: small_fit(adata, layer="counts"), ValueError, ["layers['counts']", "none"], adata)
    adata.layers["counts"] = adata.X.copy()
    parts = ["adata.layers['count'] does not exist", "Did you mean 'counts'?"]
    fails(lambda: small_fit(adata, layer="count"), ValueError, parts, adata)


def test_no_x() -> None:
    adata = small_counts()
    adata.layers["counts"], adata.X = adata.X, None
    fails(lambda: small_fit(adata), ValueError, ["adata.X is None", "layer=", "'counts'"], adata)


class MuData:
    mod = {"rna": None, "adt": None}  # noqa: RUF012


IN_ADATAS_PLACE: dict[str, tuple[Any, list[str]]] = {
    "path": ("in.h5ad", ["str, not an AnnData", "anndata.read_h5ad"]),
    "pathlib": (Path("in.h5ad"), ["PosixPath", "anndata.read_h5ad"]),
    "array": (np.eye(3), ["ndarray, not an AnnData", "AnnData(X)"]),
    "frame": (pd.DataFrame(np.eye(3)), ["DataFrame", "AnnData(X)"]),
    "none": (None, ["NoneType"]),
    "mudata": (MuData(), ["MuData", "'rna', 'adt'", "mdata["]),
}
VERBS: dict[str, Callable[[Any], object]] = {
    "fit": tl.fit,
    "project": lambda adata: tl.project(adata, fitted()),
    "novelty": lambda adata: tl.novelty(adata, fitted()),
    "refine": tl.refine,
    "embed": tl.embed,
    "score": tl.score,
    "amortization_gap": tl.amortization_gap,
    "denoise": tl.denoise,
    "to_encoder": tl.to_encoder,
    "sample": tl.sample,
    "calibration": tl.calibration,
    "predictive_check": tl.predictive_check,
    "loadings": tl.loadings,
    "compare_n_latent": tl.compare_n_latent,
    "decode": lambda adata: tl.decode(adata, np.zeros((2, 3))),
    "rank_genes": verb_of("rank_genes"),
    "extend_genes": tl.extend_genes,
    "transfer_labels": lambda adata: tl.transfer_labels(adata, fitted(), labels="batch"),
    "model": lambda adata: get.model(adata),
    "posterior": lambda adata: get.posterior(adata),
    "history": lambda adata: get.history(adata),
}


def test_every_verb_is_in_the_table() -> None:
    assert set(VERBS) == set(tl.__all__) | set(get.__all__)


@pytest.mark.parametrize("what", IN_ADATAS_PLACE)
@pytest.mark.parametrize("verb", VERBS)
def test_something_else_in_adatas_place(verb: str, what: str) -> None:
    value, parts = IN_ADATAS_PLACE[what]
    fails(lambda: VERBS[verb](value), TypeError, ["adata is a", *parts])


@pytest.mark.parametrize("what", [name for name in IN_ADATAS_PLACE if "path" not in name])
def test_something_else_in_the_references_place(what: str) -> None:
    value, parts = IN_ADATAS_PLACE[what]
    adata = small_counts()
    fails(lambda: tl.project(adata, value), TypeError, ["reference is a", *parts], adata)


@pytest.mark.parametrize("name", ["gone.h5ad", "gone.zarr"])
def test_a_reference_that_does_not_exist(tmp_path: Path, name: str) -> None:
    adata = small_counts()
    fails(lambda: tl.project(adata, tmp_path / name), FileNotFoundError, [name, "reference"], adata)


@pytest.mark.parametrize(("shape", "part"), [((0, 5), "no cells"), ((5, 0), "no genes")])
@pytest.mark.parametrize("verb", VERBS)
def test_no_cells_no_genes(verb: str, shape: tuple[int, int], part: str) -> None:
    adata = AnnData(np.zeros(shape, np.float32))
    parts = [f"{shape[0]} × {shape[1]}", part, "filtered"]
    if verb in ("model", "history"):  # read from a model file there are no cells
        parts = ["holds no fit"]
    fails(lambda: VERBS[verb](adata), ValueError, parts, adata)


# --- unfitted -----------------------------------------------------------------------------------

READERS = [verb for verb in VERBS if verb not in ("fit", *TABLES, *WITH_REFERENCE)]


@pytest.mark.parametrize("verb", READERS)
def test_reading_an_unfitted_adata_names_the_missing_call(verb: str) -> None:
    adata = small_counts()
    adata.uns["scuvae_colors"] = ["red"]
    parts = ["adata.uns['scuvae'] holds no fit", "scuvae.tl.fit(adata)"]
    fails(lambda: VERBS[verb](adata), ValueError, parts, adata)
    for other in ({}, "text", {"params": {}}):
        adata.uns["scuvae"] = other
        fails(lambda: VERBS[verb](adata), ValueError, parts, adata)


@pytest.mark.parametrize("name", READERS)
def test_reading_an_unknown_key_lists_the_fits(name: str) -> None:
    adata = fitted()
    verb = verb_of(name) if hasattr(tl, name) else getattr(get, name)
    parts = ["adata.uns['scuvea']", "key_added='scuvea'", "Did you mean 'scuvae'?"]
    fails(lambda: verb(adata, key="scuvea"), ValueError, parts, adata)


def test_projecting_onto_an_unfitted_reference() -> None:
    adata, reference = small_counts(), small_counts()
    parts = ["uns['scuvae'] holds no fit", "tl.fit"]
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)


READS_Q = [tl.refine, tl.score, tl.denoise, tl.sample, tl.predictive_check, get.posterior]


@pytest.mark.parametrize("verb", READS_Q)
@pytest.mark.parametrize("slot", ["X_scuvae", "X_scuvae_scale"])
def test_a_lost_posterior_is_named(verb: Callable[..., object], slot: str) -> None:
    adata = fitted()
    del adata.obsm[slot]
    fails(lambda: verb(adata), ValueError, [f"adata.obsm['{slot}']", "fit again"], adata)


# --- names and categories -----------------------------------------------------------------------


def test_duplicate_gene_names() -> None:
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        adata = AnnData(small_counts().X, var=pd.DataFrame(index=["a", "b", "a", *"cdefg"] * 5))
    parts = ["adata.var_names holds 'a' more than once", "var_names_make_unique()"]
    fails(lambda: small_fit(adata), ValueError, parts, adata)
    fails(lambda: tl.project(adata, fitted()), ValueError, parts, adata)


def test_batch_key() -> None:
    adata = small_counts()
    adata.obs["donor"] = "d"
    fails(
        lambda: small_fit(adata, batch_key="donr"),
        ValueError,
        ["batch_key='donr'", "adata.obs", "Did you mean 'donor'?"],
        adata,
    )
    adata.obs.loc[["cell4", "cell9"], "donor"] = np.nan
    fails(
        lambda: small_fit(adata, batch_key="donor"),
        ValueError,
        ["adata.obs['donor']", "2 cells", "'cell4'", "drop them"],
        adata,
    )
    adata.obs["measured"] = np.linspace(0, 1, N_OBS)
    fails(
        lambda: small_fit(adata, batch_key="measured"),
        ValueError,
        ["adata.obs['measured']", "float64", f"{N_OBS} values", "astype(str)"],
        adata,
    )


def test_size_factor_key() -> None:
    adata = small_counts()
    near = ["size_factor_key='expectd'", "Did you mean 'expected'?"]
    fails(lambda: small_fit(adata, size_factor_key="expectd"), ValueError, near, adata)
    for value in (0, -1, np.nan, np.inf):
        adata.obs.loc["cell4", "expected"] = value
        parts = ["adata.obs['expected']", f"is {value:g} at cell 'cell4'", "positive"]
        fails(lambda: small_fit(adata, size_factor_key="expected"), ValueError, parts, adata)
    for column in ("text", "strings"):
        adata.obs[column] = "12" if column == "strings" else "many"
        parts = [f"adata.obs['{column}']", "numbers", "astype"]
        fails(lambda name=column: small_fit(adata, size_factor_key=name), TypeError, parts, adata)


def test_mask_var() -> None:
    adata = small_counts()
    cases: list[tuple[Any, list[str]]] = [
        ("highly_variabl", ["mask_var='highly_variabl'", "Did you mean 'highly_variable'?"]),
        (np.ones(3, bool), ["mask_var has dtype bool and shape (3,)", f"{N_VARS} genes"]),
        (np.ones(N_VARS), ["mask_var has dtype float64", "boolean"]),
        (np.zeros(N_VARS, bool), ["mask_var selects none"]),
        (["gene1", "gene2"], ["mask_var", "boolean"]),
    ]
    for mask, parts in cases:
        fails(lambda mask=mask: small_fit(adata, mask_var=mask), ValueError, parts, adata)


def test_unseen_batch() -> None:
    reference, adata = fitted(), small_counts(seed=1)
    adata.obs["batch"] = ["b0"] * (N_OBS - 2) + ["b7", "b8"]
    parts = ["adata.obs['batch']", "'b7', 'b8'", "Known: 'b0', 'b1'"]
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)
    del adata.obs["batch"]
    parts = ["batch_key='batch'", "adata.obs"]
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)


def test_no_gene_in_common() -> None:
    reference, adata = fitted(), small_counts()
    adata.var_names = [f"ENSG{i}" for i in range(N_VARS)]
    parts = ["no gene", "'gene0'", "'ENSG0'", "ids"]
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)


def test_values_that_the_fits_likelihood_cannot_have() -> None:
    reference, adata = fitted(), with_value(0.5)
    parts = ["adata.X holds 0.5", "'cell3'", "'gene7'", "'negative_binomial'", "Put raw counts"]
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)
    adata.layers["raw"] = small_counts().X
    parts[-1] = "adata.layers['raw'] holds some"
    fails(lambda: tl.project(adata, reference), ValueError, parts, adata, reference)
    fails(
        lambda: tl.project(adata, reference, layer="rw"),
        ValueError,
        ["adata.layers['rw'] does not exist", "Did you mean 'raw'?"],
        adata,
        reference,
    )
    for verb in (tl.score, tl.refine, tl.amortization_gap, tl.denoise):
        changed = fitted()
        changed.X[3, 7] = np.nan
        fails(lambda v=verb, a=changed: v(a), ValueError, ["holds nan", "'gene7'"], changed)


# --- parameters ---------------------------------------------------------------------------------

NO_WHOLE: list[tuple[Any, type[Exception]]] = [
    (0, ValueError),
    (-1, ValueError),
    (2.5, TypeError),
    (True, TypeError),
    (float("nan"), TypeError),
    ("10", TypeError),
]
WHOLE = {
    "fit": ["n_latent", "n_hidden", "n_layers", "max_epochs", "batch_size", "n_samples"],
    "project": ["max_steps"],
    "novelty": ["n_samples"],
    "refine": ["max_steps", "n_samples"],
    "score": ["n_samples", "n_anneal"],
    "amortization_gap": ["max_steps", "n_samples"],
    "denoise": ["n_samples"],
    "to_encoder": ["max_epochs", "batch_size"],
    "sample": ["n_samples"],
    "calibration": ["n_cells", "max_steps"],
    "predictive_check": ["n_samples"],
    "embed": ["n_components"],
    "transfer_labels": ["n_neighbors", "n_reference"],
}
FROM_ZERO = {
    ("fit", "n_layers"),
    ("denoise", "n_samples"),
    ("score", "n_anneal"),
    ("predictive_check", "n_samples"),
}


def whole_cases() -> Iterator[tuple[str, str, Any, type[Exception]]]:
    for verb, names in WHOLE.items():
        for name in names:
            for value, kind in NO_WHOLE:
                if value != 0 or isinstance(value, bool) or (verb, name) not in FROM_ZERO:
                    yield verb, name, value, kind


@pytest.mark.parametrize(("verb", "name", "value", "kind"), list(whole_cases()))
def test_whole_numbers(verb: str, name: str, value: Any, kind: type[Exception]) -> None:
    adata = fitted()
    first = (adata, fitted()) if verb in WITH_REFERENCE else (adata,)
    at_least = 0 if (verb, name) in FROM_ZERO else 1
    parts = [f"{name}={value!r}", f"pass a whole number >= {at_least}"]
    fails(lambda: verb_of(verb)(*first, **{name: value}), kind, parts, adata)


REALS: list[tuple[str, Any, type[Exception]]] = [
    *[("learning_rate", v, ValueError) for v in (0, -1e-3, float("nan"), float("inf"))],
    *[("learning_rate", v, TypeError) for v in ("1e-3", True)],
    *[("kl_weight", v, ValueError) for v in (0, -1, float("nan"), float("inf"))],
    ("kl_weight", "1", TypeError),
    *[("validation_fraction", v, ValueError) for v in (-0.1, 1, 1.0, float("nan"))],
    ("validation_fraction", "0.1", TypeError),
]


@pytest.mark.parametrize(("name", "value", "kind"), REALS)
def test_real_numbers(name: str, value: Any, kind: type[Exception]) -> None:
    adata = small_counts()
    parts = [f"{name}={value!r}", "pass a"]
    fails(lambda: tl.fit(adata, **{name: value}), kind, parts, adata)


NAMED: list[tuple[str, str, Any, str]] = [
    ("fit", "likelihood", "negativ_binomial", "Did you mean 'negative_binomial'"),
    ("fit", "likelihood", None, "'poisson'"),
    ("fit", "optimizer", "adan", "Did you mean 'adam'?"),
    ("fit", "device", "cpuu", "Did you mean 'cpu'"),
    ("fit", "device", 0, "'cpu'"),
    ("fit", "local_step", "naturl", "Did you mean 'natural'?"),
    ("fit", "covariance", "ful", "Did you mean 'full'?"),
    ("fit", "covariance", "", "'full'"),
    ("fit", "amortized", "semy", "Did you mean 'semi'?"),
    ("fit", "amortized", 1, "'semi'"),
    ("fit", "amortized", None, "'semi'"),
    ("refine", "local_step", "gradint", "Did you mean 'gradient'?"),
    ("refine", "covariance", "diag", "Did you mean 'diagonal'?"),
    ("refine", "covariance", False, "'diagonal'"),
    ("project", "covariance", "diag", "Did you mean 'diagonal'?"),
    ("project", "covariance", "", "'diagonal'"),
    ("calibration", "covariance", "diag", "Did you mean 'diagonal'?"),
    *[(verb, "device", "gpu", "'cpu'") for verb in ANY_FIT],
]


@pytest.mark.parametrize(("verb", "name", "value", "remedy"), NAMED)
def test_choices(verb: str, name: str, value: Any, remedy: str) -> None:
    adata = fitted()
    first = (adata, fitted()) if verb in WITH_REFERENCE else (adata,)
    parts = [f"{name}={value!r}", remedy]
    fails(lambda: verb_of(verb)(*first, **{name: value}), ValueError, parts, adata)


@pytest.mark.parametrize("verb", ANY_FIT)
def test_cuda_without_one(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    adata = fitted()
    first = (adata, fitted()) if verb in WITH_REFERENCE else (adata,)
    parts = ["device='cuda'", "no CUDA device", "device='auto' or 'cpu'"]
    fails(lambda: verb_of(verb)(*first, device="cuda"), ValueError, parts, adata)


@pytest.mark.parametrize("verb", [name for name in tl.__all__ if name not in TABLES])
def test_unknown_keyword(verb: str) -> None:
    adata = fitted()
    first = (adata, fitted()) if verb in WITH_REFERENCE else (adata,)
    fails(lambda: getattr(tl, verb)(*first, n_latents=3), TypeError, ["'n_latents'"], adata)


@pytest.mark.parametrize("verb", [tl.fit, tl.score, tl.sample, tl.calibration])
def test_rng_and_its_alias(verb: Callable[..., object]) -> None:
    adata = fitted()
    both = ["rng=", "random_state=", "not both"]
    fails(lambda: verb(adata, rng=0, random_state=0), TypeError, both, adata)
    for value in (1.5, "0", True):
        parts = [f"rng={value!r}", "numpy.random.Generator"]
        fails(lambda value=value: verb(adata, rng=value), TypeError, parts, adata)
    fails(lambda: verb(adata, rng=-1), ValueError, ["rng=-1", "negative"], adata)


@pytest.mark.parametrize("key", ["", "a/b", 5, b"k"])
def test_names_of_fits(key: Any) -> None:
    adata = fitted()
    parts = [repr(key), "string"]
    fails(lambda: small_fit(adata, key_added=key), ValueError, parts, adata)
    fails(lambda: tl.refine(adata, key_added=key), ValueError, parts, adata)
    fails(lambda: tl.project(adata, fitted(), key_added=key), ValueError, parts, adata)
    fails(lambda: tl.score(adata, key=key), ValueError, parts, adata)


def test_flags() -> None:
    adata = small_counts()
    for value in ("semi", 1, None):
        parts = [f"amortized={value!r}", "True or False"]
        call = lambda value=value: tl.project(adata, fitted(), amortized=value)  # noqa: E731
        fails(call, TypeError, parts, adata)


def test_denoise_does_not_overwrite_what_was_fitted() -> None:
    adata = small_counts()
    adata.layers["counts"] = adata.X.copy()
    small_fit(adata, layer="counts")
    parts = ["layer_added='counts'", "fitted", "'scuvae_denoised'"]
    fails(lambda: tl.denoise(adata, layer_added="counts"), ValueError, parts, adata)


def test_likelihood_instances() -> None:
    adata = small_counts()
    parts = ["n_vars=3", f"{N_VARS} modelled genes"]
    fails(lambda: small_fit(adata, likelihood=NegativeBinomial(3)), ValueError, parts, adata)

    class Own(NegativeBinomial):
        pass

    parts = ["Own", "not registered", "LIKELIHOODS"]
    fails(lambda: small_fit(adata, likelihood=Own(N_VARS)), ValueError, parts, adata)


@pytest.mark.parametrize("verb", [tl.amortization_gap])
def test_no_encoder_to_judge(verb: Callable[..., object]) -> None:
    adata = fitted(False)
    parts = ["adata.uns['scuvae']", "no encoder", "amortized=True"]
    fails(lambda: verb(adata), ValueError, parts, adata)


def test_the_encoder_needs_all_its_genes() -> None:
    reference = fitted()
    adata = small_counts()[:, 3:].copy()
    parts = ["amortized=True", "3 of the encoder's genes", "amortized=False"]
    fails(lambda: tl.project(adata, reference, amortized=True), ValueError, parts, adata, reference)
    parts = ["amortized=True", "no encoder", "amortized=False"]
    fails(lambda: tl.project(adata, fitted(False), amortized=True), ValueError, parts, adata)
    tl.project(adata, reference)
    fails(lambda: tl.amortization_gap(adata), ValueError, ["lack 3", "encoder's genes"], adata)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("amortized", SCHEMES)
def test_a_loss_that_overflows_stops_and_writes_nothing(
    amortized: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scuvae.io.values.find.TOO_LARGE", np.inf)  # such values do not come so far
    adata = small_counts()
    adata.X = adata.X * 1e30
    error = fails(
        lambda: tl.fit(
            adata, amortized=amortized, likelihood="gaussian", **{**SMALL, "batch_size": 20}
        ),
        TrainingError,
        ["epoch 0", "batch 0", "rows", "learning_rate"],
        adata,
    )
    assert isinstance(error, TrainingError)
    assert (error.epoch, error.batch) == (0, 0)
    assert len(error.cells) == 20


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
@pytest.mark.parametrize("batch_size", [32, N_OBS])
@pytest.mark.parametrize("amortized", SCHEMES)
def test_a_huge_learning_rate_never_writes_what_is_not_finite(
    amortized: bool | str, batch_size: int, optimizer: str
) -> None:
    adata = small_counts()
    options = {"optimizer": optimizer, "learning_rate": 1e30, "batch_size": batch_size}
    # With all cells in one batch the only loss there is, the first, is finite.
    options = {**SMALL, **options, "max_epochs": 1}
    before = adata.copy()
    try:
        tl.fit(adata, amortized=amortized, **options)
    except TrainingError:
        assert fingerprint(adata) == fingerprint(before)
    else:  # a step that the prior's gradient turned back: all is finite
        assert all(np.isfinite(adata.obsm[slot]).all() for slot in adata.obsm)
        for part in adata.uns["scuvae"]["state"].values():
            assert all(np.isfinite(array).all() for array in part.values())


def test_a_failing_fit_under_a_used_name_keeps_the_old_one() -> None:
    adata = fitted()
    adata.X[0, 0] = np.nan
    fails(lambda: small_fit(adata), ValueError, ["holds nan"], adata)
    assert get.history(adata).shape == (2, 5)


def test_a_view_stays_a_view_after_an_error() -> None:
    parent = ad.concat([small_counts(), small_counts(seed=1)], index_unique="-")
    view = parent[:N_OBS]
    fails(lambda: small_fit(view, n_latent=0), ValueError, ["n_latent=0"], view, parent)
    assert view.is_view
