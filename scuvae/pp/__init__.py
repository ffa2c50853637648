"""What is made ready for other tools: neighbour graphs from posteriors, counts split in two."""

from scuvae.pp._neighbors import neighbors
from scuvae.pp._thin_counts import thin_counts

__all__ = ["neighbors", "thin_counts"]
