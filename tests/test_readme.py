"""The README does what it says: its snippets run, its commands parse, its paths exist."""

import re
import shlex
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from scuvae import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every ``scuvae ...`` of the sh blocks, without what stands before it on its line."""
    return re.findall(r"^(?:.*/bin/)?scuvae( .*)$", "\n".join(blocks("sh")), flags=re.MULTILINE)


def test_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert snippets
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive")
        for number, snippet in enumerate(snippets, start=1):
            exec(compile(snippet, f"README.md, python block {number}", "exec"), namespace)
    plt.close("all")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    cli.parser().parse_args(shlex.split(command))


def test_entry_point_exists() -> None:
    assert len(commands()) > 3
    module, function = PROJECT["scripts"]["scuvae"].split(":")
    assert callable(getattr(import_module(module), function))


def test_test_command_is_marked_once() -> None:
    # .ci/run takes the command from here.
    marked = re.findall(r"<!-- test command -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert README.count("<!-- test command -->") == len(marked) == 1
    for extra in re.findall(r"\.\[(\w+)\]", marked[0]):
        assert extra in PROJECT["optional-dependencies"]


def test_paths_exist() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    quoted = re.findall(r"`((?:scuvae|tests|tutorials|data|\.ci)/[\w./]*|LICENSE)`", README)
    made = {"scuvae-demo/"}
    missing = [path for path in {*linked, *quoted} - made if not (ROOT / path).exists()]
    assert not missing
