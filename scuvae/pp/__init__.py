"""Graphs from posteriors, in scanpy's own slots."""

from scuvae.pp._neighbors import neighbors

__all__ = ["neighbors"]
