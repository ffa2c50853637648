"""Further genes of a fit: against scipy's regressions, their formula in numpy, the old bits."""

import copy
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import fingerprint, small_counts, small_data, small_fit, unchanged
from scipy import optimize
from scipy import sparse as sp

from scuvae import get, io, tl

pytestmark = pytest.mark.usefixtures("fixed_random_state")
FEW = {"mask_var": "highly_variable", "max_epochs": 8}


def extended(**options: Any) -> AnnData:
    adata = small_fit(small_counts(), **{**FEW, **options})
    tl.extend_genes(adata, min_counts=1)
    return adata


def offset_and_hidden(adata: AnnData, z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """ln ℓ − ln Σ exp(η) over the fitted genes, and what enters the last layer."""
    model, fitted = get.model(adata), adata.var["highly_variable"].to_numpy()
    with torch.no_grad():
        eta = model.decoder(z).double().numpy()
        hidden = model.decoder.hidden(z).double().numpy()
    size = np.log(np.asarray(adata.X[:, fitted].sum(1), float).ravel())
    return size - np.log(np.exp(eta).sum(-1)), hidden


def test_weights_are_those_of_a_regression_by_scipy() -> None:
    """Poisson regressions of single genes on the posterior's two points, with the fit's prior."""
    adata = small_fit(small_counts(), likelihood="poisson", n_layers=0, **FEW)
    tl.extend_genes(adata, min_counts=1, n_samples=2)
    model = get.model(adata)
    q, training = get.posterior(adata), (adata.obs["scuvae_split"] == "train").to_numpy()
    from scuvae.distributions.quasi_random import normal_points

    points = normal_points(2, q.mean)[:, 0]
    tril = torch.linalg.cholesky(q.covariance_matrix)
    z = q.mean + torch.einsum("nij,sj->sni", tril, points)
    offset, hidden = offset_and_hidden(adata, z)
    offset, hidden = offset[:, training], hidden[:, training]
    precision = model.decoder.output_precision(int(training.sum()))[0].double().numpy()
    further = adata.uns["scuvae"]["further"]
    for number in (0, 5):
        gene = adata.var_names.get_loc(further["var_names"][number])
        x = adata.X[training, gene]

        def loss(flat: np.ndarray, x: np.ndarray = x) -> tuple[float, np.ndarray]:
            log_rate = offset + hidden @ flat[:-1] + flat[-1]
            off = (np.exp(log_rate) - x) / len(hidden)
            slope = np.append(np.einsum("sn,snw->w", off, hidden), off.sum())
            slope[:-1] += precision * flat[:-1]
            value = (np.exp(log_rate) - x * log_rate).sum() / len(hidden)
            return float(value + 0.5 * (precision * flat[:-1] ** 2).sum()), slope

        start = np.zeros(hidden.shape[-1] + 1)
        truth = optimize.minimize(loss, start, jac=True, method="BFGS", tol=1e-8)
        # The intercept gives back the total instead; float32's likelihoods end the steps earlier.
        np.testing.assert_allclose(further["output"]["weight"][number], truth.x[:-1], atol=3e-3)
        assert abs(further["output"]["bias"][number] - truth.x[-1]) < 0.1
        assert np.abs(truth.x[:-1]).max() > 0.1


@pytest.mark.parametrize("likelihood", ["negative_binomial", "zero_inflated_negative_binomial"])
def test_means_are_those_of_the_formula(likelihood: str) -> None:
    adata = extended(likelihood=likelihood)
    further = adata.uns["scuvae"]["further"]
    offset, hidden = offset_and_hidden(adata, torch.tensor(adata.obsm["X_scuvae"]))
    eta = hidden @ further["output"]["weight"].T + further["output"]["bias"]
    mean = np.exp(offset[:, None] + eta)
    if "logit_dropout" in further["likelihood"]:
        mean /= 1 + np.exp(further["likelihood"]["logit_dropout"])
    genes = list(further["var_names"])
    found = tl.denoise(adata, genes=genes, n_samples=0)
    np.testing.assert_allclose(found, mean, rtol=2e-4)
    # At one total, which is that of the fitted genes.
    at = tl.decode(adata, adata.obsm["X_scuvae"], genes=genes, library_size=100.0)
    size = np.exp(offset) * 100 / adata.X[:, adata.var["highly_variable"]].sum(1)
    np.testing.assert_allclose(at, mean * (size / np.exp(offset))[:, None], rtol=2e-4)


def test_totals_are_given_back() -> None:
    adata = extended()
    genes = list(adata.uns["scuvae"]["further"]["var_names"])
    found = tl.denoise(adata, genes=genes).sum(0).to_numpy()
    np.testing.assert_allclose(found, adata[:, genes].X.sum(0), rtol=1e-3)


@pytest.mark.parametrize("n_layers", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_the_fitted_genes_changes(sparse: bool, n_layers: int) -> None:
    adata = small_counts()
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    small_fit(adata, n_layers=n_layers, batch_key="batch", **FEW)
    fitted = list(adata.var_names[adata.var["highly_variable"]])
    z = adata.obsm["X_scuvae"][:5]

    def everything(one: AnnData) -> list[Any]:
        tl.sample(one)
        tl.score(one, n_samples=3)
        drawn = sp.csr_matrix(one[:, fitted].layers["scuvae_sample"]).toarray()
        model = get.model(one).state_dict()
        return [
            fingerprint(tl.denoise(one, genes=fitted)),
            fingerprint(tl.denoise(one, genes=fitted, batch="average", library_size=1e3)),
            fingerprint(tl.decode(one, z)[fitted]),
            fingerprint(drawn),
            fingerprint(one.obsm["X_scuvae"]),
            fingerprint(one.obs["scuvae_elbo"]),
            {name: fingerprint(value.numpy()) for name, value in model.items()},
        ]

    before = everything(adata)
    tl.extend_genes(adata, min_counts=1)
    assert everything(adata) == before
    table = tl.denoise(adata, genes=list(adata.var_names), batch="average")
    assert np.isfinite(table).all(axis=None)
    assert tl.decode(adata, z).shape == (5, adata.n_vars)
    further = ~adata.var["highly_variable"].to_numpy()
    drawn = sp.csr_matrix(adata.layers["scuvae_sample"]).toarray()[:, further]
    # Poisson or more about their means: totals over 60 cells to a fifth.
    seen = np.asarray(adata.X[:, further].sum(0)).ravel()
    np.testing.assert_allclose(drawn.sum(), seen.sum(), rtol=0.2)


@pytest.mark.parametrize("options", [{}, {"n_layers": 0}, {"amortized": True}])
def test_a_fit_of_its_own_hears_of_further_genes(options: dict[str, Any]) -> None:
    """Its decoder is the extended one; its posteriors are no worse for any cell and better for all
    together, by the ELBO over all genes; the fit itself stays."""
    options = {"likelihood": "poisson", "batch_key": "batch", **FEW, **options}
    adata = small_fit(small_counts(), **options)
    before = fingerprint(adata.uns["scuvae"]), fingerprint(adata.obsm["X_scuvae"])
    tl.extend_genes(adata, min_counts=1, key_added="all")
    assert (fingerprint(adata.uns["scuvae"]), fingerprint(adata.obsm["X_scuvae"])) == before
    whole, fit = get.model(adata, key="all"), get.model(adata)
    names = list(adata.uns["all"]["var_names"])
    assert sorted(names) == sorted(adata.var_names)
    assert whole.encoder is None
    tl.extend_genes(adata, min_counts=1)
    of_batches = torch.nn.functional.one_hot(
        torch.as_tensor((adata.obs["batch"] == "b1").to_numpy()).long(), 2
    ).float()
    mean = torch.tensor(adata.obsm["X_scuvae"])
    with torch.no_grad():
        for given in (of_batches, 1 - of_batches):
            both = [model.decoder(mean, given)[:, : fit.n_vars] for model in (whole, fit)]
            off = both[0] - both[1]
            # Intercepts give back totals: of a gene the same for all cells.
            assert float((off - off.mean(0)).abs().max()) < 1e-4

    x = torch.tensor(adata[:, names].X.toarray() if sp.issparse(adata.X) else adata[:, names].X)
    given = of_batches if whole.design.batches[1] == "b1" else 1 - of_batches
    noise = torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0))

    def elbo(key: str | None) -> torch.Tensor:
        """Cells', by torch's own densities."""
        q = get.posterior(adata, key=key)
        z = q.mean + (
            torch.einsum("nij,snj->sni", q.scale_tril, noise)
            if hasattr(q, "scale_tril")
            else q.stddev * noise
        )
        with torch.no_grad():
            rate = whole.decoder(z, given).softmax(-1) * x.sum(1, keepdim=True)
            value = torch.distributions.Poisson(rate).log_prob(x).sum(-1).mean(0)
        normal = torch.distributions.Normal(0.0, 1.0)
        return value + (normal.log_prob(z).sum(-1) - q.log_prob(z)).mean(0)

    gain = elbo("all") - elbo(None)
    assert float(gain.mean()) > 0.3
    assert float(gain.min()) > -1.0  # of 200 draws, and of intercepts that moved afterwards
    np.testing.assert_allclose(
        tl.denoise(adata, key="all", genes=names).sum(), adata[:, names].X.sum(0), rtol=0.03
    )
    old = small_counts(n_obs=20, seed=3)
    tl.project(old, adata, key="all")
    assert old.obsm["X_scuvae"].shape == (20, mean.shape[1])


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({}, {"key_added": "scuvae"}, "key_added"),
        ({"size_factor_key": "expected"}, {"key_added": "all"}, r"obs\['expected'\]"),
        ({}, {"key_added": "all", "layer": "other"}, r"layer='other'.*leave out"),
    ],
)
def test_what_is_no_fit_of_its_own(
    options: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    adata = small_fit(small_counts(), **FEW, **options)
    adata.layers["other"] = adata.X.copy()
    with unchanged(adata), pytest.raises(ValueError, match=said):
        tl.extend_genes(adata, **arguments)


def test_a_whole_transcriptome_is_a_layer_and_ranked() -> None:
    adata = extended()
    tl.denoise(adata)
    assert adata.layers["scuvae_denoised"].shape == adata.shape
    assert "scuvae_denoised" not in adata.obsm
    tl.rank_genes(adata, "cell_type")
    names = adata.uns["rank_genes_groups"]["names"]["up"]
    assert set(names) == set(adata.var_names)
    # The further gene with the largest change of its counts is high in the list.
    up = (adata.obs["cell_type"] == "up").to_numpy()
    change = np.log(adata.X[up].mean(0) + 0.1) - np.log(adata.X[~up].mean(0) + 0.1)
    further = ~adata.var["highly_variable"].to_numpy()
    best = adata.var_names[further][change[further].argmax()]
    assert list(names).index(best) < 12


def test_files_and_projections_have_them(tmp_path: Path) -> None:
    cells = small_counts(n_obs=120)
    adata, new = cells[:80].copy(), cells[80:, ::-1].copy()
    small_fit(adata, **FEW)
    tl.extend_genes(adata, min_counts=1)
    genes = list(adata.uns["scuvae"]["further"]["var_names"])
    truth = tl.denoise(adata, genes=genes)
    adata.write_h5ad(tmp_path / "fit.h5ad")
    back = ad.read_h5ad(tmp_path / "fit.h5ad")
    assert fingerprint(tl.denoise(back, genes=genes)) == fingerprint(truth)
    io.write_model(tmp_path / "model.scuvae", adata)
    tl.project(new, tmp_path / "model.scuvae")
    found = tl.denoise(new, genes=genes)
    # 40 new cells' counts, by their fitted genes alone: the programmes are strong.
    np.testing.assert_allclose(found.sum(), new[:, genes].X.sum(0), rtol=0.35)
    # Of half of the fitted genes too: rates are relative to the observed.
    half = new.var_names[new.var["highly_variable"]][::2]
    few = new[:, new.var_names.isin([*half, *genes])].copy()
    tl.project(few, adata)
    again = tl.denoise(few, genes=genes)
    assert np.abs(np.log(again.sum() / found.sum())).max() < 0.2


def test_damage_is_found() -> None:
    adata = extended()
    adata.uns["scuvae"]["further"]["output"]["bias"][0] += 1
    with pytest.raises(ValueError, match=r"further/output/bias.*damaged"):
        tl.denoise(adata)


def test_a_second_call_replaces_the_first() -> None:
    adata = extended()
    all_of = copy.deepcopy(adata.uns["scuvae"]["further"])
    one = str(all_of["var_names"][3])
    tl.extend_genes(adata, genes=[one])
    assert list(adata.uns["scuvae"]["further"]["var_names"]) == [one]
    # Genes have nothing in common: alone, a gene gets what it got among others, to L-BFGS's end.
    alone = adata.uns["scuvae"]["further"]["output"]["weight"][0]
    np.testing.assert_allclose(alone, all_of["output"]["weight"][3], atol=0.02)
    with pytest.raises(ValueError, match="no gene that was modelled"):
        tl.denoise(adata, genes=[str(all_of["var_names"][0])])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such gene": ({"genes": ["gene0", "GAPDH"]}, "'GAPDH' is no gene of adata"),
    "fitted": ({"genes": ["gene1"]}, "'gene1' was fitted"),
    "both": ({"genes": ["gene0"], "mask_var": "highly_variable"}, "leave out one"),
    "none left": ({"mask_var": "highly_variable"}, "there is none to add"),
    "few counts": ({"min_counts": 10**6}, "none of the 14 genes has 1000000 counts"),
    "another fit": ({"key": "other"}, "holds no fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be(case: str) -> None:
    arguments, message = BAD[case]
    adata = small_fit(small_counts(), **FEW)
    with unchanged(adata), pytest.raises(ValueError, match=message):
        tl.extend_genes(adata, **arguments)


def test_counts_only() -> None:
    adata = small_data("gaussian")
    small_fit(adata, likelihood="gaussian", **FEW)
    with unchanged(adata), pytest.raises(ValueError, match="'gaussian' is of no counts"):
        tl.extend_genes(adata)
    adata = small_fit(small_counts(), **FEW)
    adata.X[3, 0] = 0.5
    with unchanged(adata), pytest.raises(ValueError, match=r"0\.5 at cell 'cell3', gene 'gene0'"):
        tl.extend_genes(adata)


def test_a_copy_and_a_view_leave_adata_alone() -> None:
    adata = small_fit(small_counts(), **FEW)
    with unchanged(adata):
        result = tl.extend_genes(adata, min_counts=1, copy=True)
        view = adata[:40]
        with pytest.warns(UserWarning, match="view"):
            tl.extend_genes(view, min_counts=1)
    assert result is not None
    assert len(result.uns["scuvae"]["further"]["var_names"]) == 14
    assert tl.extend_genes(adata, min_counts=1) is None
    assert fingerprint(result) == fingerprint(adata)
    assert "further" in view.uns["scuvae"]
