"""What hands out q for a batch of cells: one scheme a file, and their registry."""

from scuvae.inference.posteriors.base import Posterior
from scuvae.inference.posteriors.registry import POSTERIORS

__all__ = ["POSTERIORS", "Posterior"]
