"""The README and docs/ do what they say: snippets run, commands parse, paths exist."""

import re
import shlex
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from scuvae.cli import command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
# Pages whose links are looked at, though nothing in them is run.
OTHERS = ["CONTRIBUTING.md", "tests/benchmarks/README.md", "tests/benchmarks/TRIED.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every ``scuvae ...`` of the sh blocks, without what stands before it on its line."""
    lines = "\n".join(block for text in PAGES.values() for block in blocks(text, "sh"))
    whole = lines.replace("\\\n", " ")
    return re.findall(r"^(?:.*/bin/)?scuvae( .*)$", whole, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
def test_snippets_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive")
        for number, snippet in enumerate(blocks(PAGES[page], "python"), start=1):
            # Whether lines run does not hang on epochs, which are most of their time.
            snippet = re.sub(r"\bmax_epochs=\d+", "max_epochs=2", snippet)
            exec(compile(snippet, f"{page}, python block {number}", "exec"), namespace)
    plt.close("all")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genes.txt").write_text("CD3D\n")  # which is read with the command's words
    command_line.parser().parse_args(shlex.split(command))


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


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]*)?\)", text)
    missing = [path for path in linked if not ((ROOT / page).parent / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    quoted = re.findall(
        r"`((?:scuvae|tests|tutorials|data|docs|\.ci)/[\w./]*|[A-Z]+\.md|LICENSE)`", PAGES[page]
    )
    made = {"scuvae-demo/"}
    assert not [path for path in {*quoted} - made if not (ROOT / path).exists()]


def test_every_page_is_linked_from_the_readme() -> None:
    assert len(PAGES) > 1
    assert blocks(README, "python")  # what the test of snippets runs is not empty
    # Those of docs/site/ are the reference site's own, which lists them.
    pages = {page for page in PAGES if not page.startswith("docs/site/")}
    assert {page for page in pages if f"]({page})" not in README} == {"README.md"}


def test_the_site_lists_every_page() -> None:
    index = (ROOT / "docs" / "site" / "index.md").read_text(encoding="utf-8")
    listed = {line.rstrip(">").split("<")[-1] for line in index.splitlines()}
    pages = [ROOT / page for page in PAGES if page != "docs/site/index.md"]
    if (ROOT / "tutorials").exists():  # source distributions go without
        pages += sorted((ROOT / "tutorials").glob("*.ipynb"))
    assert not [p for p in pages if p.relative_to(ROOT).with_suffix("").as_posix() not in listed]


def test_hooks_run_what_ci_runs() -> None:
    linters = r"(\.venv/bin/(?:ruff|mypy)\b.*)$"
    run = re.findall("^" + linters, (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert run
    assert re.findall("^ +entry: " + linters, config, flags=re.MULTILINE) == run
