"""Differential expression against truths that are not its own code: scipy, simulation, scanpy."""

from functools import cache
from pathlib import Path
from typing import Any

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from helpers import fingerprint, small_counts, small_data, small_fit, unchanged
from scipy import optimize, special, stats

from scuvae import get, pl, tl
from scuvae.inference.evaluation.adaptive_shrinkage import clearness, expected_false, shrink
from scuvae.inference.evaluation.change_from_others import regress
from scuvae.inference.evaluation.differential_expression import (
    Comparison,
    Units,
    compare,
    composition,
    normal_quantile,
)
from scuvae.inference.evaluation.group_contrast import contrast
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.tl._groups import design_of
from scuvae.tl._rank_genes import Ranking


def units_of(
    counts: np.ndarray,
    first: np.ndarray,
    *,
    exposure: np.ndarray | None = None,
    variance: float = 0.0,
    pair: np.ndarray | None = None,
    stratum: np.ndarray | None = None,
) -> Units:
    n = len(counts)
    return Units(
        torch.as_tensor(counts).double(),
        torch.ones(n).double() if exposure is None else torch.as_tensor(exposure).double(),
        torch.full(counts.shape, variance).double(),
        torch.as_tensor(first),
        torch.zeros(n).long() if stratum is None else torch.as_tensor(stratum),
        torch.full((n,), -1) if pair is None else torch.as_tensor(pair),
    )


# --- the likelihood -------------------------------------------------------------------------------


def test_the_profile_likelihood_is_scipys() -> None:
    """Negative binomials with a level for each stratum, by scipy's densities and optimiser."""
    rng = np.random.default_rng(0)
    y = rng.negative_binomial(3, 0.2, (7, 2))
    first, stratum = np.arange(7) % 2 == 0, np.array([0, 0, 0, 0, 1, 1, 1])
    exposure = rng.uniform(0.5, 2, 7)
    spread, variance = 0.45, 0.1
    units = units_of(y, first, exposure=exposure, variance=variance, stratum=stratum)
    change = torch.tensor([[-0.7, 0.3], [0.4, 1.1]]).double()
    found = Comparison(units, slice(None)).log_likelihood(change, spread)
    phi = spread**2 + variance
    for node in range(2):
        for gene in range(2):
            expected = 0.0
            for level in (0, 1):
                of = stratum == level

                def log_l(beta: float, of: Any = of, gene: int = gene, node: int = node) -> Any:
                    mu = exposure[of] * np.exp(beta + float(change[node, gene]) * first[of])
                    return stats.nbinom(1 / phi, 1 / (1 + phi * mu)).logpmf(y[of, gene]), mu

                best = optimize.minimize_scalar(lambda b: -log_l(b)[0].sum(), (0, 2), tol=1e-12)
                values, mu = log_l(best.x)
                # Less what does not depend on parameters, and Laplace's term added.
                constant = stats.nbinom(1e9, 1e9 / (1e9 + 1)).logpmf(0) * 0
                expected += values.sum() + constant - 0.5 * np.log((mu / (1 + phi * mu)).sum())
            expected += special.gammaln(y[:, gene] + 1).sum()
            assert float(found[node, gene]) == pytest.approx(expected, abs=1e-6)


def test_pairs_are_beta_binomial() -> None:
    """Of a donor's total one group's part: its logit varies by 2 τ², whatever the donor's level."""
    y = np.array([[8, 3], [5, 9], [2, 0], [6, 1]])
    first, pair = np.array([True, False, True, False]), np.array([4, 4, 9, 9])
    exposure = np.array([1.0, 2.0, 0.5, 3.0])
    found = Comparison(units_of(y, first, exposure=exposure, pair=pair), slice(None))
    change, spread = torch.tensor([[0.2, -1.0]]).double(), 0.6
    log_l = found.log_likelihood(change, spread)
    for gene in range(2):
        expected = 0.0
        for a, b in ((0, 1), (2, 3)):
            odds = exposure[a] / exposure[b] * np.exp(float(change[0, gene]))
            p = odds / (1 + odds)
            size = 1 / (2 * spread**2 * p * (1 - p))
            n = y[a, gene] + y[b, gene]
            expected += stats.betabinom(n, size * p, size * (1 - p)).logpmf(y[a, gene])
            expected -= np.log(stats.binom(n, 0.5).pmf(y[a, gene]) * 2.0**n)  # the coefficient
        assert float(log_l[0, gene]) == pytest.approx(expected, abs=1e-8)


def test_a_donors_own_level_leaves_pairs_alone() -> None:
    """Donors' levels differ tenfold, their two totals by their counts' noise alone."""
    rng = np.random.default_rng(1)
    first, pair = np.arange(8) < 4, np.tile(np.arange(4), 2)
    level = np.exp(rng.normal(0, 1.5, (4, 300)))
    y = rng.poisson(300 * np.tile(level, (2, 1)))
    paired = compare(units_of(y, first, pair=pair), donors=True)
    alone = compare(units_of(y, first), donors=True)
    truth = np.log(y[:4].sum(0) / y[4:].sum(0))
    assert float(paired.change.abs().median()) < 0.1 * float(alone.change.abs().median()) + 0.05
    assert np.corrcoef(paired.change, truth)[0, 1] > 0.5
    # Three standard errors of 300 genes; with no spread at all p is a little large.
    assert 0.005 < float((paired.log_p < np.log(0.05)).double().mean()) < 0.05 + 3 * 0.0126


@pytest.mark.parametrize(
    ("a", "b", "e"), [(3, 0, 1.0), (12, 30, 0.5), (0, 40, 2.0), (500, 400, 1.0)]
)
def test_without_donors_it_is_the_likelihood_ratio_of_two_poissons(
    a: int, b: int, e: float
) -> None:
    units = units_of(np.array([[a], [b]]), np.array([True, False]), exposure=np.array([e, 1.0]))
    found = compare(units, donors=False)
    rate = (a + b) / (1 + e)
    full = stats.poisson(max(a, 1e-9)).logpmf(a) + stats.poisson(max(b, 1e-9)).logpmf(b)
    none = stats.poisson(rate * e).logpmf(a) + stats.poisson(rate).logpmf(b)
    expected = stats.chi2(1).logsf(2 * (full - none))
    # δ's grid ends, which a zero's likelihood does not, and Laplace's term is of few counts.
    assert float(found.log_p) == pytest.approx(expected, rel=0.12, abs=0.3)
    if a and b:
        assert float(found.change) == pytest.approx(np.log(a / b / e), abs=0.06)


def test_quantiles_of_tiny_p() -> None:
    log_p = torch.tensor([0.0, np.log(0.05), np.log(1e-10), -1000.0, -1e5]).double()
    z = normal_quantile(log_p).numpy()
    np.testing.assert_allclose(stats.norm.logsf(z) + np.log(2), log_p, rtol=1e-8, atol=1e-8)


# --- rates, by simulation -------------------------------------------------------------------------


def simulated(
    seed: int, donors: int, mean: float, changed: float, n_genes: int = 1500
) -> tuple[Units, np.ndarray]:
    """Gamma-Poisson donors whose spread differs by gene; means from a hundredth to a hundred."""
    rng = np.random.default_rng(seed)
    first = np.arange(2 * donors) < donors
    spread2 = 0.2**2 / rng.gamma(3, 1 / 3, n_genes)
    change = np.where(
        rng.random(n_genes) < changed, rng.choice([-1, 1], n_genes) * rng.gamma(4, 0.25, n_genes), 0
    )
    level = mean * np.exp(1.5 * rng.normal(size=n_genes))
    exposure = np.exp(0.3 * rng.normal(size=2 * donors))
    mu = exposure[:, None] * level * np.exp(first[:, None] * change)
    y = rng.poisson(mu * rng.gamma(1 / spread2, spread2, mu.shape))
    keep = y.sum(0) >= 10
    return units_of(y[:, keep], first, exposure=exposure), change[keep]


@pytest.mark.parametrize(("donors", "mean"), [(3, 30.0), (4, 4.0), (8, 100.0)])
def test_p_is_uniform_where_nothing_changes(donors: int, mean: float) -> None:
    units, _ = simulated(0, donors, mean, 0.0)
    p = compare(units, donors=True).log_p.exp().numpy()
    for level in (0.2, 0.05, 0.01):
        # Three standard errors of some 1,500 genes, and a tenth for an estimated spread.
        allowed = level * 1.1 + 3 * np.sqrt(level / len(p))
        assert (p < level).mean() < allowed
    assert (p < 0.05).mean() > 0.02


def test_false_discovery_rates_hold_and_are_expected() -> None:
    rates, bayes, found = [], [], []
    for seed in range(2):
        units, change = simulated(seed, 4, 30.0, 0.1)
        evidence = compare(units, donors=True)
        q = stats.false_discovery_control(evidence.log_p.exp().numpy())
        error = expected_false(shrink(evidence.change, evidence.scale).error).numpy()
        for said, kept in ((q, rates), (error, bayes)):
            called = said <= 0.1
            kept.append((change[called] == 0).sum() / called.sum())
            found.append((called & (change != 0)).sum() / (change != 0).sum())
    # .1 × 1.2, and two standard errors of some 300 genes called.
    for kept in (rates, bayes):
        assert np.mean(kept) < 0.12 + 2 * np.sqrt(0.1 * 0.9 / 300)
    assert np.mean(found) > 0.5


def test_composition_is_taken_out() -> None:
    """A tenth of the genes trebles: all others' shares fall, but have not changed."""
    rng = np.random.default_rng(0)
    level = 200 * np.exp(0.5 * rng.normal(size=1000))
    first = np.arange(8) < 4
    mean = np.where(first[:, None] & (np.arange(1000) < 100), 3 * level, level)
    mean = mean / mean.sum(1, keepdims=True) * level.sum()
    units = units_of(rng.poisson(mean), first)
    shift = composition(units)
    true = np.log(level.sum() / (level.sum() + 2 * level[:100].sum()))
    assert float(shift[:4].mean() - shift[4:].mean()) == pytest.approx(true, abs=0.03)


# --- shrinkage ------------------------------------------------------------------------------------


def test_posteriors_of_changes_are_calibrated() -> None:
    """Normal means, some zero: errors said are errors made; a threshold leaves out the small."""
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(4000) < 0.8, 0, rng.normal(0, 0.8, 4000))
    scale = rng.uniform(0.1, 0.5, 4000)
    estimate = truth + scale * rng.normal(size=4000)
    for threshold in (0.0, 0.3):
        out = shrink(torch.tensor(estimate), torch.tensor(scale), threshold=threshold)
        said = expected_false(out.error).numpy()
        called = said <= 0.1
        wrong = (np.abs(truth) <= threshold) | (np.sign(truth) != np.sign(estimate))
        # .1, and two standard errors of some 300 genes.
        assert wrong[called].mean() < 0.1 + 2 * np.sqrt(0.09 / called.sum())
        assert called.sum() > 150
        assert (out.beyond >= 0).all()
        assert (out.beyond <= 1).all()
    # The average over lists is not the last gene's own.
    np.testing.assert_allclose(
        expected_false(torch.tensor([0.3, 0.1, 0.1, 0.9])), [0.5 / 3, 0.1, 0.1, 1.4 / 4]
    )


@pytest.mark.parametrize("right", [True, False])
def test_predictions_help_where_they_are_right_and_do_no_harm(right: bool) -> None:
    rng = np.random.default_rng(1)
    truth = np.where(rng.random(3000) < 0.9, 0, rng.choice([-1, 1], 3000) * rng.gamma(4, 0.2, 3000))
    estimate, scale = truth + 0.4 * rng.normal(size=3000), np.full(3000, 0.4)
    told = truth if right else rng.permutation(truth)
    predicted = 0.6 * told + 0.1 * rng.normal(size=3000)
    given = [torch.tensor(value) for value in (estimate, scale, predicted)]
    clear = clearness(given[2], torch.full_like(given[2], 0.1))
    found = {}
    for name, out in {"with": shrink(*given, clear), "without": shrink(*given[:2])}.items():
        called = (expected_false(out.error) <= 0.1).numpy()
        assert (truth[called] == 0).mean() < 0.1 + 2 * np.sqrt(0.09 / called.sum())
        found[name] = (called & (truth != 0)).sum()
    if right:
        assert found["with"] > 1.3 * found["without"]
    else:
        assert found["with"] > 0.85 * found["without"]


# --- what other cells say -------------------------------------------------------------------------


def test_slopes_are_those_of_a_poisson_ridge() -> None:
    adata = small_fit(small_counts(), likelihood="poisson")
    cells = cells_of(adata, read_fit(adata, None))
    z = torch.as_tensor(adata.obsm["X_scuvae"])
    rows = torch.arange(10, 60)
    slopes = regress(cells, rows, z, torch.tensor([2, 7]))
    x, size = adata.X[10:], adata.X[10:].sum(1)
    design = np.c_[np.ones(50), z[10:] - z[10:].mean(0)]
    for i, gene in enumerate((2, 7)):

        def loss(beta: np.ndarray, gene: int = gene) -> float:
            eta = design @ beta + np.log(size)
            return float((np.exp(eta) - x[:, gene] * eta).sum() + 0.5 * (beta[1:] ** 2).sum())

        best = optimize.minimize(loss, np.zeros(design.shape[1]), tol=1e-10)
        np.testing.assert_allclose(slopes.beta[:, i], best.x[1:], atol=0.02)  # four Newton steps


# --- the order of markers -------------------------------------------------------------------------


def test_a_contrast_is_that_of_gamma_posteriors() -> None:
    """Two batches of three groups, one of which is in one batch: by scipy's densities."""
    rng = np.random.default_rng(0)
    group, batch = np.array([0, 1, 2, 0, 1]), np.array([0, 0, 0, 1, 1])
    y, e = rng.poisson(4, (5, 3)), rng.uniform(1, 9, 5)
    y[:, 2] = 0
    cells = np.array([10.0, 40, 30, 5, 60])
    found = contrast(*map(torch.as_tensor, (y * 1.0, e, cells, group, batch)), 0).numpy()
    assert found[2] == 0  # no count
    shares = np.sqrt([100, 30]) / np.sqrt([100, 30]).sum()
    within = np.array([1 / (1 / e[0] + 1 / e[1]), 1 / (1 / e[3] + 1 / e[4])])
    within = within / within.sum()
    on = np.zeros(5)
    on[[0, 3]] += shares[0] * within
    on[[1, 4]] -= shares[0] * within
    on[0], on[2] = on[0] + shares[1], -shares[1]
    for gene in range(2):
        change = variance = 0.0
        for unit in range(5):
            of = batch == batch[unit]
            prior = 0.5 * e[of].sum() / (y[of, gene].sum() + 0.5)
            rate = stats.gamma(y[unit, gene] + 0.5, scale=1 / (e[unit] + prior))
            mean = rate.expect(np.log)
            change += on[unit] * mean
            variance += on[unit] ** 2 * rate.expect(lambda x, m=mean: (np.log(x) - m) ** 2)
        z = abs(change) / np.sqrt(variance)
        assert found[gene] == pytest.approx(change * z / (z + 16), rel=1e-5)


def test_a_marker_that_a_few_cells_share_comes_first() -> None:
    """It is in x and, stronger, in the few cells of y: of the rest as a whole x has no more."""
    rng = np.random.default_rng(0)
    kind = np.repeat(["x", "y", "u", "v"], [200, 20, 340, 340])
    mean = np.ones((900, 60))
    mean[kind == "x", :30] = 1.5
    mean[:, 59] = np.select([kind == "x", kind == "y"], [0.5, 16.0], 0.02)
    obs = pd.DataFrame({"kind": kind}, index=[f"c{i}" for i in range(900)])
    adata = small_fit(AnnData(rng.poisson(mean).astype(np.float32), obs=obs), max_epochs=1)
    tl.rank_genes(adata, "kind", groups=["x"])
    table = table_of(adata, "x")
    assert table.index[0] == "59"
    assert table.loc["59", "pvals"] > table["pvals"][table["logfoldchanges"] > 0].median()


# --- the verb -------------------------------------------------------------------------------------


@cache
def _study(paired: bool) -> AnnData:
    """Four donors an arm, two types; in type b the first ten genes rise by 1.2 in arm 1."""
    rng = np.random.default_rng(0)
    n_genes, rows, obs = 80, [], []
    level = np.exp(rng.normal(size=n_genes)) * 2
    kind_effect = np.where(np.arange(n_genes) >= 60, 1.0, 0.0)
    for donor in range(8):
        own = 0.15 * rng.normal(size=n_genes)
        for arm in (0, 1) if paired else (donor % 2,):
            for kind in "ab":
                eta = np.log(level) + own + kind_effect * (kind == "b")
                eta = eta + 1.2 * (np.arange(n_genes) < 10) * (arm == 1) * (kind == "b")
                rows.append(rng.poisson(np.exp(eta + 0.3 * rng.normal(size=(15, n_genes)))))
                obs += [(kind, str(arm), f"d{donor}", f"{kind}{arm}", f"t{donor // 4}")] * 15
    columns = ["cell_type", "arm", "donor", "group", "tech"]
    table = pd.DataFrame(obs, columns=columns, index=[f"c{i}" for i in range(len(obs))])
    adata = AnnData(np.concatenate(rows).astype(np.float32), obs=table.astype("category"))
    adata.var_names = [f"g{i}" for i in range(n_genes)]
    return small_fit(adata, max_epochs=10)


def study(paired: bool = False) -> AnnData:
    return _study(paired).copy()


def table_of(adata: AnnData, group: str, slot: str = "rank_genes_groups") -> pd.DataFrame:
    result = adata.uns[slot]
    columns = {name: result[name][group] for name in result if name != "params"}
    return pd.DataFrame(columns).set_index("names")


FIELDS = ["names", "scores", "logfoldchanges", "pvals", "pvals_adj"]


@pytest.mark.parametrize("paired", [False, True])
def test_donors_and_a_known_change(paired: bool) -> None:
    adata = study(paired)
    tl.rank_genes(adata, "group", groups=["b1"], reference="b0", donor_key="donor")
    table = table_of(adata, "b1")
    changed = [f"g{i}" for i in range(10)]
    listed = table.index[table["expected_fdr"] <= 0.05]
    assert set(changed) <= set(listed)
    assert len(listed) <= 12  # .05 of them, and the luck of one
    np.testing.assert_allclose(
        table.loc[changed, "logfoldchanges"].mean(), 1.2 / np.log(2), atol=0.2
    )
    np.testing.assert_allclose(  # scores and p say the same
        2 * stats.norm.sf(table["scores"].abs()), table["pvals"], rtol=1e-3, atol=1e-7
    )
    np.testing.assert_allclose(
        table["pvals_adj"], stats.false_discovery_control(table["pvals"]), rtol=1e-9
    )
    assert ((table["lfsr"] >= 0) & (table["lfsr"] <= 1)).all()
    tl.rank_genes(adata, "group", groups=["b1"], reference="b0", donor_key="donor", threshold=4)
    assert (table_of(adata, "b1")["prob_de"] < 0.5).all()  # log2: none changes sixteenfold
    # The other way round.
    tl.rank_genes(adata, "group", groups=["b0"], reference="b1", donor_key="donor")
    back = table_of(adata, "b0").loc[table.index]
    np.testing.assert_allclose(back["scores"], -table["scores"], atol=0.15)  # two grids of δ


def test_scanpy_reads_it(tmp_path: Path) -> None:
    adata = study()
    assert tl.rank_genes(adata, "cell_type", groups=["b", "a"], threshold=0.25) is None
    result = adata.uns["rank_genes_groups"]
    for name in FIELDS:
        assert result[name].dtype.names == ("b", "a")
    log = adata.copy()
    sc.pp.log1p(log)
    sc.tl.rank_genes_groups(log, "cell_type", method="wilcoxon")
    theirs = log.uns["rank_genes_groups"]
    assert {n: theirs[n].dtype["a"] for n in FIELDS} == {n: result[n].dtype["a"] for n in FIELDS}
    assert set(theirs["params"]) <= set(result["params"])
    frame = sc.get.rank_genes_groups_df(adata, "b")
    assert frame["scores"].is_monotonic_decreasing
    # What scanpy finds, whose order differs little: types differ in twenty genes by e.
    assert len(set(frame["names"][:20]) & {f"g{i}" for i in range(60, 80)}) >= 18
    assert len(set(frame["names"][:20]) & set(theirs["names"]["b"][:20])) >= 16
    backend = mpl.get_backend()
    mpl.use("Agg")
    try:
        sc.pl.rank_genes_groups(adata, show=False)
        sc.pl.rank_genes_groups_dotplot(adata, n_genes=3, show=False)
        sc.pl.rank_genes_groups_matrixplot(
            adata, n_genes=3, values_to_plot="logfoldchanges", show=False
        )
    finally:
        mpl.pyplot.close("all")
        mpl.use(backend)
    for suffix in ("h5ad", "zarr"):
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        back = getattr(anndata, f"read_{suffix}")(tmp_path / f"a.{suffix}")
        kept = back.uns["rank_genes_groups"]
        assert set(kept) == set(result)
        for group in ("a", "b"):
            pd.testing.assert_frame_equal(
                table_of(back, group), table_of(adata, group), check_like=True
            )
        pd.testing.assert_frame_equal(sc.get.rank_genes_groups_df(back, "b"), frame)


def test_genes_that_were_not_fitted_are_absent_and_silent_ones_never_called() -> None:
    adata = small_counts(n_obs=120)
    adata.X[:, 4] = 0
    adata.X[:, 5] = 0
    adata.X[3, 5] = 2
    mask = np.arange(adata.n_vars) % 7 != 0
    small_fit(adata, mask_var=mask)
    tl.rank_genes(adata, "cell_type", key_added="markers")
    table = table_of(adata, "up", "markers")
    assert set(table.index) == set(adata.var_names[mask])
    assert np.isfinite(table.to_numpy(float)).all()
    silent = table.loc[["gene4", "gene5"]]
    assert (silent[["pvals", "pvals_adj", "lfsr", "expected_fdr"]] == 1).all(axis=None)
    assert (silent["prob_de"] == 0).all()
    assert silent.loc["gene4", "scores"] == 0
    assert "rank_genes_groups" not in adata.uns


def test_cells_without_a_name_are_in_none(caplog: pytest.LogCaptureFixture) -> None:
    adata = study()
    labels = adata.obs["cell_type"].astype(object)
    labels[adata.obs["donor"] == "d0"] = np.nan
    adata.obs["cell_type"] = labels
    with caplog.at_level("INFO", logger="scuvae"):
        tl.rank_genes(adata, "cell_type")
    assert any("30 of 240 cells" in message for message in caplog.messages)
    kept = adata[adata.obs["donor"] != "d0"].copy()
    tl.rank_genes(kept, "cell_type")
    assert fingerprint(kept.uns["rank_genes_groups"]) == fingerprint(adata.uns["rank_genes_groups"])


def test_the_rest_is_all_others_and_order_of_cells_is_nothing() -> None:
    adata = study()
    adata.obs["b or not"] = np.where(adata.obs["group"] == "b1", "b1", "other")
    order = np.random.default_rng(0).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    tl.rank_genes(adata, "group", groups=["b1"])
    tl.rank_genes(adata, "b or not", groups=["b1"], reference="other", key_added="named")
    tl.rank_genes(shuffled, "group", groups=["b1"])
    first = table_of(adata, "b1")
    for other in (table_of(adata, "b1", "named"), table_of(shuffled, "b1")):
        # Chunks of cells: float32 in another order. Scores are against each other group.
        found = other.loc[first.index].drop(columns="scores")
        np.testing.assert_allclose(found, first.drop(columns="scores"), rtol=1e-3, atol=1e-4)
    scores = table_of(shuffled, "b1")["scores"]
    np.testing.assert_allclose(scores[first.index], first["scores"], rtol=1e-6)


def test_batches_are_compared_within() -> None:
    """Batch and type all but confounded, and every other gene doubled by the batch."""
    rng = np.random.default_rng(0)
    n, n_genes = 400, 40
    kind, batch = rng.random(n) < 0.5, np.zeros(n, bool)
    batch[:] = rng.random(n) < np.where(kind, 0.85, 0.15)
    double = np.arange(n_genes) % 4 == 0
    mean = 3 * np.exp(rng.normal(0, 0.3, n_genes)) * np.where(batch[:, None] & double, 3, 1)
    obs = pd.DataFrame(
        {"cell_type": np.where(kind, "x", "y"), "batch": np.where(batch, "p", "q")},
        index=[f"c{i}" for i in range(n)],
    )
    adata = AnnData(rng.poisson(mean).astype(np.float32), obs=obs)
    small_fit(adata, batch_key="batch")
    tl.rank_genes(adata, "cell_type", groups=["x"])
    small_fit(adata, key_added="k")
    tl.rank_genes(adata, "cell_type", groups=["x"], key="k", key_added="r")
    doubled = [str(i) for i in np.flatnonzero(double)]
    assert (table_of(adata, "x", "r").loc[doubled, "pvals_adj"] < 0.01).mean() > 0.9
    assert (table_of(adata, "x").loc[doubled, "pvals"] < 0.05).sum() <= 3
    adata.obs["cell_type"] = adata.obs["batch"]
    with unchanged(adata), pytest.raises(ValueError, match=r"share no batch.*donor_key"):
        tl.rank_genes(adata, "cell_type", groups=["p"])


def test_the_variance_of_a_total_is_that_of_draws() -> None:
    """Law of total variance: cells drawn anew, z from their q, counts about their means."""
    adata = study()
    fit = read_fit(adata, None)
    design = design_of(adata, fit, "cell_type", "all", "rest", None)
    ranking = Ranking(adata, fit, None, design, torch.device("cpu"), 64)
    cells = np.flatnonzero(adata.obs["cell_type"] == "b")
    model, q = get.model(adata), get.posterior(adata)
    size = torch.as_tensor(adata.X.sum(1))
    totals = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        scale = q.scale_tril[cells]
        mean = model.likelihood.mean(model.decoder(q.mean[cells]), size[cells]).sum(0).numpy()
        rate = mean / float(size[cells].sum())
        for _ in range(800):
            some = torch.randint(len(cells), (len(cells),))
            noise = torch.randn(len(cells), q.mean.shape[1], 1)
            z = q.mean[cells][some] + (scale[some] @ noise)[..., 0]
            of_cells = size[cells][some]
            x = model.likelihood.sample(model.decoder(z), of_cells)
            totals.append(x.sum(0).numpy() - float(of_cells.sum()) * rate)
    expected = np.var(totals, axis=0) / mean**2
    unit = next(i for i, (group, _) in enumerate(design.units) if group == 1)
    kappa = ranking.totals.variance()[unit].numpy()
    found = kappa + 1 / ranking.totals.mean[unit].numpy()
    # A variance of 800 draws is good to 5 %; the mean of 80 genes to less.
    assert np.mean(found / expected) == pytest.approx(1, abs=0.05)
    assert np.abs(found / expected - 1).max() < 0.25


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"groupby": "cell_typ"}, ["groupby='cell_typ'", "Did you mean 'cell_type'"]),
        ({"groups": ["c"]}, ["groups: 'c'", "Known: 'a', 'b'"]),
        ({"reference": "c"}, ["reference: 'c'", "reference='rest'"]),
        ({"groups": ["a"], "reference": "a"}, ["nothing but the reference"]),
        ({"donor_key": "doner"}, ["donor_key='doner'", "Did you mean 'donor'"]),
        ({"groupby": "single"}, ["'rest'", "has 1 cell:", "groups="]),
        ({"groupby": "donor", "donor_key": "donor"}, ["'d0'", "1 donor ", "donor_key=None"]),
        ({"groupby": "number"}, ["is float64, a measurement", "astype(str)"]),
        ({"groupby": "nothing"}, ["missing for all cells"]),
        ({"threshold": -1}, ["threshold=-1"]),
        ({"key": "missing"}, ["holds no fit"]),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], parts: list[str]) -> None:
    adata = study()
    adata.obs["single"] = np.where(np.arange(adata.n_obs) == 0, "one", "more")
    adata.obs["number"] = 0.5
    adata.obs["nothing"] = pd.Categorical([None] * adata.n_obs)
    given = {"groupby": "cell_type", **options}
    with unchanged(adata), pytest.raises(ValueError, match=r".") as error:
        tl.rank_genes(adata, given.pop("groupby"), **given)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_values_that_are_no_counts(likelihood: str) -> None:
    adata = small_fit(small_data(likelihood), likelihood=likelihood)
    with pytest.raises(ValueError, match=rf"{likelihood}.*no counts.*scanpy"):
        tl.rank_genes(adata, "cell_type")


def test_donors_in_batches_that_groups_do_not_share() -> None:
    adata = study()
    adata.obs["tech"] = np.where(adata.obs["arm"] == "1", "new", "old")
    small_fit(adata, batch_key="tech", max_epochs=2)
    with pytest.warns(UserWarning, match="share no batch"):
        tl.rank_genes(adata, "group", groups=["b1"], reference="b0", donor_key="donor")


# --- the picture ----------------------------------------------------------------------------------


def test_volcano_draws_the_table() -> None:
    adata = study()
    with pytest.raises(ValueError, match=r"has no 'rank_genes_groups'.*tl.rank_genes"):
        pl.volcano(adata)
    tl.rank_genes(adata, "group", groups=["b1", "a0"], reference="b0", donor_key="donor")
    table = table_of(adata, "b1")
    backend = mpl.get_backend()
    mpl.use("Agg")
    try:
        ax = pl.volcano(adata, n_genes=3, show=False)
        gray, coloured = (part.get_offsets().data for part in ax.collections[:2])
        listed = (table["expected_fdr"] <= 0.05).to_numpy()
        assert (len(gray), len(coloured)) == ((~listed).sum(), listed.sum())
        np.testing.assert_allclose(coloured[:, 0], table["logfoldchanges"][listed])
        np.testing.assert_allclose(gray[:, 1], np.maximum(1 - table["prob_de"][~listed], 1e-12))
        assert f"{listed.sum()} genes" in ax.get_title()
        best = table[listed]["scores"].abs().nlargest(3).index
        assert {text.get_text() for text in ax.texts} == set(best)
        with pytest.raises(ValueError, match="was not compared"):
            pl.volcano(adata, group="b9")
    finally:
        mpl.pyplot.close("all")
        mpl.use(backend)
