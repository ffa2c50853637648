"""What a user writes, for ``mypy --strict`` to read: the package's types are there, and right."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import scuvae
from scuvae import get, io, pp, tl


def analysed(adata: AnnData, new: AnnData, folder: Path) -> pd.DataFrame:
    tl.fit(adata, amortized="semi", likelihood="nb", batch_key="batch", max_epochs=5, rng=0)
    copied: AnnData | None = tl.fit(adata, copy=True)
    assert copied is not None
    tl.project(new, adata, new_batches="estimate")
    tl.score(new, n_samples=20)
    tl.denoise(adata, genes=["CD3E"])
    tl.embed(adata, n_components=10)
    tl.rank_genes(adata, "cell_type")
    pp.neighbors(adata)
    io.write_model(folder / "model.scuvae", adata)
    model = get.model(adata)
    z: torch.Tensor = get.posterior(adata).mean
    mean: torch.Tensor = model.decoder(z)
    assert mean.shape[1] == np.asarray(adata.uns["scuvae"]["var_names"]).size
    assert scuvae.__version__
    history: pd.DataFrame = get.history(adata)
    return history
