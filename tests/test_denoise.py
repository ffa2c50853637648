"""tl.denoise as asked for: chosen genes, a total, a batch, and how sure the means are."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import fingerprint, small_data, small_fit

from scuvae import get, tl


@pytest.fixture(scope="module")
def adata():
    data = small_data("negative_binomial")
    return small_fit(data, likelihood="negative_binomial", batch_key="batch", max_epochs=10)


def test_chosen_genes_are_the_layers_columns(adata) -> None:
    adata = adata.copy()
    before = fingerprint(adata.uns)
    chosen = [adata.var_names[5], adata.var_names[2]]
    frame = tl.denoise(adata, genes=chosen)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == chosen
    assert frame.index.equals(adata.obs_names)
    assert not adata.layers
    assert fingerprint(adata.uns) == before
    assert tl.denoise(adata) is None
    np.testing.assert_array_equal(frame, adata[:, chosen].layers["scuvae_denoised"])


def test_a_total_for_all_cells(adata) -> None:
    shares = tl.denoise(adata, genes=adata.var_names, library_size=1)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)  # float32 sums
    many = tl.denoise(adata, genes=adata.var_names, library_size=1e4)
    np.testing.assert_allclose(many, 1e4 * shares, rtol=1e-4)
    # At posterior means alone a cell's own total scales its shares.
    own = tl.denoise(adata, genes=adata.var_names, n_samples=0)
    shares = tl.denoise(adata, genes=adata.var_names, n_samples=0, library_size=1)
    np.testing.assert_allclose(own, shares.mul(adata.X.sum(1), axis=0), rtol=1e-4)


def test_of_a_total_observed_genes_have_their_share(adata) -> None:
    cells = adata[:, ::2].copy()
    tl.project(cells, adata, max_steps=2)
    found = tl.denoise(cells, genes=cells.var_names, library_size=100, n_samples=0)
    model, z = get.model(adata), torch.tensor(cells.obsm["X_scuvae"])
    one_hot = torch.eye(2)[torch.tensor((cells.obs["batch"] == "b1").to_numpy(int))]
    with torch.no_grad():
        truth = 100 * model.decoder(z, one_hot).softmax(-1).numpy()[:, ::2]
    np.testing.assert_allclose(found, truth, rtol=1e-4)


def test_as_if_from_a_batch(adata) -> None:
    model, z = get.model(adata), torch.tensor(adata.obsm["X_scuvae"])
    options = {"genes": adata.var_names, "n_samples": 0, "library_size": 1.0}
    names = list(adata.uns["scuvae"]["params"]["batches"])
    truth = []
    for code, name in enumerate(names):
        with torch.no_grad():
            one_hot = torch.eye(len(names))[code].expand(len(z), -1)
            truth.append(model.decoder(z, one_hot).softmax(-1).numpy())
        np.testing.assert_allclose(tl.denoise(adata, batch=name, **options), truth[-1], rtol=1e-4)
    both = tl.denoise(adata, batch=names, **options)
    np.testing.assert_allclose(both, np.mean(truth, 0), rtol=1e-4)
    assert np.abs(truth[0] - truth[1]).max() > 1e-3


def test_the_scale_is_that_of_the_means_over_q(adata) -> None:
    genes = list(adata.var_names[:4])
    mean, scale = tl.denoise(
        adata, genes=genes, library_size=1, batch="b0", n_samples=256, scale=True
    )
    model = get.model(adata)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        z = get.posterior(adata).sample((2000,))
        one_hot = torch.eye(2)[0].expand(*z.shape[:-1], -1)
        values = model.decoder(z, one_hot).softmax(-1)[..., :4]
    # 2,000 draws: standard errors of 2 % of a standard deviation.
    np.testing.assert_allclose(scale, values.std(0).numpy(), rtol=0.15, atol=1e-5)
    off = np.abs(mean - values.mean(0).numpy()) / values.std(0).numpy()
    assert off.to_numpy().max() < 0.2


def test_what_is_not_known_is_said(adata) -> None:
    before = fingerprint(adata.uns)
    with pytest.raises(ValueError, match=r"'genee1' is no gene .* Did you mean"):
        tl.denoise(adata, genes=["genee1"])
    with pytest.raises(TypeError, match="pass a list of names"):
        tl.denoise(adata, genes=adata.var_names[0])
    with pytest.raises(ValueError, match=r"batch: 'c' is no batch of the fit.*'b0', 'b1'"):
        tl.denoise(adata, batch="c")
    with pytest.raises(ValueError, match="batch is empty"):
        tl.denoise(adata, batch=[])
    with pytest.raises(ValueError, match="library_size"):
        tl.denoise(adata, library_size=0)
    with pytest.raises(ValueError, match="n_samples >= 2"):
        tl.denoise(adata, scale=True, n_samples=1)
    assert not adata.layers
    assert fingerprint(adata.uns) == before
    values = small_fit(small_data("gaussian"), likelihood="gaussian", max_epochs=2)
    with pytest.raises(ValueError, match=r"library_size=100.*gaussian"):
        tl.denoise(values, library_size=100)
    with pytest.raises(ValueError, match="has no batch_key"):
        tl.denoise(values, batch="a")
