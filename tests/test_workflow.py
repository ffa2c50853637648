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

from scuvae import cli, datasets
from scuvae.cli.command_line import parser

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


def test_the_nextflow_module_calls_what_there_is(tmp_path: Path) -> None:
    """Its script's command, with its test's arguments, and its flags against the command line."""
    module = FOLDER / "nextflow" / "scuvae" / "fit"
    script = re.search(r'"""\n(.*?)"""', (module / "main.nf").read_text(), flags=re.DOTALL)
    assert script
    words = re.sub(r"\\\\\n\s*", " ", script[1]).strip().splitlines()[0].split()
    found = re.search(r"ext\.args = '(.*)'", (module / "tests" / "nextflow.config").read_text())
    assert found
    counts = tmp_path / "in.h5ad"
    datasets.pbmc68k_counts()[:100].copy().write_h5ad(counts)
    values = {
        "${h5ad}": [str(counts)],
        "${prefix}.h5ad": [str(tmp_path / "test.h5ad")],
        "${prefix}.json": [str(tmp_path / "test.json")],
        "${task.cpus}": ["1"],
        "${args}": found[1].split(),
    }
    command = [one for word in words for one in values.get(word, [word])]
    assert command[0] == "scuvae"
    assert not any("$" in word for word in command)
    parser().parse_args(command[1:])
    assert cli.main(command[1:]) == 0
    assert json.loads((tmp_path / "test.json").read_text())["command"] == "fit"
