"""The command line on matrices that stay on disk: the same files as of matrices in memory."""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData
from helpers import SMALL, fingerprint, small_counts, small_fit
from scipy import sparse as sp

from scuvae import cli
from scuvae.cli import files
from scuvae.io import backed_files

READ: dict[str, Callable[[Path], AnnData]] = {".h5ad": ad.read_h5ad, ".zarr": ad.read_zarr}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
by_suffix = pytest.mark.parametrize("suffix", READ)


def written(folder: Path, suffix: str) -> Path:
    """A file with a layer, slots of others, and a fit of every kind of slot."""
    adata = small_counts()
    adata.X = sp.csr_matrix(adata.X)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    small_fit(adata, key_added="k", layer="counts", amortized=True)
    adata.layers["k_denoised"] = adata.X.copy()
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2), np.float32)
    adata.obsm["k_covariance"] = np.ones((adata.n_obs, 6), np.float32)
    adata.uns["other"] = {"a": 1}
    adata.obs["k_elbo"] = 1.0
    path = folder / f"in{suffix}"
    (adata.write_h5ad if suffix == ".h5ad" else adata.write_zarr)(path)
    return path


def bytes_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(file): file.read_bytes() for file in files}


@by_suffix
def test_a_fit_of_files_on_disk(suffix: str, tmp_path: Path) -> None:
    """All slots are those of a fit in memory, and nothing of the earlier fit outlives it."""
    path = written(tmp_path, suffix)
    before = bytes_of(path)
    for name, extra in (("memory", []), ("disk", ["--backed"])):
        output = str(tmp_path / f"{name}{suffix}")
        words = [str(path), "-o", output, "--layer=counts", "--key-added=k", "-q", *FLAGS]
        assert cli.main(["fit", *words, "--inference=amortized", *extra]) == 0
    assert bytes_of(path) == before
    memory, disk = (READ[suffix](tmp_path / f"{name}{suffix}") for name in ("memory", "disk"))
    assert "k_covariance" not in disk.obsm
    assert "k_denoised" not in disk.layers
    assert "k_elbo" not in disk.obs
    for slot in ("X", "obs", "var"):
        assert fingerprint(getattr(disk, slot)) == fingerprint(getattr(memory, slot))
    for slot in ("obsm", "uns", "layers", "varm", "obsp"):
        ours, theirs = getattr(disk, slot), getattr(memory, slot)
        assert set(ours) == set(theirs)
        for name in ours:
            assert fingerprint(ours[name]) == fingerprint(theirs[name]), (slot, name)


def test_cells_are_projected_from_disk(tmp_path: Path) -> None:
    path = written(tmp_path, ".h5ad")
    reference = small_counts()
    small_fit(reference)
    reference.write_h5ad(tmp_path / "fit.h5ad")
    found = []
    for name, extra in (("memory", []), ("disk", ["--backed"])):
        output = tmp_path / f"{name}.h5ad"
        words = [str(path), "-o", str(output), "--reference", str(tmp_path / "fit.h5ad")]
        assert cli.main(["project", *words, "--layer=counts", "--key-added=p", *extra]) == 0
        found.append(ad.read_h5ad(output))
    np.testing.assert_array_equal(found[0].obsm["p"], found[1].obsm["p"])
    assert set(found[0].obsm) == set(found[1].obsm)


def test_large_files_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".h5ad")
    monkeypatch.setattr(backed_files, "LARGE", path.stat().st_size)

    def read(path: Path) -> AnnData:
        raise AssertionError("read into memory")

    monkeypatch.setattr(files, "read", read)
    words = [str(path), "-o", str(tmp_path / "out.h5ad"), "--layer=counts", "-q", *FLAGS]
    assert cli.main(["fit", *words]) == 0
    monkeypatch.setattr(backed_files, "LARGE", path.stat().st_size + 1)
    with pytest.raises(AssertionError, match="read into memory"):
        cli.main(["fit", *words, "--debug"])


def test_the_copy_is_of_the_same_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, ".h5ad")
    assert cli.main(["fit", str(path), "-o", str(tmp_path / "out.zarr"), "--backed"]) == 1
    assert "name an output that ends in .h5ad" in capsys.readouterr().err
    assert not (tmp_path / "out.zarr").exists()
