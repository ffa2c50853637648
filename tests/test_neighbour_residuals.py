"""Whether a cell's residuals agree with its neighbours': against scipy, and where single cells say
nothing."""

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import batch_of, cells_of, model_of
from torch import Tensor

from scuvae.inference.mapping.neighbour_residuals import Neighbours, Residuals, joined, residuals
from scuvae.model import VAE

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def drawn(model: VAE, n_cells: int, total: float) -> tuple[Tensor, Tensor, Tensor]:
    """z, size factors, and values of the model there."""
    z = torch.randn(n_cells, model.n_latent, dtype=torch.float64)
    size = total * torch.exp(0.5 * torch.randn(n_cells, dtype=torch.float64))
    with torch.no_grad():
        return z, size, model.likelihood.sample(model.decoder(z), size)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["negative_binomial", "gaussian"])
def test_agreement_is_its_formula(name: str, masked: bool) -> None:
    """Cell by cell and gene by gene, with scipy's moments, and each cell's four nearest others."""
    model = model_of(name)
    x = cells_of(model, 9)
    observed = torch.arange(12) != 5 if masked else None
    batch = batch_of(x, observed=observed, sparse=model.likelihood.support == "counts")
    z = torch.randn(9, 2, dtype=torch.float64)
    parts = [residuals(model, batch.take(rows), z[rows]) for rows in torch.arange(9).split(5)]
    cells, counts = joined(parts), model.likelihood.support == "counts"
    pool = [0, 2, 3, 5, 7, 8]
    among = Residuals(*(getattr(cells, f)[pool] for f in ("mean", "value", "expected", "variance")))
    found = Neighbours(among, 4, support=model.likelihood.support).residual_score(cells)

    kept = np.arange(12) != 5 if masked else np.ones(12, bool)
    eta = model.decoder(z).detach().numpy()[:, kept]
    values, places = x.numpy()[:, kept], z.numpy()
    if counts:
        share = np.exp(eta) / np.exp(eta).sum(1, keepdims=True)
        mu = share * values.sum(1, keepdims=True)
        theta = model.likelihood.log_theta.detach().exp().numpy()[kept]
        law = stats.nbinom(theta, theta / (theta + mu))
        mean, variance = law.mean(), law.var()
    else:
        mean, variance = eta, np.full_like(eta, float(model.likelihood.scale[0].detach()) ** 2)
    for i in range(9):
        others = sorted(
            (j for j in pool if j != i), key=lambda j: np.linalg.norm(places[i] - places[j])
        )[:4]
        along = across = 0.0
        for g in range(kept.sum()):
            missed = sum(values[j, g] - mean[j, g] for j in others)
            weight = missed / (counts + sum(variance[j, g] for j in others))
            along += (values[i, g] - mean[i, g]) * weight
            across += variance[i, g] * weight**2
        assert found[i] == pytest.approx(along / across**0.5, rel=1e-9)


@pytest.mark.parametrize("total", [20.0, 500.0])
@pytest.mark.parametrize("name", ["negative_binomial", "zero_inflated_negative_binomial"])
def test_under_the_model_it_is_standard(name: str, total: float) -> None:
    model = model_of(name, n_vars=40)
    z, size, x = drawn(model, 2000, total)
    cells = residuals(model, batch_of(x, size_factor=size), z)
    found = Neighbours(cells, 20, support="counts").residual_score(cells)
    # four standard errors: counts are not normal, with an excess kurtosis of up to 2
    assert abs(found.mean()) < 4 / 2000**0.5
    assert found.var() == pytest.approx(1.0, abs=4 * (4 / 2000) ** 0.5)


def test_what_no_cell_shows_its_neighbours_show() -> None:
    """Ten genes of 200 two thirds higher, in cells of a few hundred counts."""
    model = model_of("negative_binomial", n_vars=200)
    with torch.no_grad():
        model.likelihood.log_theta.fill_(2.0)
    z, size, x = drawn(model, 600, 400.0)
    z[:200] = 0.3 * z[:200] + 1  # one kind, at one place, where others are too
    novel = torch.arange(600) < 200
    with torch.no_grad():
        eta = model.decoder(z)
        eta[:200, :10] += 0.5
        x = model.likelihood.sample(eta, size)
    cells = residuals(model, batch_of(x), z)
    alone = (cells.residual.square() / cells.variance.clamp_min(1e-9)).sum(1)
    shared = Neighbours(cells, 20, support="counts").residual_score(cells)

    def auroc(score: Tensor) -> float:
        u = stats.mannwhitneyu(score[novel].numpy(), score[~novel].numpy())
        return float(u.statistic) / (200 * 400)

    assert auroc(alone) < 0.6
    assert auroc(shared) > 0.75


@pytest.mark.parametrize("name", ["negative_binomial", "gaussian"])
def test_what_all_cells_have_is_taken_out(name: str) -> None:
    """As some of them say: the others are off by more, which is left."""
    model = model_of(name, n_vars=40)
    z, _, x = drawn(model, 1500, 300.0)
    off, more = torch.rand(2, 40, dtype=torch.float64)
    support = model.likelihood.support
    counts = support == "counts"
    x = torch.binomial(x, off.expand_as(x)) if counts else x + off
    x[1000:] = torch.binomial(x[1000:], more.expand(500, -1)) if counts else x[1000:] + more
    cells, some = residuals(model, batch_of(x), z), torch.arange(1500) < 1000
    found = [
        Neighbours(cells, 20, support=support, adjust_by=by).residual_score(cells)
        for by in (None, some)
    ]
    assert found[0][some].mean() > 0.8
    # factors are of totals, which each cell has another mix of: not to the last tenth
    assert abs(found[1][some].mean()) < 0.3
    assert found[1][~some].mean() > 0.5


def test_empty_cells_and_cells_at_one_place() -> None:
    model = model_of("negative_binomial")
    x = cells_of(model, 8)
    x[2:6] = 0.0
    z = torch.randn(8, 2, dtype=torch.float64)
    z[2:6] = 0.0
    cells = residuals(model, batch_of(x), z)
    found = Neighbours(cells, 7, support="counts").residual_score(cells)
    assert found.isfinite().all()
    assert (found[2:6].abs() < 1e-9).all()
    assert (found[[0, 1, 6, 7]].abs() > 1e-3).all()
