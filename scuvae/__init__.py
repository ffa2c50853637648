"""Variational autoencoders for single-cell counts, with or without an encoder.

``scuvae.tl`` fits and uses them, ``scuvae.pp`` makes neighbour graphs of them, ``scuvae.pl`` draws
them, ``scuvae.get`` reads a fit back, ``scuvae.datasets`` has data to try them on,
``scuvae.external`` bridges to scvi-tools. Submodules load on first use, so that ``import scuvae``
costs next to nothing.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.2.0"

_SUBMODULES = ("datasets", "external", "get", "io", "pl", "pp", "tl")
__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
