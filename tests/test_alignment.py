"""Cells of a kind over the levels of covariates: simulated mixtures of regressions with known
effects, ridge regression and scipy's densities as the truths."""

import copy

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import fingerprint, small_counts, small_fit
from scipy.stats import multivariate_normal

import scuvae
from scuvae import pp, tl
from scuvae.inference.mapping import alignment
from scuvae.inference.mapping.alignment import Alignment, fit_alignment
from scuvae.io.fit_state import sealed
from scuvae.io.integrity.manifest import Damaged
from scuvae.model.covariates import Categorical, Continuous, Covariates, Design

KINDS = torch.tensor([[6.0, 0, 0], [0, 6, 0], [0, 0, 6]])


def cells(
    n: int, n_batches: int, *, continuous: bool = False, seed: int = 0
) -> tuple[Covariates, torch.Tensor, torch.Generator]:
    """Covariates of cells, each one's kind, and where more numbers come from."""
    generator = torch.Generator().manual_seed(seed)
    design = Design(
        (Categorical("batch", tuple("abcdef"[:n_batches])),),
        (Continuous("age", 0.0, 1.0),) if continuous else (),
        has_batch=True,
    )
    codes = torch.randint(n_batches, (n, 1), generator=generator)
    values = torch.randn(n, len(design.continuous), generator=generator)
    kind = torch.randint(3, (n,), generator=generator)
    return Covariates(design, codes, values), kind, generator


def rows(covariates: Covariates) -> torch.Tensor:
    return covariates.rows(torch.arange(len(covariates.codes)))


def test_effects_of_each_kind_are_recovered_and_taken_out() -> None:
    covariates, kind, generator = cells(1500, 2, continuous=True)
    effect = 0.4 * torch.randn(3, 3, 3, generator=generator)
    effect[:, :2] -= effect[:, :2].mean(1, keepdim=True)  # of levels, what is common is the kind's
    told = rows(covariates)
    noise = 0.5 * torch.randn(1500, 3, generator=generator)
    added = torch.einsum("np,npl->nl", told, effect[kind])
    z = KINDS[kind] + added + noise
    found = fit_alignment(z, covariates, torch.eye(3))
    assert found is not None
    aligned = found.aligned(z, covariates)
    left = (aligned - KINDS[kind] - noise).square().mean().sqrt()
    assert left < 0.12 < 0.4 * added.square().mean().sqrt()
    r = found.responsibilities(z, told)
    whole = torch.stack(
        [
            torch.einsum("mk,mkpl->pl", r[:, kind == k].mean(1), found.effect) / len(r)
            for k in range(3)
        ]
    )
    np.testing.assert_allclose(whole, effect, atol=0.12)


def test_where_covariates_do_nothing_cells_stay() -> None:
    covariates, kind, generator = cells(1500, 6)
    z = KINDS[kind] + torch.randn(1500, 3, generator=generator)
    found = fit_alignment(z, covariates, torch.eye(3))
    assert found is not None
    moved = (found.aligned(z, covariates) - z).square().mean().sqrt()
    # Raw means of some 80 cells a level and kind would move them by 1 / √80 = .11.
    assert moved < 0.05


def test_kinds_that_one_batch_alone_has_stay_where_they_are() -> None:
    """Batch a has kinds 0 and 1, b has 1 and 2: 0 is not 2 in another batch."""
    covariates, kind, generator = cells(1500, 2)
    kind = torch.where(covariates.codes[:, 0] == 0, kind.clamp_max(1), kind.clamp_min(1))
    z = KINDS[kind] + 0.3 * torch.randn(1500, 3, generator=generator)
    z[(kind == 1) & (covariates.codes[:, 0] == 1)] += torch.tensor([0.0, 0.0, 0.5])
    found = fit_alignment(z, covariates, torch.eye(3))
    assert found is not None
    aligned = found.aligned(z, covariates)
    for own in (0, 2):
        moved = (aligned - z)[kind == own].norm(dim=1)
        assert moved.max() < 0.5  # they are 8.5 apart
    means = [aligned[(kind == 1) & (covariates.codes[:, 0] == b)].mean(0) for b in (0, 1)]
    assert (means[0] - means[1]).norm() < 0.1


def test_chances_are_those_of_a_mixture_of_regressions() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 3, generator=generator).double()
    covariance = root @ root.T + torch.eye(3)
    found = Alignment(
        torch.tensor([[0.2, 0.8]]).double(),
        torch.randn(1, 2, 3, generator=generator).double(),
        torch.randn(1, 2, 4, 3, generator=generator).double(),
        torch.linalg.cholesky(torch.linalg.inv(covariance)).unsqueeze(0),
        torch.ones(1, 4).double(),
    )
    z, told = torch.randn(5, 3, generator=generator).double(), torch.rand(5, 4).double()
    densities = np.empty((5, 2))
    for k in range(2):
        mean = found.centre[0, k] + told @ found.effect[0, k]
        for i in range(5):
            one = multivariate_normal(mean[i].numpy(), covariance.numpy())
            densities[i, k] = found.weight[0, k] * one.pdf(z[i].numpy())
    truth = densities / densities.sum(1, keepdims=True)
    np.testing.assert_allclose(found.responsibilities(z, told)[0], truth, rtol=1e-8)
    added = torch.einsum(
        "nk,nkl->nl", torch.as_tensor(truth), torch.einsum("np,kpl->nkl", told, found.effect[0])
    )
    np.testing.assert_allclose(found.added(torch.as_tensor(truth)[None], told), added)


def test_effects_are_ridge_regressions_by_chances() -> None:
    covariates, _, generator = cells(200, 3, continuous=True)
    told = rows(covariates).double()
    z = torch.randn(200, 2, generator=generator).double()
    r = torch.rand(200, 2, generator=generator).double()
    r = r / r.sum(1, keepdim=True)
    size = torch.tensor([0.1, 0.1, 0.1, 0.5]).double()
    groups = [slice(0, 3), slice(3, 4)]
    found, precision = alignment.maximised(z, told, r, groups, size, torch.eye(2).double())
    x = torch.cat([torch.ones(200, 1).double(), told], 1)
    left = torch.zeros(2, 2).double()
    for k in range(2):
        # The same least squares with rows of the prior below those of cells.
        root = r[:, k : k + 1].sqrt()
        prior = torch.diag(torch.cat([torch.tensor([1e-3]).double(), size.rsqrt()]))
        wide = torch.cat([root * x, prior])
        target = torch.cat([root * z, torch.zeros(5, 2).double()])
        beta = torch.linalg.lstsq(wide, target).solution
        np.testing.assert_allclose(found.centre[0, k], beta[0], atol=1e-8)
        np.testing.assert_allclose(found.effect[0, k], beta[1:], atol=1e-8)
        apart = z - x @ beta
        left += (r[:, k : k + 1] * apart).T @ apart
    np.testing.assert_allclose(torch.linalg.inv(precision), left / 200, atol=1e-5)


def test_a_new_level_is_estimated_and_nothing_else_moves() -> None:
    covariates, kind, generator = cells(1500, 3)
    effect = 0.4 * torch.randn(3, 3, 3, generator=generator)
    effect -= effect.mean(1, keepdim=True)
    noise = 0.5 * torch.randn(1500, 3, generator=generator)
    z = KINDS[kind] + torch.einsum("np,npl->nl", rows(covariates), effect[kind]) + noise
    old = covariates.codes[:, 0] < 2
    few = Design((Categorical("batch", ("a", "b")),), has_batch=True)
    known = Covariates(few, covariates.codes[old], covariates.values[old])
    found = fit_alignment(z[old], known, torch.eye(3))
    assert found is not None
    new = Covariates(covariates.design, covariates.codes[~old], covariates.values[~old])
    wider = found.with_levels(few, z[~old], new)
    np.testing.assert_array_equal(wider.effect[:, :, :2], found.effect)
    before = torch.stack([found.aligned(z[old], known)[kind[old] == k].mean(0) for k in range(3)])
    after = torch.stack([wider.aligned(z[~old], new)[kind[~old] == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(after, before, atol=0.15)
    assert found.with_levels(few, z[old], known).effect.equal(found.effect)


def test_few_cells_and_many_columns_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    covariates, kind, _ = cells(150, 2)
    assert fit_alignment(KINDS[kind], covariates, torch.eye(3)) is None
    monkeypatch.setattr(alignment, "LARGEST_DESIGN", 1)
    covariates, kind, _ = cells(300, 2)
    assert fit_alignment(KINDS[kind], covariates, torch.eye(3)) is None


@pytest.fixture(scope="module")
def fitted() -> ad.AnnData:
    """Counts of two batches of which one has a programme more of in one half of the cells."""
    rng = np.random.default_rng(0)
    adata = small_counts(n_obs=300, n_vars=40)
    adata.obs["batch"] = rng.choice(["x", "y"], 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "CELLS_A_KIND", (50, 75))
        small_fit(adata, batch_key="batch", max_epochs=5)
    return adata


def test_the_map_the_neighbours_and_other_data_go_by_one_alignment(fitted, tmp_path) -> None:
    saved = fitted.uns["scuvae"]["embed"]["alignment"]
    assert saved["effect"].shape == (2, 6, 2, 3)
    assert (saved["weight"] > 0).sum(1).tolist() == [6, 4]
    other = fitted[:, ::-1].copy()
    tl.project(other, fitted, key_added="new")
    again = fitted.copy()
    again.obsm["X_scuvae"] = other.obsm["new"]
    whole = tl.embed(again, align=False, copy=True)
    assert "alignment" not in whole.uns["scuvae"]["embed"]
    assert np.abs(whole.obsm["X_scuvae_embed"] - other.obsm["new_embed"]).max() > 1e-3
    fitted.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    tl.project(other, back, key_added="read")
    np.testing.assert_array_equal(other.obsm["read_embed"], other.obsm["new_embed"])
    graph = pp.neighbors(fitted, n_neighbors=5, n_samples=200, copy=True)
    near = graph.obsp["distances"]
    points = fitted.obsm["X_scuvae_embed"]
    row, column = near.nonzero()
    np.testing.assert_allclose(
        near[row, column].A1, np.linalg.norm(points[row] - points[column], axis=1), rtol=1e-3
    )


def test_cells_of_a_batch_are_decoded_where_cells_of_that_batch_are(fitted) -> None:
    """As if from y, a cell of x is at z plus what y adds to its kind less what x does."""
    model = scuvae.get.model(fitted)
    like = torch.zeros(1)
    found = Alignment.of(fitted.uns["scuvae"]["embed"]["alignment"], like)
    z = torch.as_tensor(np.asarray(fitted.obsm["X_scuvae"]))
    names = fitted.obs["batch"].to_numpy()
    own = torch.as_tensor(np.stack([names == "x", names == "y"], 1).astype(np.float32))
    there = torch.tensor([[0.0, 1.0]]).expand(len(z), -1)
    r = found.responsibilities(z, own)
    added = torch.einsum("mnk,np,mkpl->nl", r, there - own, found.effect) / len(r)
    with torch.no_grad():
        eta = model.decoder(z + added, there)
        mean = model.likelihood.mean(eta, torch.full((len(z),), 1000.0))
    shown = tl.denoise(fitted, batch="y", library_size=1000.0, genes=fitted.var_names, n_samples=0)
    np.testing.assert_allclose(shown, mean, rtol=1e-4, atol=1e-5)
    as_is = tl.denoise(fitted, library_size=1000.0, genes=fitted.var_names, n_samples=0)
    np.testing.assert_allclose(shown[names == "y"], as_is[names == "y"], rtol=1e-5)


def test_a_batch_that_is_new_gets_effects_of_its_own(fitted) -> None:
    new = small_counts(n_obs=40, n_vars=40, seed=1)
    new.obs["batch"] = "z"
    tl.project(new, fitted, new_batches="estimate", polish=False)
    known, own = (one.uns["scuvae"]["embed"]["alignment"] for one in (fitted, new))
    np.testing.assert_array_equal(own["effect"][:, :, :2], known["effect"])
    assert np.abs(own["effect"][:, :, 2]).max() > 0
    again = new.copy()
    tl.project(again, new, polish=False)
    np.testing.assert_array_equal(
        again.uns["scuvae"]["embed"]["alignment"]["effect"], own["effect"]
    )


def test_a_damaged_alignment_is_named(fitted) -> None:
    broken = fitted.copy()
    entry = copy.deepcopy(dict(broken.uns["scuvae"]))
    saved = entry["embed"]["alignment"]
    saved["effect"] = saved["effect"][:, :, :, :2]
    broken.uns["scuvae"] = sealed(entry)
    before = fingerprint(broken)
    with pytest.raises(Damaged, match="alignment"):
        tl.denoise(broken, batch="y")
    assert fingerprint(broken) == before
