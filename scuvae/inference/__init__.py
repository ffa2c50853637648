"""q: found for every cell, and judged. Torch only; knows nothing of AnnData."""
