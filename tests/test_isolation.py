"""A call keeps to itself: threads, and what a process has set torch to."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import SCHEMES, fingerprint, random_states, small_counts, small_fit

from scuvae import get, io, pp, runtime, tl
from scuvae._random import normal_like
from scuvae.runtime import random_state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def rough_products() -> Iterator[None]:
    """What lightning advises: where the processor has bfloat16, products of float32 are its."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "rough products": rough_products,
}
# Settings that do not touch each other go together: a verb is called three times, not six.
TOGETHER = {
    "inference mode": ("inference mode",),
    "float64 without gradients": ("no gradients", "float64", "rough products"),
    "bfloat16 elsewhere": ("bfloat16", "autocast", "another device"),
}


def there_and_back(adata: AnnData) -> None:
    with TemporaryDirectory() as folder:
        io.write_model(f"{folder}/m.scuvae", adata, key="semi")
        io.read_model(f"{folder}/m.scuvae")


VERBS: dict[str, Callable[[AnnData, AnnData], Any]] = {
    "project": lambda new, old: tl.project(new, old, key="semi"),
    "polish": lambda new, old: tl.project(new, old, key="semi", polish="moments"),
    "transfer_labels": lambda new, old: tl.transfer_labels(new, old, labels="kind", key="semi"),
    "novelty": lambda new, old: tl.novelty(new, old, key="semi", n_reference=30),
    "refine": lambda new, old: tl.refine(old, key="semi", key_added="r"),
    "refine by Adam": lambda new, old: tl.refine(
        old, key="semi", key_added="r", local_step="gradient", max_steps=3
    ),
    "score": lambda new, old: tl.score(old, key="semi", n_samples=3, n_anneal=2),
    "gap": lambda new, old: tl.amortization_gap(old, key="semi", decompose=True),
    "denoise": lambda new, old: tl.denoise(old, key="semi"),
    "sample": lambda new, old: tl.sample(old, key="semi"),
    "embed": lambda new, old: tl.embed(old, key="semi"),
    "extend_genes": lambda new, old: tl.extend_genes(old, key="few", min_counts=1),
    "to_encoder": lambda new, old: tl.to_encoder(old, key="table", max_epochs=2),
    "calibration": lambda new, old: tl.calibration(old, key="semi", n_cells=5),
    "predictive_check": lambda new, old: tl.predictive_check(old, key="semi"),
    "rank_genes": lambda new, old: tl.rank_genes(old, "kind", key="semi"),
    "neighbors": lambda new, old: pp.neighbors(old, key="semi", n_neighbors=5),
    "thin_counts": lambda new, old: pp.thin_counts(old),
    "model": lambda new, old: get.model(old, key="semi"),
    "posterior": lambda new, old: get.posterior(old, key="semi"),
    "summary": lambda new, old: str(get.fit(old, key="semi")),
    "history": lambda new, old: get.history(old, key="semi"),
    "a model's file": lambda new, old: there_and_back(old),
}


def state() -> tuple[Any, ...]:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    products = torch.get_float32_matmul_precision(), [p.fp32_precision for p in runtime.PRODUCTS]
    cast = torch.is_autocast_enabled("cpu")
    return random_states(), modes, torch.get_default_device(), cast, products


@pytest.fixture(scope="module")
def fitted() -> AnnData:
    adata = small_counts(n_obs=120)
    adata.obs["kind"] = np.where(np.arange(120) % 2, "a", "b")
    small_fit(adata, amortized="semi", key_added="semi", validation_fraction=0.25)
    small_fit(adata, key_added="few", mask_var="highly_variable")
    return small_fit(adata, key_added="table")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What each verb gave where nothing was set."""
    return {}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("amortized", SCHEMES)
def test_a_fit_does_not_mind(amortized: bool | str, setting: str) -> None:
    alone = small_fit(small_counts(), amortized=amortized)
    adata = small_counts()
    with SETTINGS[setting]():
        before = state()
        small_fit(adata, amortized=amortized)
        assert state() == before
    assert fingerprint(adata) == fingerprint(alone)


def test_products_are_exact_whatever_is_set() -> None:
    """Also on processors where that changes nothing; other calls meanwhile end as they like."""
    found = []

    @runtime.isolated
    def verb() -> None:
        found.append(
            torch.get_float32_matmul_precision()
            if not runtime.PRODUCTS
            else [part.fp32_precision for part in runtime.PRODUCTS]
        )

    @runtime.isolated
    def around() -> None:
        verb()

    with rough_products():
        before = state()
        verb()
        around()
        assert state() == before
    assert found in (["highest"] * 2, [["ieee", "ieee"]] * 2)


@pytest.mark.parametrize("settings", TOGETHER)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_not_mind(
    verb: str, settings: str, fitted: AnnData, alone: dict[str, Any]
) -> None:
    def call(*names: str) -> Any:
        old, new = fitted.copy(), small_counts(seed=5)
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(SETTINGS[name]())
            before = state()
            VERBS[verb](new, old)
            assert state() == before
        return fingerprint(old), fingerprint(new)

    if verb not in alone:
        alone[verb] = call()
    assert call(*TOGETHER[settings]) == alone[verb]


@pytest.mark.parametrize("setting", SETTINGS)
def test_nor_does_it_when_it_fails(setting: str, fitted: AnnData) -> None:
    with SETTINGS[setting]():
        before = state()
        with pytest.raises(ValueError, match="holds no fit"):
            tl.score(fitted, key="missing")
        assert state() == before


def test_each_seed_has_draws_of_its_own() -> None:
    """Those of ``torch.manual_seed``; of another seed a verb's are others."""
    for seed in (0, 1, 2**40):
        with random_state(seed, torch.device("cpu")):
            found = normal_like(torch.zeros(40))
        generator = torch.Generator().manual_seed(seed)
        torch.testing.assert_close(found, torch.zeros(40).normal_(generator=generator))
    adata = small_fit(small_counts())
    layers = [tl.sample(adata, rng=rng, copy=True).layers["scuvae_sample"] for rng in (1, 2, 2)]
    layers = [layer.toarray() for layer in layers]
    assert (layers[0] != layers[1]).any()
    np.testing.assert_array_equal(layers[1], layers[2])


@pytest.mark.parametrize("amortized", SCHEMES)
def test_fits_in_threads_are_those_alone(amortized: bool | str) -> None:
    """Bit for bit: each has random numbers of its own, and switches none off for another."""

    def fit(seed: int) -> Any:
        adata = small_fit(small_counts(), amortized=amortized, rng=seed, max_epochs=6)
        tl.score(adata, n_samples=5)
        tl.sample(adata)
        return fingerprint(adata), adata.obsm["X_scuvae"].tobytes()

    alone = [fit(seed) for seed in range(4)]
    before = random_states()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fit, range(4))) == alone
    assert random_states() == before
    assert len({means for _, means in alone}) == 4


@pytest.mark.parametrize("amortized", SCHEMES)
def test_with_other_threads_a_fit_is_the_same_but_for_roundings(amortized: bool | str) -> None:
    """Products of matrices are added up in another order. Enough cells and genes to be split."""
    elbos, means = [], []
    for n in (1, 2):
        torch.set_num_threads(n)
        adata = small_counts(n_obs=300, n_vars=200)
        small_fit(adata, amortized=amortized, max_epochs=2, n_hidden=64)
        elbos.append(adata.uns["scuvae"]["history"]["elbo"].to_numpy())
        means.append(adata.obsm["X_scuvae"])
    if amortized is False:
        np.testing.assert_allclose(*elbos, rtol=1e-5)
        # A cell's own steps may end one earlier or later.
        np.testing.assert_allclose(*means, atol=0.05)
    else:  # Adam's first steps have the size of its rate, whatever that of a gradient is
        np.testing.assert_allclose(*elbos, rtol=5e-3)
