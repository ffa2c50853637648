"""p(x | η): one likelihood a file, and their registry."""

from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.registry import LIKELIHOODS

__all__ = ["LIKELIHOODS", "Likelihood"]
