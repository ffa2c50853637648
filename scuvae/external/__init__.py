"""Bridges to models that others trained: :mod:`scuvae.external.scvi`. Each loads on first use."""

from importlib import import_module
from types import ModuleType

__all__ = ["scvi"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
