"""Verbs: AnnData in, AnnData out. Each has a file of its own."""

from scuvae.tl._denoise import denoise
from scuvae.tl._fit import fit
from scuvae.tl._gap import amortization_gap
from scuvae.tl._novelty import novelty
from scuvae.tl._project import project
from scuvae.tl._refine import refine
from scuvae.tl._score import score

__all__ = ["amortization_gap", "denoise", "fit", "novelty", "project", "refine", "score"]
