"""Build the reference site: python docs/build.py [--output DIR]. Warnings are errors.

Pages are taken where they lie, README.md and tutorials/ too: from a copy of the repository's pages,
so that links between them hold. The pages of single functions are made from the package.
"""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "tl": "Fit, and what is done with a fit.",
    "pp": "Before and between.",
    "pl": "Pictures.",
    "get": "Read a fit back.",
    "io": "Model files.",
    "datasets": "Data to try things on.",
    "external.scvi": "For models that scvi-tools trained.",
}
KEPT = (".md", ".ipynb", ".png", ".json", ".py", ".yaml", ".yml", ".nf", ".cff", ".toml", ".test")


def copy_pages(target: Path) -> None:
    """Every page, and what pages link to, at its place in the repository."""
    for folder in ("docs", "tutorials", "tests", "data"):
        for path in sorted((ROOT / folder).rglob("*")):
            named = path.suffix in KEPT or path.name in ("Snakefile", "config")
            hidden = any(part.startswith((".", "__")) for part in path.relative_to(ROOT).parts)
            if path.is_file() and named and not hidden and "_build" not in path.parts:
                new = target / path.relative_to(ROOT)
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
    for path in [
        *ROOT.glob("*.md"),
        ROOT / "LICENSE",
        ROOT / "pyproject.toml",
        *ROOT.glob("*.cff"),
    ]:
        shutil.copyfile(path, target / path.name)
    (target / ".ci").mkdir()
    shutil.copyfile(ROOT / ".ci" / "run", target / ".ci" / "run")
    shutil.copyfile(ROOT / "docs" / "site" / "index.md", target / "index.md")


def write_api(target: Path) -> None:
    """A page a function, and one that lists them with their first lines."""
    folder = target / "api"
    folder.mkdir()
    text = ["# Reference", ""]
    for part, what in PARTS.items():
        module = importlib.import_module(f"scuvae.{part}")
        text += [f"## scuvae.{part}", "", what, "", "| | |", "|---|---|"]
        names = sorted(module.__all__)
        for name in names:
            full = f"scuvae.{part}.{name}"
            first = (getattr(module, name).__doc__ or "").strip().split("\n\n")[0]
            first = " ".join(first.split()).replace("|", "\\|")
            first = re.sub(r":\w+:`([^`]*)`", r"`\1`", first).replace("``", "`")
            text.append(f"| [{part}.{name}]({full}.md) | {first} |")
            page = f"# {part}.{name}\n\n```{{eval-rst}}\n.. autofunction:: {full}\n```\n"
            (folder / f"{full}.md").write_text(page, encoding="utf-8")
        text += ["", "```{toctree}", ":hidden:", ""]
        text += [*(f"scuvae.{part}.{name}" for name in names), "```", ""]
    (folder / "index.md").write_text("\n".join(text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the reference site.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "_build")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "pages")
        source.mkdir()
        copy_pages(source)
        write_api(source)
        words = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "docs")]
        command = [sys.executable, "-m", "sphinx", *words, str(source), str(args.output)]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    raise SystemExit(main())
