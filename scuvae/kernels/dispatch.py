"""Whether the compiled kernels take a tensor."""

from functools import cache

import torch
from torch import Tensor


def compiled(x: Tensor) -> bool:
    """Whether the compiled kernels take a tensor: float32 on a CPU."""
    return x.dtype is torch.float32 and x.is_cpu and _enabled()


@cache
def _enabled() -> bool:
    from scuvae.kernels.threads import ENABLED

    return ENABLED


def asks_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to see what is done with these: kernels work behind its back."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
