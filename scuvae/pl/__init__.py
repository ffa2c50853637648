"""Pictures of fits, in scanpy's manner, from what ``scuvae.tl`` wrote; torch is never imported."""

from ._arrows import refinement_arrows
from ._calibration import calibration
from ._embedding import embedding_scores
from ._gap import amortization_gap
from ._label_reliability import label_reliability
from ._latent_dimensions import latent_dimensions
from ._loss import loss
from ._predicted import observed_vs_predicted
from ._predictive import predictive_check
from ._size import elbo_by_size
from ._volcano import volcano

__all__ = [
    "amortization_gap",
    "calibration",
    "elbo_by_size",
    "embedding_scores",
    "label_reliability",
    "latent_dimensions",
    "loss",
    "observed_vs_predicted",
    "predictive_check",
    "refinement_arrows",
    "volcano",
]
