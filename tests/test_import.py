"""``import scuvae`` and the command line's parser load nothing heavy."""

import subprocess
import sys

import pytest

import scuvae

HEAVY = ("torch", "scvi", "anndata", "scanpy", "numpy", "pandas", "scipy", "matplotlib", "tqdm")


@pytest.mark.parametrize("module", ["scuvae", "scuvae.cli"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_submodules_load_on_use() -> None:
    code = "import scuvae; assert scuvae.datasets.__name__ == 'scuvae.datasets'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tools'"):
        scuvae.tools  # noqa: B018


def test_dir_lists_what_can_be_had() -> None:
    assert all(hasattr(scuvae, name) for name in dir(scuvae))
