"""Help for error messages: near matches for a name that was not found."""

from collections.abc import Iterable
from difflib import get_close_matches


def near(name: object, known: Iterable[object], *, limit: int = 10) -> str:
    """``"Did you mean 'x'? Known: 'x', 'y'."`` for an unknown ``name``."""
    # anndata 0.13 lists X among the layers, by the name None.
    names = [str(k) for k in known if k is not None]
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    listed = ", ".join(repr(k) for k in names[:limit]) + (", ..." if len(names) > limit else "")
    guess = f"Did you mean {' or '.join(repr(k) for k in close)}? " if close else ""
    return f"{guess}Known: {listed}." if names else "There are none."
