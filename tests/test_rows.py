"""Row optimisers against torch's own, and the rows that must not move."""

import pytest
import torch

from scuvae.inference.refinement.row_optimizers import ROW_OPTIMIZERS
from scuvae.inference.training.optimizers import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("fixed_random_state")

# float64: roundings; float32: 1 − .999 loses 16 bits in Adam's first steps
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_with_all_rows_it_is_torchs(name: str, dtype: torch.dtype) -> None:
    table = torch.randn(6, 3, dtype=dtype)
    other = table.clone().requires_grad_()
    ours = ROW_OPTIMIZERS[name](table, 0.05)
    torchs = OPTIMIZERS[name]([other], lr=0.05)
    start = table.clone()
    for step in range(200):
        # gradients of very different sizes, some of them zero
        gradient = torch.randn(6, 3, dtype=dtype) * 10.0 ** torch.arange(-6, 0)[:, None]
        gradient[step % 6] = 0.0
        order = torch.randperm(6)
        ours.step(table, order, gradient[order])
        other.grad = gradient.clone()
        torchs.step()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(table, other.detach(), rtol=tolerance, atol=tolerance)
    assert (table != start).all()


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_rows_outside_the_batch_do_not_move(name: str) -> None:
    table = torch.randn(8, 3)
    optimizer = ROW_OPTIMIZERS[name](table, 0.05)
    optimizer.step(table, torch.arange(8), torch.randn(8, 3))
    inside, outside = torch.tensor([6, 1, 3]), torch.tensor([0, 2, 4, 5, 7])
    before = table.clone()
    state = {key: value.clone() for key, value in optimizer.state.items()}
    for _ in range(3):
        optimizer.step(table, inside, torch.randn(3, 3))
    assert torch.equal(table[outside], before[outside])
    assert (table[inside] != before[inside]).all()
    assert state
    for key, value in optimizer.state.items():
        assert torch.equal(value[outside], state[key][outside])
        assert (value[inside] != state[key][inside]).all()


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_each_row_has_a_history_of_its_own(name: str) -> None:
    """A row visited at its own times goes where it would go in a table of one row."""
    table = torch.randn(5, 2, dtype=torch.float64)
    alone = [table[i : i + 1].clone() for i in range(5)]
    together = ROW_OPTIMIZERS[name](table, 0.05)
    singles = [ROW_OPTIMIZERS[name](row, 0.05) for row in alone]
    for _ in range(40):
        rows = (torch.rand(5) < 0.5).nonzero().squeeze(-1)
        gradient = torch.randn(len(rows), 2, dtype=torch.float64)
        together.step(table, rows, gradient)
        for row, own in zip(rows.tolist(), gradient, strict=True):
            singles[row].step(alone[row], torch.tensor([0]), own[None])
    torch.testing.assert_close(table, torch.cat(alone), rtol=1e-14, atol=1e-14)  # same arithmetic
