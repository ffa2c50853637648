"""Pictures of fits, in scanpy's manner, from what ``scuvae.tl`` wrote; torch is never imported."""

from ._arrows import refinement_arrows
from ._embedding import embedding_scores
from ._gap import amortization_gap
from ._loss import loss
from ._predicted import observed_vs_predicted
from ._size import elbo_by_size

__all__ = [
    "amortization_gap",
    "elbo_by_size",
    "embedding_scores",
    "loss",
    "observed_vs_predicted",
    "refinement_arrows",
]
