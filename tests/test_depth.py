"""How many of the package's own functions lie between tl.fit and the likelihood."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import SCHEMES, small_data, small_fit

import scuvae
from scuvae.model.likelihoods import Likelihood
from scuvae.tl import _fit

PACKAGE = str(Path(scuvae.__file__).parent)

# Calls from the body of tl.fit to the likelihood's log-probability or its slopes, these counted
# with the others. What wraps tl.fit (runtime.isolated, the alias of rng=) comes before.
TRAINING, HELD_OUT = 5, 5
# What the encoder of a semi-amortized fit maximises beside, and the steps of held-out cells' q,
# which are those of every refinement: the means of cells climb before their scales are found.
BESIDE, STEPS = 6, 6


def frames_to_fit(frame: FrameType | None) -> list[str] | None:
    """The package's functions from tl.fit's body down to a frame."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        if code is _fit.fit.__wrapped__.__wrapped__.__code__:
            return names[::-1]
        if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            names.append(code.co_name)
        frame = frame.f_back
    return None


@pytest.mark.parametrize("likelihood", ["negative_binomial", "gaussian"])
@pytest.mark.parametrize("amortized", SCHEMES)
def test_few_calls_lead_from_fit_to_the_likelihood(
    amortized: bool | str, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, int] = {}

    def kind_of(names: list[str]) -> str:
        if "__call__" in names:
            return "beside" if "elbo" in names else "training"
        return "steps" if "refine_natural" in names else "held out"

    def watched(name: str) -> Any:
        original = getattr(Likelihood, name)

        def inside(*args: Any, **options: Any) -> Any:
            names = frames_to_fit(sys._getframe(1))
            if names is not None and names[0] == "train":
                kind = kind_of(names)
                found[kind] = max(found.get(kind, 0), len(names) + 1)
            return original(*args, **options)

        return inside

    for name in ("log_prob", "reverse"):
        monkeypatch.setattr(Likelihood, name, watched(name))
    small_fit(small_data(likelihood), amortized=amortized, likelihood=likelihood)
    most = {"training": TRAINING, "held out": HELD_OUT, "steps": STEPS}
    most |= {"beside": BESIDE} if amortized == "semi" else {}
    assert set(found) == set(most)
    assert all(found[kind] <= most[kind] for kind in most), found
