"""Flags against the arguments of the functions that they are of, and what else they promise."""

import importlib
import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import SMALL, assert_same_posterior, small_counts, small_fit
from scipy import sparse as sp

import scuvae
from scuvae import cli, get, tl
from scuvae.cli.command_line import parser
from scuvae.cli.verbs import CHECKS, PLOTS, VERBS, Verb

COMMANDS: dict[str, Verb] = {
    **VERBS,
    **{f"check {name}": verb for name, verb in CHECKS.items()},
    **{f"plot {name}": verb for name, verb in PLOTS.items()},
}
# The command line works on files by nature: what stands for the data, and for a window, is no flag.
NO_FLAG = {"adata", "reference", "copy", "random_state", "ax", "show", "save", "return_fig"}
# One word or more after each flag, and what the function is to get: where its type is not enough.
WORDS: dict[str, tuple[list[str], Any]] = {
    "amortized": (["--inference", "semi"], "semi"),
    "covariates": (["--covariates", "sex=f", "age=40"], {"sex": "f", "age": 40.0}),
    "levels": (["--levels", ".5", ".9"], [0.5, 0.9]),
    "groups": (["--groups", "B cells"], ["B cells"]),
    "batch": (["--batch", "d1", "d2"], ["d1", "d2"]),
    "color": (["--color", "elbo"], "elbo"),
    "keys": (["--keys", "a", "b"], ["a", "b"]),
    "genes": (["--genes", "genes.txt"], ["CD3E", "MS4A1"]),
    "polish": (["--polish", "moments"], "moments"),
    "progress": (["-q"], False),
}


def function_of(verb: Verb) -> Any:
    part, name = verb.calls.split(".")
    return getattr(getattr(scuvae, part), name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_has_a_flag_and_every_flag_an_argument(command: str) -> None:
    verb = COMMANDS[command]
    arguments = set(inspect.signature(function_of(verb)).parameters) - NO_FLAG
    if command == "rank-genes":  # there it is a group, and no file
        arguments.add("reference")
    flags = {name for name, _ in verb.all_flags()}
    assert flags == arguments, f"give {flags ^ arguments} a flag in scuvae/cli/verbs.py"


def test_every_picture_has_a_command_and_can_be_written() -> None:
    assert {picture.calls for picture in PLOTS.values()} == {f"pl.{n}" for n in scuvae.pl.__all__}
    for picture in PLOTS.values():
        assert "save" in inspect.signature(function_of(picture)).parameters, picture.calls


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_reach_their_arguments(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("genes.txt").write_text("CD3E\n\n MS4A1 \n")
    verb = COMMANDS[command]
    line, expected = [*command.split(), "in.h5ad"], {}
    if verb.reads == "reference":
        line += ["--reference", "ref.h5ad"]
    line += ["-o", "out.png" if command.startswith("plot") else "out.h5ad"]
    for name, flag in verb.all_flags():
        words, value = WORDS.get(name, ([], None))
        if command == "project" and name == "amortized":
            words, value = ["--amortized"], True
        if not words and flag.takes is None:
            dashed = name.replace("_", "-")
            words, value = [f"--{dashed if flag.stands_for else f'no-{dashed}'}"], flag.stands_for
        if not words:
            word = "7" if flag.takes in (int, float) else "word"
            value = [word] if "action" in flag.more and name.endswith("_keys") else flag.takes(word)
            words = [f"--{name.replace('_', '-')}", word]
        line += words
        expected[name] = value
    args = vars(parser().parse_args(line))
    assert {name: args[name] for name in expected} == expected


def test_registered_likelihoods_need_no_edit() -> None:
    # Names are checked by tl, which knows what is registered.
    assert parser().parse_args(["fit", "a.h5ad", "-o", "b.h5ad", "--likelihood", "mine"])


# ------------------------------------------------------------------------------ wrong words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("fit a.h5ad -o b.h5ad --n-latnt 3", "--n-latnt: did you mean --n-latent?"),
        ("project a.h5ad -o b.h5ad --refrence c.h5ad", "did you mean --reference?"),
        ("plot loss a.h5ad -o b.png --kye k", "--kye: did you mean --keys?"),
        ("modell show", "modell: did you mean model?"),
        ("check calibratoin a.h5ad", "did you mean calibration?"),
        ("denoise a.h5ad -o b.h5ad --covariates sex", "'sex' is no NAME=VALUE"),
        ("fit a.h5ad -o b.h5ad --threads 0", "no positive whole number"),
        ("plot loss a.h5ad -o b.txt", "does not end in .png or .pdf or .svg"),
    ],
)
def test_what_was_meant(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------- what is done


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "fit.h5ad"
    adata = small_counts(80)
    adata.obs["donor"] = [f"d{i % 4}" for i in range(adata.n_obs)]
    small_fit(adata, amortized=True).write_h5ad(path)
    return path


def call(*line: object) -> int:
    return cli.main([str(word) for word in line])


def test_each_verb_writes_what_it_should(fitted: Path, tmp_path: Path) -> None:
    """Against the functions' own results; reads and writes both formats, in memory or not."""
    out, expected = tmp_path / "out.h5ad", anndata.read_h5ad(fitted)
    assert call("score", fitted, "-o", out, "--n-samples", 30) == 0
    tl.score(expected, n_samples=30)
    found = anndata.read_h5ad(out)
    np.testing.assert_array_equal(found.obs["scuvae_elbo"], expected.obs["scuvae_elbo"])

    store = tmp_path / "out.zarr"
    assert call("embed", fitted, "-o", store, "--n-components", 2) == 0
    assert anndata.read_zarr(store).obsm["X_scuvae_embed"].shape == (80, 2)

    new = tmp_path / "new.h5ad"
    small_counts(30, seed=3).write_h5ad(new)
    line = ["--reference", fitted, "-o", tmp_path / "labels.h5ad", "--json", tmp_path / "l.json"]
    assert call("transfer-labels", new, *line) == 0
    labels = anndata.read_h5ad(tmp_path / "labels.h5ad").obs["scuvae_label"]
    said = json.loads((tmp_path / "l.json").read_text())
    assert said["cells"]["scuvae_label"] == labels.value_counts().to_dict()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_on_disk_as_in_memory(suffix: str, fitted: Path, tmp_path: Path) -> None:
    source = tmp_path / f"fit{suffix}"
    adata = anndata.read_h5ad(fitted)
    adata.layers["twice"] = adata.X * 2
    adata.write_zarr(source) if suffix == ".zarr" else adata.write_h5ad(source)
    read = anndata.read_zarr if suffix == ".zarr" else anndata.read_h5ad
    results = []
    for name, more in (("memory", []), ("disk", ["--backed"])):
        out = tmp_path / f"{name}{suffix}"
        assert call("denoise", source, "-o", out, *more) == 0
        results.append(read(out))
    memory, disk = results
    np.testing.assert_allclose(
        disk.layers["scuvae_denoised"], memory.layers["scuvae_denoised"], rtol=1e-6
    )
    np.testing.assert_array_equal(disk.layers["twice"], memory.layers["twice"])
    np.testing.assert_array_equal(disk.obsm["X_scuvae"], memory.obsm["X_scuvae"])
    assert get.history(disk).equals(get.history(memory))
    tl.score(disk, n_samples=21)  # the fit is whole


def test_tables(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genes, table = tmp_path / "genes.txt", tmp_path / "genes.csv"
    genes.write_text("gene3\ngene0\n")
    assert call("denoise", fitted, "--genes", genes, "--table", table) == 0
    found = pd.read_csv(table, index_col=0)
    expected = tl.denoise(anndata.read_h5ad(fitted), genes=["gene3", "gene0"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert list(found.index) == list(expected.index)

    table, out = tmp_path / "groups.tsv", tmp_path / "out.h5ad"
    by_type = ("--groupby", "cell_type")
    assert call("rank-genes", fitted, *by_type, "--table", table, "-o", out) == 0
    found = pd.read_csv(table, sep="\t")
    result = anndata.read_h5ad(out).uns["rank_genes_groups"]
    for group in ("down", "up"):
        rows = found[found["group"] == group]
        assert list(rows["names"]) == list(result["names"][group])
        np.testing.assert_allclose(rows["prob_de"], result["prob_de"][group], rtol=1e-6)
    assert call("rank-genes", fitted, *by_type, "--groups", "up", "--table", table) == 0
    assert set(pd.read_csv(table, sep="\t")["group"]) == {"up"}

    for line in (
        ["denoise", fitted, "--genes", genes, "-o", out],
        ["denoise", fitted, "--table", table],
        ["rank-genes", fitted, *by_type],
    ):
        assert call(*line) == 1
        assert "--table" in capsys.readouterr().err


def test_json_says_what_the_fit_says(tmp_path: Path) -> None:
    source, out = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    adata = small_counts()
    adata.write_h5ad(source)
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    flags = [flag.replace("_", "-") for flag in flags]
    assert call("fit", source, "-o", out, "--json", tmp_path / "fit.json", *flags) == 0
    said = json.loads((tmp_path / "fit.json").read_text())
    fit = anndata.read_h5ad(out)
    assert said["command"] == "fit"
    assert said["arguments"] == SMALL
    assert said["fit"] == get.fit(fit).to_dict()
    history = get.history(fit)
    for name in history:
        np.testing.assert_allclose(
            [np.nan if v is None else v for v in said["history"][name]], history[name]
        )


def test_dry_run_and_no_clobber(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.h5ad"
    assert call("score", fitted, "-o", out, "--dry-run", "--n-samples", 5) == 0
    said = capsys.readouterr().out
    assert "tl.score(n_samples=5)" in said
    assert "80 cells x 40 genes" in said
    assert not list(tmp_path.iterdir())
    wrong = ["--batch-key", "donr", "--dry-run"]
    assert call("fit", fitted, "-o", out, *wrong) == 1
    assert "Did you mean 'donor'?" in capsys.readouterr().err
    assert call("score", fitted, "-o", out, "--dry-run", "--key", "k") == 1
    assert "holds no fit" in capsys.readouterr().err

    out.write_bytes(b"old")
    assert call("score", fitted, "-o", out, "--no-clobber") == 1
    assert f"{out} exists" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_threads_are_as_they_were_afterwards(fitted: Path, tmp_path: Path) -> None:
    import torch

    before, seen = torch.get_num_threads(), []
    original = tl.embed

    def embed(*args: Any, **kwargs: Any) -> None:
        seen.append(torch.get_num_threads())
        original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl, "embed", embed)
        assert call("embed", fitted, "-o", tmp_path / "o.h5ad", "--threads", before + 1) == 0
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_lines_in_place_of_a_bar(
    fitted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = importlib.import_module("scuvae.inference.training.fit")
    monkeypatch.setattr(training, "SECONDS_A_LINE", -1.0)
    line = ["fit", fitted, "-o", tmp_path / "out.h5ad", "--max-epochs", 2]
    assert call(*line) == 0
    said = capsys.readouterr().err.splitlines()
    assert [text.partition(",")[0] for text in said] == [
        f"scuvae: fit: epoch {i} of at most 2" for i in (1, 2)
    ]
    assert call(*line, "-q") == 0
    assert capsys.readouterr().err == ""
    assert logging.getLogger("scuvae.progress").level == logging.NOTSET


def test_pictures(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        assert call("plot", "loss", fitted, "-o", tmp_path / name) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert call("plot", "volcano", fitted, "-o", tmp_path / "b.png") == 1
    assert "scuvae.tl.rank_genes(adata, groupby) first" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_model_show(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.scuvae"
    assert call("model", "write", fitted, model) == 0
    for path in (fitted, model):
        assert call("model", "show", path) == 0
        said = capsys.readouterr().out
        assert "negative_binomial likelihood" in said
        assert "gene0" in said


# ------------------------------------------------------------------------------ several files


def fit_of(out: Path, *sources: object) -> AnnData:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert call("fit", *sources, "-o", out, "-q", *flags) == 0
    return anndata.read_h5ad(out)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two files of one data set; the second has a gene more, in another order."""
    whole = small_counts(50)
    whole.X = sp.csr_matrix(whole.X)
    folder = tmp_path / "parts"
    folder.mkdir()
    whole[:30].write_h5ad(folder / "part_2.h5ad")
    extra = AnnData(np.ones((20, 1), np.float32), var=pd.DataFrame(index=["more"]))
    extra.obs_names = whole.obs_names[30:]
    second = anndata.concat([whole[30:, ::-1], extra], axis=1, merge="first")
    second.X = sp.csr_matrix(second.X)
    second.write_h5ad(folder / "part_10.h5ad")
    return [folder / "part_2.h5ad", folder / "part_10.h5ad"]


def test_several_files_are_one_data_set(parts: list[Path], tmp_path: Path) -> None:
    """By name or as a folder, in memory or on disk: as the joined matrix."""
    before = [path.read_bytes() for path in parts]
    expected = small_fit(small_counts(50))
    for number, sources in enumerate(([*parts], [parts[0].parent])):
        found = fit_of(tmp_path / f"{number}.h5ad", *sources)
        assert list(found.obs_names) == list(expected.obs_names)
        assert list(found.obs["file"]) == ["part_2"] * 30 + ["part_10"] * 20
        np.testing.assert_array_equal(found.X.toarray(), expected.X)
        assert_same_posterior(found, expected, atol=1e-3)  # sums in another order
    assert [path.read_bytes() for path in parts] == before
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    streamed = fit_of(tmp_path / "streamed.h5ad", *parts, "--backed", "--batch-key=file")
    assert streamed.X is None
    assert get.fit(streamed).to_dict()["n_obs"] == 50
    assert list(streamed.obs_names) == list(expected.obs_names)


def test_a_collection_of_stores_is_one_data_set(tmp_path: Path) -> None:
    """As annbatch writes one: a store of stores."""
    import zarr

    whole = small_counts(50)
    group = zarr.open_group(tmp_path / "all.zarr", mode="w")
    group.attrs["encoding-type"] = "annbatch-preshuffled"
    for number, cells in enumerate((slice(0, 30), slice(30, 50))):
        anndata.io.write_elem(group, f"dataset_{number}", whole[cells].copy())
    found = fit_of(tmp_path / "fit.h5ad", tmp_path / "all.zarr")
    assert list(found.obs["file"]) == ["dataset_0"] * 30 + ["dataset_1"] * 20
    assert_same_posterior(found, small_fit(small_counts(50)))


def test_several_files_that_are_none(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out.h5ad"
    other = small_counts(9)
    other.var_names = [f"other{i}" for i in range(other.n_vars)]
    other.write_h5ad(tmp_path / "other.h5ad")
    for sources, says in (
        ([empty], "a folder without .h5ad and .zarr files"),
        ([parts[0], tmp_path / "none.h5ad"], "no such file"),
        ([parts[0], tmp_path / "other.h5ad"], "no gene in common"),
        ([parts[0], parts[0].parent], "named twice"),
    ):
        assert call("fit", *sources, "-o", out) == 1
        assert says in capsys.readouterr().err
    assert call("fit", *parts, "-o", parts[0]) == 1
    assert "would overwrite" in capsys.readouterr().err
    assert call("fit", parts[0].parent, "-o", parts[0].parent / "new.h5ad") == 1
    assert "would overwrite" in capsys.readouterr().err
    # Cells of one name in two files get their file's.
    shutil.copy(parts[0], tmp_path / "again.h5ad")
    found = fit_of(out, parts[0], tmp_path / "again.h5ad")
    assert found.obs_names.is_unique
    assert found.n_obs == 60


def test_further_genes(tmp_path: Path) -> None:
    adata = small_counts()
    small_fit(adata, mask_var="highly_variable").write_h5ad(tmp_path / "fit.h5ad")
    (tmp_path / "genes.txt").write_text("gene0\ngene3\n")
    line = ["extend-genes", tmp_path / "fit.h5ad", "-o", tmp_path / "out.h5ad"]
    assert call(*line, "--genes", tmp_path / "genes.txt", "--min-counts", 1) == 0
    tl.extend_genes(adata, genes=["gene0", "gene3"], min_counts=1)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.uns["scuvae"]["further"]["var_names"]) == ["gene0", "gene3"]
    np.testing.assert_array_equal(
        tl.denoise(found, genes=["gene3", "gene1"]), tl.denoise(adata, genes=["gene3", "gene1"])
    )
