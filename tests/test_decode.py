"""tl.decode: expected expression at latent points."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import small_counts, small_fit

from scuvae import get, tl


def test_it_is_the_decoders_softmax() -> None:
    adata = small_fit(small_counts())
    z = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), index=list("abcd"))
    found = tl.decode(adata, z, library_size=500)
    eta = get.model(adata).decoder(torch.as_tensor(z.to_numpy(np.float32)))
    np.testing.assert_allclose(found, 500 * eta.softmax(1).detach(), rtol=1e-4)  # float32
    assert found.index.tolist() == list("abcd")
    assert found.columns.tolist() == adata.var_names.tolist()
    # At the total of the map, where none is said.
    usual = tl.decode(adata, z, genes=[adata.var_names[7], adata.var_names[2]])
    total = adata.uns["scuvae"]["embed"]["total"]
    np.testing.assert_allclose(usual, found.iloc[:, [7, 2]] * total / 500, rtol=1e-5)


def test_batches_are_averaged_or_chosen() -> None:
    adata = small_fit(small_counts(), batch_key="batch")
    z = adata.obsm["X_scuvae"][:5]
    each = [tl.decode(adata, z, batch=name, library_size=100) for name in ("b0", "b1")]
    assert (each[0] - each[1]).abs().max().max() > 1e-3
    average = tl.decode(adata, z, library_size=100)
    np.testing.assert_allclose(average, (each[0] + each[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        tl.decode(adata, z, batch="average", library_size=100), average, rtol=1e-5
    )
    # As denoise has it for the cells of posterior means alone.
    own = tl.denoise(adata, genes=adata.var_names, n_samples=0, batch="b1", library_size=100)
    np.testing.assert_allclose(each[1], own.iloc[:5], rtol=1e-4)


def test_numbers_are_at_their_mean_unless_told() -> None:
    adata = small_counts()
    adata.obs["age"] = np.linspace(20.0, 60.0, adata.n_obs)
    small_fit(adata, continuous_covariate_keys=["age"], likelihood="gaussian")
    z = adata.obsm["X_scuvae"][:5]
    at_mean = tl.decode(adata, z, covariates={"age": 40.0})
    np.testing.assert_allclose(tl.decode(adata, z), at_mean, rtol=1e-5, atol=1e-6)
    other = tl.decode(adata, z, covariates={"age": 60.0})
    assert (other - at_mean).abs().max().max() > 1e-3


def test_what_cannot_be_decoded_is_said() -> None:
    adata = small_fit(small_counts())
    with pytest.raises(ValueError, match=r"z has shape \(2, 5\): pass \(points, 3\)"):
        tl.decode(adata, np.zeros((2, 5)))
    with pytest.raises(ValueError, match="z is not finite at point 1"):
        tl.decode(adata, [[0, 0, 0], [0, np.nan, 0]])
    with pytest.raises(ValueError, match="'nogene' was not modelled"):
        tl.decode(adata, np.zeros((1, 3)), genes=["nogene"])
    with pytest.raises(ValueError, match="the fit has no batch_key"):
        tl.decode(adata, np.zeros((1, 3)), batch="b0")
