"""Verbs: AnnData in, AnnData out. Each has a file of its own."""

from scuvae.tl._calibration import calibration
from scuvae.tl._compare_n_latent import compare_n_latent
from scuvae.tl._decode import decode
from scuvae.tl._denoise import denoise
from scuvae.tl._embed import embed
from scuvae.tl._extend_genes import extend_genes
from scuvae.tl._fit import fit
from scuvae.tl._gap import amortization_gap
from scuvae.tl._loadings import loadings
from scuvae.tl._novelty import novelty
from scuvae.tl._predictive import predictive_check
from scuvae.tl._project import project
from scuvae.tl._rank_genes import rank_genes
from scuvae.tl._refine import refine
from scuvae.tl._sample import sample
from scuvae.tl._score import score
from scuvae.tl._to_encoder import to_encoder
from scuvae.tl._transfer_labels import transfer_labels

__all__ = [
    "amortization_gap",
    "calibration",
    "compare_n_latent",
    "decode",
    "denoise",
    "embed",
    "extend_genes",
    "fit",
    "loadings",
    "novelty",
    "predictive_check",
    "project",
    "rank_genes",
    "refine",
    "sample",
    "score",
    "to_encoder",
    "transfer_labels",
]
