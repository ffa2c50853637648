"""Matrices in memory or on a device, kept small."""

from typing import Any

import numpy as np
import torch
from scipy import sparse as sp
from torch import Tensor

from scuvae.batches.compact_rows import CompactRows, is_count
from scuvae.batches.sources.base import Source
from scuvae.batches.sources.in_memory import fits
from scuvae.batches.sparse_rows import SparseRows


class CompactSource(Source):
    """A matrix as :class:`CompactRows`, and CSR matrices of counts that would have to be copied.

    Those are of other types than float32, which alone batches are made of. Where the arrays would
    take more than half of a GPU's free memory they stay on the host.
    """

    @classmethod
    def takes(cls, x: Any) -> bool:
        if isinstance(x, CompactRows):
            return True
        return bool(sp.issparse(x)) and x.dtype != np.float32 and _all_counts(x.data)

    def __init__(self, x: Any, device: torch.device) -> None:
        if not isinstance(x, CompactRows):
            x = sp.csr_array(x)
            if not x.data.all():  # likelihoods take every entry for a nonzero
                x = x.copy()
                x.eliminate_zeros()
            x = CompactRows.of(x, counts=True)
        self.shape, self.device, self.matrix = x.shape, device, x
        self.host_lengths = torch.from_numpy(np.diff(x.starts))
        self.resident = fits(x.nbytes, device)
        self.there = x.to(device) if self.resident and device.type != "cpu" else None

    def rows(
        self, index: Tensor, on_host: Tensor | None = None, size: int | None = None
    ) -> SparseRows:
        if self.there is not None:
            return self.there.padded(index, size)
        found = self.matrix.take(index.cpu() if on_host is None else on_host)
        return found if self.device.type == "cpu" else found.to(self.device)

    def sizes(self, on_host: Tensor) -> Tensor | None:
        if self.there is None:
            return None
        return self.host_lengths[on_host].sort(descending=True).values.cumsum(0)

    def totals(self) -> Tensor:
        return self.matrix.totals().to(self.device)


def _all_counts(values: np.ndarray) -> bool:
    step = 2**22
    return all(bool(is_count(values[i : i + step]).all()) for i in range(0, len(values), step))
