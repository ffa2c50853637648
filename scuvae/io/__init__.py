"""Between AnnData or files and tensors: matrices to batches, models to plain arrays and back.

For users: :func:`write_model` and :func:`read_model`.
"""

from importlib import import_module
from typing import Any

__all__ = ["read_model", "write_model"]


def __getattr__(name: str) -> Any:
    # On use: what imports a part of io does not ask for the files.
    if name in __all__:
        return getattr(import_module("scuvae.io.model_files"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
