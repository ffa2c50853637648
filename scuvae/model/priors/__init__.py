"""p(z): one prior a file, and their registry."""

from scuvae.model.priors.base import Prior
from scuvae.model.priors.registry import PRIORS

__all__ = ["PRIORS", "Prior"]
