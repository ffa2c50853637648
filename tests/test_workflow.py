"""The workflows of tutorials/workflows/: run by the real Snakemake, ended, and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scuvae
from scuvae import datasets

FOLDER = Path(__file__).resolve().parents[1] / "tutorials" / "workflows"
# Of an environment of its own, or that of the tests.
SNAKEMAKE = os.environ.get("SNAKEMAKE") or shutil.which("snakemake")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no tutorials/ beside tests/")


def line(folder: Path, **config: object) -> list[str]:
    said = {
        "input": folder / "cells.h5ad",
        "outdir": folder / "results",
        "threads": 1,
        "scuvae": f"'{sys.executable} -m scuvae'",
        "python": sys.executable,
        **config,
    }
    words = [f"{name}={value}" for name, value in said.items()]
    snakefile = FOLDER / "Snakefile"
    return [
        *(str(SNAKEMAKE), "--cores", "1", "--snakefile", str(snakefile)),
        *("--directory", str(folder), "--config", *words),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not SNAKEMAKE, reason="no snakemake: set SNAKEMAKE, or install it")
def test_from_counts_to_report_ended_and_resumed(tmp_path: Path) -> None:
    datasets.pbmc68k_counts()[:300].copy().write_h5ad(tmp_path / "cells.h5ad")
    command = line(tmp_path, fit="{max_epochs: 150, checkpoint_every: 0.2}", groupby="cell_type")
    kept, done = tmp_path / "results" / "checkpoint", tmp_path / "results" / "fit.h5ad"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        end = time.monotonic() + 300
        while run.poll() is None and not (kept / "checkpoint.json").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert not done.exists()
    # A killed snakemake leaves its lock.
    subprocess.run([*command, "--unlock"], check=True, capture_output=True)
    again = subprocess.run([*command, "--rerun-incomplete"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    results = tmp_path / "results"
    page = (results / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "CD19+ B" in page
    assert json.loads((results / "fit.json").read_text())["fit"]["n_obs"] == 300
    assert "going on after" in (results / "logs" / "fit.log").read_text()
    # Nothing is left to do.
    check = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert "Nothing to be done" in check.stdout + check.stderr


def as_shell(block: str, values: dict[str, str]) -> str:
    """What Nextflow makes of a script's text: its variables put in, its escapes taken off."""
    for name, value in values.items():
        block = block.replace(f"${{{name}}}", value)
    block = block.replace(r"\$", "$").replace("\\\\\n", "\\\n")
    lines = block.splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines)


@pytest.mark.parametrize("part", ["script", "stub"])
def test_the_nextflow_module_s_commands_run(part: str, tmp_path: Path) -> None:
    """As plain shell, with the arguments of the module's own test; flags are the command line's."""
    module = FOLDER / "nextflow" / "scuvae" / "fit"
    text = (module / "main.nf").read_text()
    block = re.search(part + r':.*?"""\n(.*?)"""', text, flags=re.DOTALL)
    assert block
    found = re.search(r"ext\.args = '(.*)'", (module / "tests" / "nextflow.config").read_text())
    assert found
    (tmp_path / "input").mkdir()
    datasets.pbmc68k_counts()[:100].copy().write_h5ad(tmp_path / "input" / "in.h5ad")
    values = {"h5ad": "input/in.h5ad", "prefix": "test", "task.cpus": "1", "args": found[1]}
    shell = as_shell(block[1], {**values, "task.process": "SCUVAE_FIT"})
    command = tmp_path / "bin" / "scuvae"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m scuvae "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    outputs = re.findall(r'path[( ]"([^"]+)"', text)
    written = {name.replace("${prefix}", "test") for name in outputs}
    assert written == {"test.h5ad", "test.json", "versions.yml"}
    assert all((tmp_path / name).exists() for name in written)
    versions = (tmp_path / "versions.yml").read_text()
    assert versions.strip().splitlines() == ['"SCUVAE_FIT":', f"    scuvae: {scuvae.__version__}"]
    if part == "script":
        assert json.loads((tmp_path / "test.json").read_text())["command"] == "fit"
        assert (tmp_path / "test.h5ad").stat().st_size > 0
