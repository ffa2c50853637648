"""Networks against plain torch: shapes, Jacobians, dropout, normalisation, the seed's own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from scuvae.model import Decoder, Encoder
from scuvae.model.encoder import NORMALIZATIONS

pytestmark = pytest.mark.usefixtures("fixed_random_state")


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_decoder_shapes(n_layers: int) -> None:
    decoder = Decoder(3, 7, n_hidden=5, n_layers=n_layers)
    widths = [3, *[5] * n_layers, 7]
    shapes = [tuple(p.shape) for p in decoder.parameters()]
    assert shapes == [s for a, b in pairwise(widths) for s in ((b, a), (b,))]
    assert decoder(torch.randn(4, 3)).shape == (4, 7)
    assert decoder(torch.randn(2, 6, 4, 3)).shape == (2, 6, 4, 7)


def test_linear_decoder_is_affine() -> None:
    decoder = Decoder(3, 7, n_layers=0).double()
    z = torch.randn(4, 3, dtype=torch.float64)
    (layer,) = decoder.layers
    torch.testing.assert_close(decoder(z), z @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_covariates_shift_the_first_layer(n_layers: int) -> None:
    decoder = Decoder(3, 7, n_hidden=5, n_layers=n_layers, n_covariates=2).double()
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    codes = torch.tensor([0, 1, 1, 0])
    found = decoder(z, nn.functional.one_hot(codes, 2).double())
    # the same as a decoder for each category, with the shift in its first bias
    for code in range(2):
        plain = Decoder(3, 7, n_hidden=5, n_layers=n_layers).double()
        plain.load_state_dict(decoder.state_dict(), strict=False)
        with torch.no_grad():
            plain.layers[0].bias += decoder.offset.weight[:, code]
        torch.testing.assert_close(found[:, codes == code], plain(z)[:, codes == code])
    assert not torch.allclose(found[:, 1], decoder(z, torch.eye(2).double()[codes * 0])[:, 1])
    with pytest.raises(TypeError, match="covariates="):
        decoder(z)


@pytest.mark.parametrize("n_covariates", [0, 2])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_linear_path_adds_z_and_batches_to_the_output(n_layers: int, n_covariates: int) -> None:
    sizes = {"n_hidden": 5, "n_layers": n_layers, "n_covariates": n_covariates}
    decoder = Decoder(3, 7, linear_path=True, **sizes).double()
    plain = Decoder(3, 7, **sizes).double()
    state = decoder.state_dict()
    last = f"layers.{n_layers}.weight"
    of_hidden, of_z, of_batch = state[last].split([5, 3, n_covariates], 1)
    plain.load_state_dict(state | {last: of_hidden})
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    one_hot = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0]] if n_covariates else None
    expected = plain(z, one_hot) + z @ of_z.T
    if one_hot is not None:
        expected = expected + one_hot @ of_batch.T
    torch.testing.assert_close(decoder(z, one_hot), expected)
    if one_hot is not None:
        sloped = Decoder(3, 7, linear_path=True, slopes=True, **sizes).double()
        assert sloped.n_slopes == 2 * 3
        of_each = torch.randn(7, 2, 3, dtype=torch.float64)
        wide = torch.cat([of_hidden, of_each.flatten(1), of_z, of_batch], 1)
        sloped.load_state_dict(state | {last: wide})
        own = of_each[:, [0, 1, 1, 0]]  # each cell's batch's
        expected = expected + torch.einsum("gcl,scl->scg", own, z)
        torch.testing.assert_close(sloped(z, one_hot), expected)
    # A linear decoder is its own linear path.
    assert not Decoder(3, 7, n_layers=0, linear_path=True).linear_path


@pytest.mark.parametrize("path", ["none", "linear", "slopes"])
@pytest.mark.parametrize("n_covariates", [0, 2])
@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_jacobian_is_autograds(n_layers: int, n_covariates: int, path: str) -> None:
    sizes = {"n_hidden": 5, "n_layers": n_layers, "n_covariates": n_covariates}
    paths = {"linear_path": path != "none", "slopes": path == "slopes"}
    decoder = Decoder(3, 7, dropout=0.5, **paths, **sizes).double()
    z = torch.randn(4, 3, dtype=torch.float64)
    one_hot = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0]] if n_covariates else None
    decoder.train()
    eta, jacobian = decoder.jacobian(z, one_hot)
    decoder.eval()
    close = {"rtol": 1e-12, "atol": 1e-12}  # float64 roundings
    torch.testing.assert_close(eta, decoder(z, one_hot), **close)
    assert jacobian.shape == (4, 3, 7)
    for i in range(4):
        row = None if one_hot is None else one_hot[i : i + 1]
        expected = torch.func.jacrev(lambda v, row=row: decoder(v[None], row)[0])(z[i])
        torch.testing.assert_close(jacobian[i], expected.T, **close)


def test_dropout_acts_in_training_only() -> None:
    decoder = Decoder(3, 7, n_hidden=400, n_layers=1, dropout=0.25).double()
    z = torch.randn(1, 3, dtype=torch.float64)
    decoder.eval()
    expected = decoder(z)
    torch.testing.assert_close(decoder(z), expected, rtol=0, atol=0)  # not a random function
    decoder.train()
    draws = torch.stack([decoder(z) for _ in range(400)])
    error = draws.std(0) / 20
    assert (error > 0).all()
    # dropped units are made up for by the others: unbiased, at 5 standard errors
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_encoder_hands_out_q(n_layers: int, covariance: str, normalization: str) -> None:
    encoder = Encoder(
        7, 3, n_hidden=5, n_layers=n_layers, covariance=covariance, normalization=normalization
    )
    q = encoder(torch.randn(4, 7))
    assert q.mean.shape == (4, 3)
    assert q.full == (covariance == "full")
    assert (q.stddev > 0).all()
    # far-away cells too
    extreme = encoder(1e6 * torch.randn(4, 7))
    assert extreme.stddev.isfinite().all()
    assert (extreme.stddev > 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_last_batch_of_one_cell_trains(normalization: str) -> None:
    encoder = Encoder(7, 3, n_hidden=5, n_layers=2, normalization=normalization).train()
    encoder(torch.randn(16, 7))
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    q = encoder(torch.randn(1, 7))
    (q.mean.sum() + q.stddev.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert any((p.grad != 0).any() for p in encoder.hidden.parameters())
    # one cell has no variance: it leaves the running moments alone
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_encoder_in_evaluation_treats_each_cell_alone(normalization: str) -> None:
    encoder = Encoder(7, 3, n_hidden=5, n_layers=2, normalization=normalization).double()
    x = torch.randn(16, 7, dtype=torch.float64)
    for _ in range(3):
        encoder.train()(x)
    whole = encoder.eval()(x)
    one = encoder(x[4:5])
    torch.testing.assert_close(one.mean, whole.mean[4:5], rtol=1e-12, atol=1e-12)  # roundings


def test_counts_enter_the_encoder_by_log1p() -> None:
    x = torch.poisson(torch.full((4, 7), 3.0))
    plain, logged = Encoder(7, 2, n_hidden=5), Encoder(7, 2, n_hidden=5, inputs="log1p")
    logged.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logged(x).mean, plain(torch.log1p(x)).mean)


def seeds_decoder(input_dim: int, output_dim: int, hidden_dim: int = 128) -> nn.Module:
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, output_dim),
    )


class SeedsEncoder(nn.Module):
    def __init__(self, input_dim: int, output_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.BatchNorm1d(hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.BatchNorm1d(hidden_dim),
        )
        self.mean = nn.Linear(hidden_dim, output_dim)
        self.scale = nn.Sequential(nn.Linear(hidden_dim, output_dim), nn.Softplus())


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Parameter for parameter: their number, order and shapes must agree."""
    pairs = list(zip(source.parameters(), target.parameters(), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)


def test_two_layers_are_the_seeds_decoder() -> None:
    seed, ours = seeds_decoder(3, 50), Decoder(3, 50, n_layers=2)
    copy_in_order(seed, ours)
    z = torch.randn(10, 20, 3)
    torch.testing.assert_close(ours(z), seed(z), rtol=0, atol=0)  # the same arithmetic


@pytest.mark.parametrize("training", [True, False])
def test_two_layers_are_the_seeds_encoder(training: bool) -> None:
    seed, ours = SeedsEncoder(50, 3), Encoder(50, 3, n_layers=2)
    copy_in_order(seed, ours)
    x = torch.randn(20, 50)
    for module in (seed, ours):
        module.train(training)
    h = seed.net(x)
    q = ours(x)
    torch.testing.assert_close(q.mean, seed.mean(h), rtol=0, atol=0)  # the same arithmetic
    torch.testing.assert_close(q.stddev, seed.scale(h), rtol=0, atol=0)


def test_initial_parameters_are_reproducible() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(np.concatenate([p.detach().ravel() for p in Decoder(3, 7).parameters()]))
    np.testing.assert_array_equal(*weights)


def test_settled_encoder_has_the_moments_of_its_data() -> None:
    """In evaluation a full batch then gives what it gave in training, but for n / (n − 1)."""
    torch.manual_seed(0)
    encoder = Encoder(6, 2, n_hidden=8, n_layers=2).double()
    x = torch.randn(500, 6, dtype=torch.float64)
    expected = encoder.train()(x).mean.detach()
    encoder.settle([(x, None)])
    found = encoder.eval()(x).mean.detach()
    stale = (Encoder(6, 2, n_hidden=8, n_layers=2).double().eval()(x).mean - expected).abs().max()
    # the variance is unbiased in evaluation: a relative 1/500 a layer
    assert (found - expected).abs().max() < 0.01 < stale
