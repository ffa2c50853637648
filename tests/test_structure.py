"""The package's own shape: its import arrows, its signatures, its docstrings."""

import ast
import doctest
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import TABLES, WITH_GROUPS, WITH_REFERENCE
from mistakes import FORMULAS, SURVIVED, Mistake
from mistakes_of_places import SLOTS

import scuvae
from scuvae import tl

ROOT = Path(scuvae.__file__).parent

# Whom a part may import. A part that is not listed fails: give it a place in the design first.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"tl", "pl", "get", "io", "datasets", "_demo"},
    "_demo": {"tl", "pl", "get", "datasets"},
    "external": {
        *("tl", "inference", "io", "get", "model", "distributions", "batches", "kernels"),
        "runtime",
    },
    "tl": {"inference", "io", "get", "model", "distributions", "batches", "runtime"},
    "pp": {"inference", "io", "model", "distributions", "batches", "runtime"},
    "pl": set(),
    "get": {"io", "model", "runtime"},
    "io": {"model", "distributions", "batches", "runtime"},
    "inference": {"model", "distributions", "batches", "kernels", "runtime"},
    "model": {"distributions", "batches", "kernels"},
    "distributions": {"kernels"},
    "batches": {"kernels"},
    "kernels": set(),
    "runtime": set(),
    "datasets": set(),
}
HELPERS = {
    *("_adata", "_keys", "_checks", "_errors", "_launched", "_replacing", "_random"),
    "_reliability",
}

# What nothing that the part imports from scuvae may import either.
FORBIDDEN: dict[str, set[str]] = {
    **{
        part: {"anndata", "scanpy", "pandas", "h5py", "zarr"}
        for part in (
            "_random",
            "model",
            "inference",
            "distributions",
            "batches",
            "kernels",
            "runtime",
        )
    },
    "pl": {"torch"},
    "datasets": {"torch"},
    "__init__": {"torch", "anndata", "scanpy", "numpy", "pandas", "scipy"},
}
# What may be imported inside a function only: it is an extra, and slow.
LAZY = {"scvi"}

MODULES = {
    "scuvae." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}


def part_of(module: str) -> str:
    return module.split(".")[1]


@cache
def imports(module: str) -> frozenset[str]:
    """The full names of all modules that a module's code imports, anywhere in it."""
    found = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # ``from scuvae import tl`` imports scuvae.tl, ``from scuvae import __version__`` not.
            if name == "scuvae":
                found |= {f"scuvae.{alias.name}" for alias in node.names}
            else:
                found.add(name)
    return frozenset(found)


def internal(module: str) -> set[str]:
    """The modules of scuvae that a module imports."""
    found = set()
    for name in imports(module):
        if name.startswith("scuvae."):
            found |= {name, f"{name}.__init__"} & set(MODULES)
    return found


def reached(module: str) -> set[str]:
    """The module and all of scuvae that it imports, by however many steps."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += internal(name)
    return seen


def test_there_is_something_to_walk() -> None:
    assert {"scuvae.tl._fit", "scuvae.model.vae", "scuvae._keys"} <= set(MODULES)
    assert "scuvae.inference.training.fit" in internal("scuvae.tl._trained")
    assert "scuvae.model.__init__" in internal("scuvae.inference.training.loop")
    assert "scuvae._errors" in internal("scuvae.pl._common")  # a relative import
    assert "scuvae.model.likelihoods.base" in reached("scuvae.tl._score")


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    part = part_of(module)
    if part in HELPERS:
        assert {part_of(name) for name in internal(module)} <= HELPERS
        return
    assert part in ARROWS, f"{part} has no place in ARROWS"
    allowed = ARROWS[part] | HELPERS | {part}
    wrong = {name for name in internal(module) if part_of(name) not in allowed}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in FORBIDDEN])
def test_libraries_stay_where_they_belong(module: str) -> None:
    for name in reached(module):
        libraries = {library.split(".")[0] for library in imports(name)}
        wrong = libraries & FORBIDDEN[part_of(module)]
        assert not wrong, f"{module} imports {sorted(wrong)} by way of {name}"


@pytest.mark.parametrize("module", MODULES)
def test_extras_are_imported_on_use(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not LAZY & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_imported_in_a_circle(module: str) -> None:
    assert all(module not in reached(name) for name in internal(module))


# One verb or picture a file: these grow with what the package can do.
WIDE = {"tl", "pl"}
MOST_FILES = 14
# Files of one name that mean one thing, at another height each.
ALIKE = {
    "gaussian": "the Gaussian: as q, as a likelihood, compiled",
    "adam": "Adam: of one cell's q, and compiled",
    "base": "what the entries of a registry have in common",
    "registry": "entries by name",
    "covariates": "what a decoder is told beside z: its columns, and those of obs they come from",
    "rising_factorial": "the rising factorial, and compiled",
    "natural_gradient": "natural-gradient steps",
}


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_folder_asks_one_question(folder: Path) -> None:
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES or folder.name in WIDE


def test_files_of_one_name_mean_one_thing() -> None:
    names = [
        path.stem.lstrip("_")
        for path in MODULES.values()
        if path.parent.name not in WIDE and path.stem != "__init__"
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= set(ALIKE), f"what do files named {sorted(twice - set(ALIKE))} mean?"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_idea(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    assert len(lines) <= 420  # "about 400"
    if lines:
        assert ast.get_docstring(ast.parse("\n".join(lines))), f"{module} has no docstring"


# --- signatures ---------------------------------------------------------------------------------

FIT_DEFAULTS: dict[str, Any] = {
    "amortized": False,
    "likelihood": "auto",
    "n_latent": 10,
    "n_hidden": 128,
    "n_layers": 1,
    "covariance": None,
    "layer": None,
    "mask_var": None,
    "batch_key": None,
    "categorical_covariate_keys": None,
    "continuous_covariate_keys": None,
    "size_factor_key": None,
    "validation_fraction": 0.1,
    "max_epochs": None,
    "batch_size": None,
    "learning_rate": None,
    "optimizer": "adam",
    "local_step": "natural",
    "n_samples": 1,
    "kl_weight": 1.0,
    "early_stopping": True,
    "device": "auto",
    "rng": 0,
    "key_added": None,
    "copy": False,
    "progress": None,
}
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "project": {"key": None, "layer": None, "key_added": None},
    "novelty": {"key": None, "layer": None, "key_added": None, "rng": 0},
    "embed": {"key": None},
    "extend_genes": {"genes": None, "mask_var": None, "layer": None, "key": None},
    "refine": {"key": None, "key_added": None},
    "score": {"key": None, "n_samples": 100, "rng": 0},
    "amortization_gap": {"key": None},
    "denoise": {"key": None, "layer_added": None},
    "to_encoder": {"key": None, "key_added": None, "rng": 0},
    "sample": {"key": None, "n_samples": 1, "rng": 0},
    "calibration": {"key": None, "levels": (0.5, 0.8, 0.95), "covariance": None, "rng": 0},
    "predictive_check": {"key": None},
    "loadings": {"key": None},
    "rank_genes": {"groups": "all", "reference": "rest", "donor_key": None, "key": None},
    "transfer_labels": {"labels": "cell_type", "key": None, "layer": None, "key_added": None},
}


def public() -> Iterator[tuple[str, Callable[..., object]]]:
    for part in ("tl", "pp", "get", "io", "pl", "datasets"):
        module = importlib.import_module(f"scuvae.{part}")
        for name in module.__all__:
            yield f"{part}.{name}", getattr(module, name)
    bridge = importlib.import_module("scuvae.external.scvi")
    for name in bridge.__all__:
        yield f"external.scvi.{name}", getattr(bridge, name)


PUBLIC = dict(public())
every_verb = pytest.mark.parametrize("name", [n for n in tl.__all__ if n not in TABLES])


def sections(function: Callable[..., object]) -> dict[str, list[str]]:
    """The numpydoc sections of a docstring."""
    out: dict[str, list[str]] = {"": []}
    title = ""
    lines = (inspect.getdoc(function) or "").splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"-{3,}", line):
            continue
        if i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1]):
            title = line
            assert title not in out
            out[title] = []
        else:
            out[title].append(line)
    return out


@every_verb
def test_adata_first_all_else_by_name(name: str) -> None:
    first, *rest = inspect.signature(getattr(tl, name)).parameters.values()
    assert first.name == "adata"
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    if name in WITH_REFERENCE:
        reference = rest.pop(0)
        assert (reference.name, reference.default) == ("reference", inspect.Parameter.empty)
    if name in WITH_GROUPS:
        groupby = rest.pop(0)  # as in scanpy
        assert (groupby.name, groupby.default) == ("groupby", inspect.Parameter.empty)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)
    assert all(p.default is not inspect.Parameter.empty for p in rest)
    assert {p.name: p.default for p in rest}["copy"] is False


@every_verb
def test_the_arguments_that_the_design_names(name: str) -> None:
    designed = FIT_DEFAULTS if name == "fit" else OTHER_DEFAULTS[name]
    parameters = inspect.signature(getattr(tl, name)).parameters
    found = {key: parameters[key].default for key in designed}
    assert found == designed
    assert all(type(found[key]) is type(value) for key, value in designed.items())


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.startswith("get.")])
def test_getters_take_a_key(name: str) -> None:
    adata, key = inspect.signature(PUBLIC[name]).parameters.values()
    assert (adata.name, key.name, key.default) == ("adata", "key", None)
    assert key.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", PUBLIC)
def test_types_and_docstrings_are_complete(name: str) -> None:
    function = PUBLIC[name]
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())

    parts = sections(function)
    assert "".join(parts[""]).strip()
    needed = {"Returns", "Raises", "Examples"} | ({"Parameters"} if signature.parameters else set())
    assert needed <= set(parts)
    assert any(line.startswith(">>> ") for line in parts["Examples"])
    listed = [
        argument.strip()
        for line in parts.get("Parameters", [])
        if line and not line.startswith(" ")
        for argument in line.split(":")[0].split(",")
    ]
    assert listed == list(signature.parameters)


@every_verb
def test_every_slot_that_a_verb_writes_is_documented(name: str) -> None:
    text = "\n".join(sections(getattr(tl, name))["Returns"])
    assert re.search(r'(obsm|obs|uns|layers)\["', text)
    assert "None" in text


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with an underscore that a file takes from a module of the package, or patches there."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scuvae"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES or f"{full}.__init__" in MODULES:
                    modules[alias.asname or alias.name] = full
                else:
                    yield alias.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and f"{module}.{node.attr}" not in MODULES:
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from (name.split(".")[-1] for name in names if isinstance(name, str))


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem
)
def test_tests_ask_public_names(path: Path) -> None:
    """What has an underscore may change with its module alone: tests hold on to what it offers."""
    found = private_names(ast.parse(path.read_text()))
    assert [name for name in found if re.match("_[^_]", name)] == []


@pytest.mark.parametrize(
    "mistake", [*SURVIVED, *FORMULAS, *SLOTS], ids=lambda mistake: mistake.what
)
def test_mistakes_can_be_planted(mistake: Mistake) -> None:
    """What ``mutations.py`` replaces is there, once: a change that moves it moves it there too."""
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.old) == 1


# --- doctests -----------------------------------------------------------------------------------


def modules_with_examples() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(scuvae.__path__, "scuvae.")]
    return [
        name
        for name in names
        if not name.endswith("__main__")
        and ">>>" in MODULES.get(name, MODULES.get(f"{name}.__init__", ROOT)).read_text()
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("scuvae.external."):
        package = name.split(".")[-1]  # that it is a bridge to
        pytest.importorskip(package)
        monkeypatch.setattr(logging.getLogger(package), "level", logging.ERROR)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
