"""The commonest misuses of each verb end in one sentence: what was found where, and the remedy.

Those of values, arguments and names that other files hold (test_errors.py, test_pl.py) are not
repeated here.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from helpers import small_counts, small_fit, unchanged

from scuvae import datasets, get, io, pl, pp, tl


@cache
def _cells() -> tuple[AnnData, AnnData]:
    return small_fit(small_counts(), max_epochs=1), small_counts(seed=1)


# A fit, cells without one, and a folder that is not there.
Case = Callable[[AnnData, AnnData, Path], Any]
CASES: dict[str, tuple[Case, list[str]]] = {
    # What is no name of an argument.
    "fit by position": (
        lambda a, new, to: tl.fit(new, "counts"),
        ["takes adata by position", "by name, such as"],
    ),
    "fit misspelt": (lambda a, new, to: tl.fit(new, n_latents=5), ["Did you mean 'n_latent'"]),
    "score a layer": (lambda a, new, to: tl.score(a, layer="x"), ["has no argument 'layer'"]),
    "compare n_latent": (
        lambda a, new, to: tl.compare_n_latent(new, n_latent=5),
        ["n_latent= is not for", "n_latents="],
    ),
    "compare misspelt": (
        lambda a, new, to: tl.compare_n_latent(new, n_latents=[2], max_epoch=1),
        ["Did you mean 'max_epochs'"],
    ),
    "neighbors misspelt": (
        lambda a, new, to: pp.neighbors(a, n_neighbours=5),
        ["Did you mean 'n_neighbors'"],
    ),
    "project without": (lambda a, new, to: tl.project(new), ["'reference'"]),
    "rank without": (lambda a, new, to: tl.rank_genes(a), ["'groupby'"]),
    # adata and reference exchanged, or not fitted.
    "project exchanged": (
        lambda a, new, to: tl.project(a, new),
        ["reference.uns['scuvae'] holds no fit", "tl.fit(reference)"],
    ),
    "labels exchanged": (
        lambda a, new, to: tl.transfer_labels(a, new, labels="cell_type"),
        ["reference.uns['scuvae'] holds no fit"],
    ),
    "novelty exchanged": (
        lambda a, new, to: tl.novelty(a, new),
        ["reference.uns['scuvae'] holds no fit"],
    ),
    # Columns and names.
    "covariates as a string": (
        lambda a, new, to: tl.fit(new, categorical_covariate_keys="batch"),
        ["'batch' is a str", "a list"],
    ),
    "labels misspelt": (
        lambda a, new, to: tl.transfer_labels(new, a, labels="celltype"),
        ["reference.obs", "Did you mean 'cell_type'"],
    ),
    "groupby misspelt": (
        lambda a, new, to: tl.rank_genes(a, "celltype"),
        ["adata.obs", "Did you mean 'cell_type'"],
    ),
    "a group misspelt": (
        lambda a, new, to: tl.rank_genes(a, "cell_type", groups=["upp"]),
        ["adata.obs['cell_type']", "Did you mean 'up'"],
    ),
    "groups as a string": (
        lambda a, new, to: tl.rank_genes(a, "cell_type", groups="up"),
        ["'up' is a str", "a list"],
    ),
    "a measurement as groups": (
        lambda a, new, to: tl.rank_genes(a, "expected"),
        ["adata.obs['expected']", "column of names"],
    ),
    "no donors": (
        lambda a, new, to: tl.rank_genes(a, "cell_type", donor_key="donor"),
        ["donor_key='donor' is no column", "'batch'"],
    ),
    "a gene misspelt": (
        lambda a, new, to: tl.denoise(a, genes=["gen3"]),
        ["'gen3'", "Did you mean 'gene3'"],
    ),
    "a gene as a string": (
        lambda a, new, to: tl.denoise(a, genes="gene3"),
        ["'gene3' is a str", "a list"],
    ),
    "a batch of none": (
        lambda a, new, to: tl.denoise(a, batch="b0"),
        ["batch='b0'", "no batch_key", "None"],
    ),
    "decode a name": (lambda a, new, to: tl.decode(a, "X_scuvae"), ["adata.obsm['X_scuvae']"]),
    "nothing to add": (lambda a, new, to: tl.extend_genes(a), ["has all of adata's genes"]),
    "thin fractions": (
        lambda a, new, to: pp.thin_counts(AnnData(new.X * 0.5), fraction=0.5),
        ["whole counts", "layer="],
    ),
    "thin to twice": (lambda a, new, to: pp.thin_counts(new, fraction=2), ["fraction=2", "< 1"]),
    "neighbors unfitted": (lambda a, new, to: pp.neighbors(new), ["adata.uns['scuvae']", "tl.fit"]),
    # Pictures before what they draw.
    "no volcano": (lambda a, new, to: pl.volcano(a), ["rank_genes_groups", "tl.rank_genes"]),
    "no check": (lambda a, new, to: pl.predictive_check(a), ["tl.predictive_check(adata) first"]),
    "no coverage": (lambda a, new, to: pl.calibration(a), ["tl.calibration(adata) first"]),
    "no scores": (lambda a, new, to: pl.elbo_by_size(a), ["tl.score(adata) first"]),
    "no labels": (lambda a, new, to: pl.label_reliability(a), ["tl.transfer_labels"]),
    "no refinement": (lambda a, new, to: pl.refinement_arrows(a), ["tl.refine"]),
    "a gene is no score": (
        lambda a, new, to: pl.embedding_scores(a, color="gene3"),
        ["color='gene3'", "scanpy.pl.embedding"],
    ),
    "no kind of picture": (lambda a, new, to: pl.loss(a, save="x.docx"), ["'x.docx'", "'png'"]),
    "no such folder": (
        lambda a, new, to: pl.loss(a, save=to / "loss.png"),
        ["no such folder", "loss.png"],
    ),
    # Files and models.
    "write exchanged": (lambda a, new, to: io.write_model(a, to), ["not an AnnData"]),
    "write nowhere": (lambda a, new, to: io.write_model(to / "m", a), ["no such folder"]),
    "read nothing": (lambda a, new, to: io.read_model(to), ["does not exist", "io.write_model"]),
    "no such fit": (lambda a, new, to: get.fit(a, key="scvae"), ["Did you mean 'scuvae'"]),
    "no donors at all": (lambda a, new, to: datasets.two_conditions(n_donors=0), ["n_donors"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_misuse_ends_in_a_sentence_that_mends_it(name: str, tmp_path: Path) -> None:
    call, parts = CASES[name]
    fitted, new = _cells()
    with unchanged(fitted, new), pytest.raises((TypeError, ValueError, OSError)) as caught:
        call(fitted, new, tmp_path / "gone")
    said = str(caught.value)
    for part in parts:
        assert part in said, said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_right_pass() -> None:
    """The alias of rng, and the options that tl.compare_n_latent passes on."""
    adata = small_counts()
    tl.fit(adata, max_epochs=1, progress=False, random_state=np.int64(1))
    tl.compare_n_latent(adata, n_latents=[2], max_epochs=1, progress=False)
