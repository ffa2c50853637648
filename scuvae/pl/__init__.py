"""Pictures of fits, in scanpy's manner, from what ``scuvae.tl`` wrote; torch is never imported."""

from ._loss import loss
from ._predicted import observed_vs_predicted

__all__ = ["loss", "observed_vs_predicted"]
