"""p: likelihoods, networks and the VAE. Torch only; knows nothing of inference or of AnnData."""

from scuvae.model.batch import Batch, SparseRows
from scuvae.model.gaussian import full_gaussian, gaussian, raw_scale
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.networks import Decoder, Encoder
from scuvae.model.vae import VAE

__all__ = [
    "LIKELIHOODS",
    "VAE",
    "Batch",
    "Decoder",
    "Encoder",
    "Likelihood",
    "SparseRows",
    "full_gaussian",
    "gaussian",
    "raw_scale",
]
