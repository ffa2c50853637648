"""Curvature from some of the genes: chances, and what it is on average."""

import numpy as np
import pytest
import torch
from small_models import batch_of, cells_of, model_of

from scuvae.model.curvature import systematic_sample

pytestmark = pytest.mark.usefixtures("fixed_random_state")


def draws(size: torch.Tensor, n: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each item was drawn, and the chance that it then had."""
    count, chance = np.zeros(len(size)), np.zeros(len(size))
    for _ in range(times):
        drawn, of_drawn = systematic_sample(size, n)
        assert len(set(drawn.tolist())) == n
        count[drawn] += 1
        chance[drawn] = of_drawn
    return count, chance


def test_items_are_drawn_with_the_chances_that_are_told() -> None:
    size = torch.exp(1.5 * torch.randn(60))
    size[7] = 0.0
    times = 4000
    count, chance = draws(size, 20, times)
    # proportional to size, where that is not certain
    large = np.argsort(size.numpy())[::-1]
    n_certain = int((chance == 1).sum())
    assert 0 < n_certain < 20
    rest = large[n_certain:-1]
    expected = (20 - n_certain) * size.numpy()[rest] / size.numpy()[rest].sum()
    np.testing.assert_allclose(chance[rest], expected, rtol=1e-5)
    assert (count[large[:n_certain]] == times).all()
    error = np.sqrt(chance * (1 - chance) / times)
    assert (np.abs(count / times - chance) <= 4 * error).all()
    assert count[7] == 0


@pytest.mark.parametrize("size", [torch.zeros(9), torch.tensor([0.0, 3, 0, 0, 2, 0, 0, 0, 0])])
def test_sizes_without_a_difference(size: torch.Tensor) -> None:
    count, chance = draws(size, 2, 900)
    if size.any():
        assert set(np.flatnonzero(count)) == {1, 4}
    else:
        np.testing.assert_allclose(chance, 2 / 9)
        assert (np.abs(count / 900 - 2 / 9) < 4 * np.sqrt(2 / 9 * 7 / 9 / 900)).all()


@pytest.mark.parametrize("name", ["gaussian", "negative_binomial"])
def test_curvature_of_some_genes_is_that_of_all_on_average(name: str) -> None:
    model = model_of(name, n_vars=400)
    batch = batch_of(cells_of(model, 5, total=600.0))
    z = torch.randn(5, 2, dtype=torch.float64)
    whole = model.curvature(batch, z)
    n_genes = model.n_vars
    torch.testing.assert_close(model.curvature(batch, z, n_genes), whole)
    some = torch.stack([model.curvature(batch, z, n_genes // 4) for _ in range(1000)])
    error = some.std(0) / 1000**0.5
    assert (error > 0).any()
    # A centre from the same genes is a ratio, whose error adds a gene's share.
    of_centre = 0.0 if name == "gaussian" else 4 / n_genes
    largest = whole.abs().amax((1, 2), keepdim=True)
    assert ((some.mean(0) - whole).abs() < 4.5 * error + (of_centre + 1e-9) * largest).all()
