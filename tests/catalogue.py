"""What the catalogue's tests share: a row says what is done, and what the user must get."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from anndata import AnnData
from helpers import SMALL, small_counts, unchanged

import scuvae.inference.training.fit as training
from scuvae import tl

Change = Callable[[AnnData], AnnData | None]
FIT: dict[str, Any] = {**SMALL, "max_epochs": 1, "progress": False}


@dataclass(frozen=True)
class Row:
    """What is done to small data, how they are then fitted, and the words that must be said."""

    says: list[str]
    change: Change = lambda adata: None
    options: dict[str, Any] = field(default_factory=dict)
    kind: type[Exception] = ValueError

    def data(self) -> AnnData:
        adata = small_counts()
        return self.change(adata) or adata


def rows(table: dict[str, Row]) -> Any:
    """A test of every row, by its name."""
    return pytest.mark.parametrize("row", list(table.values()), ids=list(table))


@contextmanager
def no_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is wrong must be found before any work."""

    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    with monkeypatch.context() as patch:
        patch.setattr(training, "start", begun)
        yield


def refused(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit fails before any work, in the row's words, and leaves all as it was."""
    adata = row.data()
    with no_training(monkeypatch), unchanged(adata), warnings.catch_warnings():
        warnings.simplefilter("error")  # an error is not preceded by other words
        with pytest.raises(row.kind) as caught:
            tl.fit(adata, **{**FIT, **row.options})
    assert caught.type is row.kind
    for part in row.says:
        assert part in str(caught.value), str(caught.value)


def warned(row: Row) -> AnnData:
    """The fit works, with the row's warning once, at the line that calls it."""
    adata = row.data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tl.fit(adata, **{**FIT, **row.options})
    texts = [str(w.message) for w in caught]
    found = [w for w in caught if all(part in str(w.message) for part in row.says)]
    assert len(found) == 1, texts
    assert found[0].category is UserWarning
    assert found[0].filename == __file__
    return adata


def said(call: Callable[[], object]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]
