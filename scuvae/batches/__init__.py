"""Some cells of a matrix as tensors, whether it is sparse, dense, in memory or elsewhere."""

from scuvae.batches.batch import Batch
from scuvae.batches.loader import Cells
from scuvae.batches.sparse_rows import SparseRows

__all__ = ["Batch", "Cells", "SparseRows"]
