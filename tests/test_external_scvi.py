"""The bridge to scvi-tools, held against the real package's own modules."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digest, fingerprint, random_states, small_counts, unchanged
from torch import Tensor
from torch.distributions import Distribution

from scuvae import tl
from scuvae._keys import SCVI, Keys

scvi = pytest.importorskip("scvi")

from small_models import kl_to_prior  # noqa: E402

from scuvae.distributions.gaussian import Gaussian  # noqa: E402
from scuvae.external import _last_layer  # noqa: E402
from scuvae.external import scvi as bridge  # noqa: E402
from scuvae.external._scvi_checks import loader_of  # noqa: E402
from scuvae.external._scvi_module import Bridge  # noqa: E402

CPU = torch.device("cpu")
N_LATENT = 3
KEYS = Keys.of(None, SCVI)
COVARIATES = {
    "batch_key": "batch",
    "labels_key": "kind",
    "categorical_covariate_keys": ["site"],
    "continuous_covariate_keys": ["age"],
}
every_likelihood = pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson", "normal"])
every_dispersion = pytest.mark.parametrize(
    "dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"]
)
# Forms of the decoder and of what it is told, each away from the default.
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "two layers": {"n_layers": 2},
    "two layers, covariates in the first": {"n_layers": 2, "deeply_inject_covariates": False},
    "encoder told of covariates": {"encode_covariates": True},
    "layer norm": {"use_layer_norm": "both", "use_batch_norm": "none"},
    "embedded batches": {"batch_representation": "embedding"},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """scvi-tools' random numbers are its own affair; its messages are nobody's."""
    logging.getLogger("scvi").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def cells(n_obs: int = 40, seed: int = 0) -> Any:
    adata = small_counts(n_obs=n_obs, seed=seed)
    rng = np.random.default_rng(seed)
    adata.obs["site"] = rng.choice(["s0", "s1", "s2"], n_obs)
    adata.obs["kind"] = rng.choice(["k0", "k1"], n_obs)
    adata.obs["age"] = rng.normal(size=n_obs)
    return adata


def model_of(adata: Any, setup: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model whose weights and running moments are random: faster than training, and rougher."""
    kind = options.pop("kind", scvi.model.SCVI)
    kind.setup_anndata(adata, **(setup or {}))
    model = kind(adata, **{"n_hidden": 8, "n_latent": N_LATENT, **options})
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if "px_decoder" in name or "factor_regressor" in name or "px_scale" in name:
                value += 0.3 * torch.randn_like(value)
        for name, value in model.module.named_buffers():
            if name.endswith("running_mean"):
                value.normal_().mul_(0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        if "px_r" in dict(model.module.named_parameters()):
            model.module.px_r.normal_().mul_(0.5).add_(1.0)
    model.is_trained_ = True
    model.module.eval()
    return model


def one_batch(model: Any) -> tuple[Bridge, dict[str, Tensor], Any, Distribution]:
    tensors = next(iter(loader_of(model, model.adata, 1000)))
    read = Bridge(model.module, CPU)
    batch, q = read.read(tensors, torch.arange(len(tensors["X"])))
    return read, tensors, batch, q


def theirs(module: Any, tensors: dict[str, Tensor], z: Tensor) -> dict[str, Any]:
    """scvi-tools' own generative pass at z, in float64 where it can, and its loss."""
    # Its one-hot rows of batches and labels are float32 whatever the weights are.
    dtype = torch.float32 if module.dispersion in ("gene-batch", "gene-label") else torch.float64
    module = module.to(dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    found = module.inference(**module._get_inference_input(given))
    found["z"] = z.to(dtype)
    made = module.generative(**module._get_generative_input(given, found))
    loss = module.loss(given, found, made)
    return {
        "log_p": -loss.reconstruction_loss["reconstruction_loss"],
        "kl": loss.kl_local["kl_divergence_z"],
        "px": made["px"],
        "qz": found["qz"],
    }


def check_against_scvi(model: Any) -> None:
    read, tensors, batch, q = one_batch(model)
    z = q.sample((2,))
    own = read.log_likelihood(batch, z)
    kl = kl_to_prior(q)
    for i in range(2):
        other = theirs(model.module, tensors, z[i])
        # float32 sums of 40 terms of some nats, squared residuals of the Gaussian of some 1e4.
        np.testing.assert_allclose(own[i], other["log_p"].detach(), rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(kl, other["kl"].detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(q.mean, other["qz"].loc.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(q.variance, other["qz"].variance.detach(), rtol=1e-4)


# --- p(x | z) -------------------------------------------------------------------------------------


@every_dispersion
@every_likelihood
@pytest.mark.parametrize("setup", [{}, COVARIATES], ids=["plain", "covariates"])
def test_log_likelihood_and_kl_are_scvis(
    gene_likelihood: str, dispersion: str, setup: dict[str, Any]
) -> None:
    check_against_scvi(
        model_of(cells(), setup, gene_likelihood=gene_likelihood, dispersion=dispersion)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
def test_every_form_of_decoder(form: str, gene_likelihood: str) -> None:
    check_against_scvi(
        model_of(cells(), COVARIATES, gene_likelihood=gene_likelihood, **FORMS[form])
    )


def test_size_factors() -> None:
    setup = {"size_factor_key": "expected", "batch_key": "batch"}
    check_against_scvi(model_of(cells(), setup))


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
def test_linear_decoder(gene_likelihood: str) -> None:
    check_against_scvi(
        model_of(
            cells(),
            {"batch_key": "batch"},
            kind=scvi.model.LinearSCVI,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=True,
        )
    )


@every_likelihood
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_curvature_is_the_expected_one(gene_likelihood: str, dispersion: str) -> None:
    """R Rᵀ is the covariance of the score over counts drawn by scvi-tools' own px."""
    if dispersion == "gene-cell" and gene_likelihood in ("nb", "zinb"):
        pytest.skip("log θ's own information is left out there")
    model = model_of(
        cells(), COVARIATES, gene_likelihood=gene_likelihood, dispersion=dispersion, n_layers=2
    )
    read, tensors, batch, q = one_batch(model)
    n_draws = 10_000
    cell = torch.tensor([0])
    few = batch.take(cell)
    z = q.mean[cell]
    root = read.curvature_root(few, z)[0]
    found = (root @ root.mT).numpy()

    px = theirs(model.module, tensors, q.mean)["px"]
    x = px.sample((n_draws,))[:, 0].float()
    many = type(few)(
        x,
        torch.arange(n_draws),
        few.size_factor.expand(n_draws),
        few.covariates.expand(n_draws, -1),
    )
    at = z.expand(n_draws, -1).clone().requires_grad_()
    (score,) = torch.autograd.grad(read.log_likelihood(many, at).sum(), at)
    score = score.double()
    products = score.unsqueeze(-1) * score.unsqueeze(-2)
    truth, error = products.mean(0).numpy(), products.std(0).numpy() / n_draws**0.5
    assert (np.abs(found - truth) < 5 * error + 1e-4 * np.abs(truth).max()).all()
    # The score itself has mean zero: these draws are of this p.
    assert (score.mean(0).abs() < 5 * score.std(0) / n_draws**0.5).all()


@every_likelihood
@pytest.mark.parametrize("setup", [COVARIATES, {"size_factor_key": "expected"}])
def test_curvature_by_way_of_the_mean(gene_likelihood: str, setup: dict[str, Any]) -> None:
    """It is the expected one where a cell's dropouts are the same for any z."""
    options = {"n_layers": 2, "deeply_inject_covariates": False}
    model = model_of(cells(), setup, gene_likelihood=gene_likelihood, **options)
    if gene_likelihood == "zinb":
        with torch.no_grad():
            model.module.decoder.px_dropout_decoder.weight.zero_()
    read, _, batch, q = one_batch(model)
    assert read.network is not None
    root = read.curvature_root(batch, q.mean)
    # Jacobians centred before or after the product: float32's rounding.
    torch.testing.assert_close(read.curvature(batch, q.mean), root @ root.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_slopes_made_in_blocks(
    gene_likelihood: str, n_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd of log p written out in scvi-tools' heads, in float64; draws by twos."""
    options: dict[str, Any] = {"n_layers": n_layers, "deeply_inject_covariates": False}
    options["gene_likelihood"] = gene_likelihood
    read, _, batch, q = one_batch(model_of(cells(), COVARIATES, **options))
    assert read.in_blocks
    z = (q.mean + 2 * torch.randn(5, *q.mean.shape)).requires_grad_()
    weight = torch.rand(z.shape[:-1])
    monkeypatch.setattr(_last_layer, "NUMBERS_AT_ONCE", 2 * len(batch) * read.n_vars)
    found = read.log_likelihood(batch, z)
    (slope,) = torch.autograd.grad((weight * found).sum(), z)
    with torch.no_grad():
        torch.testing.assert_close(read.log_likelihood(batch, z), found)

    exact = Bridge(read.module.double(), CPU)
    at = z.detach().double().requires_grad_()
    wide = replace(
        batch,
        x=batch.x.dense.double(),
        size_factor=batch.size_factor.double(),
        covariates=batch.covariates.double(),
    )
    truth = exact.likelihood.log_prob(wide.x, exact.heads(wide, at))
    (truth_slope,) = torch.autograd.grad((weight * truth).sum(), at)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(slope.double(), truth_slope, rtol=1e-3, atol=1e-2)


# --- refinement -----------------------------------------------------------------------------------


def adam(model: Any, batch: Any, q: Distribution, n_steps: int = 400) -> Distribution:
    """400 steps over 10 fresh draws each, the rate falling to zero."""
    mean = q.mean.clone().requires_grad_()
    log_scale = q.stddev.log().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_scale], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        current = Gaussian(mean, log_scale.exp())
        expected = model.log_likelihood(batch, current.rsample((10,))).mean(0)
        loss = (kl_to_prior(current) - expected).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Gaussian(mean.detach(), log_scale.exp().detach())


def elbo_difference(model: Any, batch: Any, a: Distribution, b: Distribution) -> tuple[Any, Any]:
    """a's ELBO less b's over the same 1,000 draws, and its standard error, (cells,)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        noise = torch.randn(500, *a.mean.shape)
        noise = torch.cat([noise, -noise])
        difference = model.log_likelihood(batch, a.mean + a.stddev * noise)
        difference = (difference - model.log_likelihood(batch, b.mean + b.stddev * noise)).double()
        difference += (kl_to_prior(b) - kl_to_prior(a)).double()
        pairs = difference.unflatten(0, (2, -1)).mean(0)
    return pairs.mean(0).numpy(), pairs.std(0).numpy() / len(pairs) ** 0.5


def refined_q(adata: Any, keys: Keys = KEYS) -> Distribution:
    mean, scale = (torch.as_tensor(adata.obsm[name]) for name in (keys.mean, keys.scale))
    return Gaussian(mean, scale)


@pytest.mark.parametrize(
    ("gene_likelihood", "dispersion"),
    [("nb", "gene"), ("nb", "gene-cell"), ("zinb", "gene"), ("zinb", "gene-batch"),
     ("poisson", "gene")],
)  # fmt: skip
def test_refined_is_as_good_as_adam_and_no_cell_is_worse(
    gene_likelihood: str, dispersion: str
) -> None:
    adata = cells(20)
    model = model_of(adata, COVARIATES, gene_likelihood=gene_likelihood, dispersion=dispersion)
    read, _, batch, q = one_batch(model)
    bridge.refine(model, n_draws=128)  # weights of rough decoders: few say little of their error
    refined = refined_q(adata)
    gap, error = elbo_difference(read, batch, refined, q)
    assert (gap > -4 * error - 1e-3).all()
    assert gap.mean() > 1  # a random encoder is a bad one
    reported = adata.obs["scvi_amortization_gap"].to_numpy()
    assert (reported >= 0).all()
    spread = np.hypot(adata.obs["scvi_amortization_gap_se"], error)
    assert (np.abs(reported - gap) < 5 * spread + 1e-3).all()

    found, error = elbo_difference(read, batch, refined, adam(read, batch, q))
    # Steps end once they gain under .05 nats. In some cells of these rough decoders either of the
    # two ends in another optimum: one in twenty may lose two nats.
    assert np.median(found) > -0.05
    assert found.mean() > -0.1 - 3 * np.sqrt((error**2).sum()) / len(error)


def test_reported_elbos_are_scvis() -> None:
    adata = cells(20)
    model = model_of(adata, COVARIATES, gene_likelihood="zinb")
    bridge.refine(model, n_draws=200)
    _, tensors, _, encoded = one_batch(model)
    for name, q in (("elbo", refined_q(adata)), ("elbo_encoder", encoded)):
        values = [theirs(model.module, tensors, z)["log_p"].detach() for z in q.sample((200,))]
        truth = torch.stack(values)
        error = np.hypot(truth.std(0).numpy() / 200**0.5, adata.obs[f"scvi_{name}_se"])
        own = adata.obs[f"scvi_{name}"].to_numpy()
        assert (np.abs(truth.mean(0).numpy() - kl_to_prior(q).numpy() - own) < 5 * error).all()


def test_full_covariances_gain_more() -> None:
    adata = cells(20)
    model = model_of(adata)
    bridge.refine(model)
    bridge.refine(model, key_added="full", covariance="full")
    assert adata.obsm["full_covariance"].shape == (20, N_LATENT * (N_LATENT + 1) // 2)
    gained = adata.obs["full_elbo"] - adata.obs["scvi_elbo"]
    error = np.sqrt((adata.obs[["full_elbo_se", "scvi_elbo_se"]] ** 2).sum(1).sum()) / 20
    assert gained.mean() > -3 * error
    with pytest.raises(ValueError, match=r"full_covariance.*covariance='diagonal'"):
        bridge.hand_back(model, key="full")


def test_slots() -> None:
    adata, other = cells(), cells()
    bridge.refine(model_of(adata, COVARIATES))
    model = model_of(other, COVARIATES)
    assert bridge.refine(model, key_added="k", rng=1, copy=False) is None
    for key, data in (("X_scvi", adata), ("k", other)):
        for end in ("", "_scale", "_variance", "_encoder", "_encoder_scale"):
            values = data.obsm[key + end]
            assert (values.dtype, values.shape) == (np.float32, (40, N_LATENT))
            assert np.isfinite(values).all()
        np.testing.assert_array_equal(data.obsm[f"{key}_variance"], data.obsm[f"{key}_scale"] ** 2)
    names = {"elbo", "elbo_encoder", "amortization_gap"}
    names |= {f"{name}_se" for name in names}
    assert set(adata.obs) - set(cells().obs) - {"_scvi_batch", "_scvi_labels"} == {
        f"scvi_{name}" for name in names
    }
    assert all(other.obs[f"k_{name}"].dtype == np.float32 for name in names)
    assert adata.uns["scvi"]["params"]["gene_likelihood"] == "zinb"
    np.testing.assert_allclose(
        adata.obs["scvi_elbo"] - adata.obs["scvi_elbo_encoder"],
        adata.obs["scvi_amortization_gap"],
        atol=1e-3,
    )
    with pytest.raises(ValueError, match="holds no fit"):
        tl.score(adata, key="scvi")


# --- the trained package, from end to end ---------------------------------------------------------


def trained() -> tuple[Any, Any]:
    adata = cells(80)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=N_LATENT, gene_likelihood="nb")
    model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, logger=False)
    return adata, model


def state_of(model: Any) -> dict[str, str]:
    state = model.module.state_dict()
    return {name: digest(value.numpy().tobytes()) for name, value in state.items()}


def test_scvi_takes_the_refined_posteriors() -> None:
    adata, model = trained()
    before, states = state_of(model), random_states()
    model.module.train()
    bridge.refine(model)
    assert model.module.training
    assert state_of(model) == before
    assert random_states() == states
    model.module.eval()

    own = model.get_latent_representation()
    np.testing.assert_allclose(own, adata.obsm["X_scvi_encoder"], atol=1e-5)
    kept = fingerprint(adata)
    bridge.hand_back(model)
    assert fingerprint(adata) == kept
    np.testing.assert_array_equal(model.get_latent_representation(), adata.obsm["X_scvi"])
    mean, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(mean, adata.obsm["X_scvi"])
    np.testing.assert_allclose(variance, adata.obsm["X_scvi_variance"], rtol=1e-6)
    assert np.isfinite(model.get_normalized_expression(n_samples=2).to_numpy()).all()
    table = model.differential_expression(groupby="kind", group1="k0", group2="k1", silent=True)
    assert len(table) == adata.n_vars

    # With counts kept, refinement still can be asked; the encoder's q is the encoder's own.
    again = bridge.refine(model, key_added="again", copy=True)
    np.testing.assert_allclose(again.obsm["again_encoder"], adata.obsm["X_scvi_encoder"], atol=1e-5)
    model.adata = adata
    model.module.minified_data_type = None
    np.testing.assert_allclose(model.get_latent_representation(), own, atol=1e-6)


def test_other_cells_with_genes_in_another_order() -> None:
    adata, model = trained()
    bridge.refine(model)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    some = cells(80)[10:30, order].copy()
    assert "_scvi_uuid" not in some.uns
    columns = set(some.obs)
    bridge.refine(model, some)
    # A cell's posterior depends on no other cell; sums of 40 float32 terms in another order.
    np.testing.assert_allclose(some.obsm["X_scvi"], adata.obsm["X_scvi"][10:30], atol=1e-3)
    assert set(some.uns) == {"scvi"}
    assert all(name.startswith("scvi_") for name in set(some.obs) - columns)


def test_copy_leaves_adata_alone() -> None:
    adata, model = trained()
    with unchanged(adata):
        out = bridge.refine(model, copy=True, progress=False)
    assert out is not adata
    assert "X_scvi" in out.obsm


def test_the_same_seed_writes_the_same_figures() -> None:
    adata, model = trained()
    bridge.refine(model, rng=3, key_added="a")
    bridge.refine(model, random_state=3, key_added="b")
    np.testing.assert_array_equal(adata.obs["a_elbo"], adata.obs["b_elbo"])
    np.testing.assert_array_equal(adata.obsm["a"], adata.obsm["b"])


# --- refusals -------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ln": ({"latent_distribution": "ln"}, "latent_distribution='ln'"),
    "library": ({"use_observed_lib_size": False}, "use_observed_lib_size=False.*Train with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_supported(name: str) -> None:
    options, message = REFUSED[name]
    adata = cells()
    model = model_of(adata, **options)
    with unchanged(adata), pytest.raises(ValueError, match=message):
        bridge.refine(model)


def test_other_kinds_of_model() -> None:
    adata = cells()
    model = model_of(
        adata,
        {"labels_key": "kind", "unlabeled_category": "k0"},
        kind=scvi.model.SCANVI,
    )
    with unchanged(adata), pytest.raises(ValueError, match=r"scvi\.model\.SCANVI.*SCANVAE"):
        bridge.refine(model)
    with pytest.raises(TypeError, match="pass a trained"):
        bridge.refine(adata)
    fresh = model_of(cells())
    fresh.is_trained_ = False
    with pytest.raises(ValueError, match="not trained"):
        bridge.refine(fresh)
    with pytest.raises(ValueError, match=r"X_scvi'\] does not exist: call"):
        bridge.hand_back(model_of(cells()))


def broken(what: str) -> Any:
    adata = cells(20, seed=3)
    if what == "genes":
        return adata[:, 1:].copy()
    if what == "batch":
        adata.obs["batch"] = ["b0"] * 19 + ["b9"]
    elif what == "column":
        del adata.obs["site"]
    elif what == "number":
        adata.obs.loc["cell3", "age"] = np.nan
    elif what == "counts":
        adata.X = np.log1p(adata.X)
    elif what == "negative":
        adata.X[2, 3] = -1
    return adata


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("genes", r"adata\.var_names lack 1 of the model's 40 genes, first 'gene0'"),
        ("batch", r"adata\.obs\['batch'\] holds 'b9' at cell 'cell19'.*Known: "),
        ("column", r"adata\.obs\['site'\] does not exist"),
        ("number", r"adata\.obs\['age'\] holds 'nan' at cell 'cell3'"),
        ("counts", r"adata\.X holds .* needs whole counts"),
        ("negative", r"adata\.X holds -1 at cell 'cell2', gene 'gene3'"),
    ],
)
def test_cells_that_do_not_fit_the_model(what: str, message: str) -> None:
    trained_on = cells()
    model = model_of(trained_on, COVARIATES)
    adata = broken(what)
    with unchanged(adata, trained_on), pytest.raises(ValueError, match=message):
        bridge.refine(model, adata)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariance": "ful"}, "covariance='ful'"),
        ({"n_draws": 7}, "n_draws=7"),
        ({"n_draws": 2}, "n_draws=2"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"key_added": "a/b"}, "key='a/b'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"rng": -1}, "rng=-1"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    adata = cells()
    model = model_of(adata)
    with unchanged(adata), pytest.raises(ValueError, match=message):
        bridge.refine(model, **arguments)
