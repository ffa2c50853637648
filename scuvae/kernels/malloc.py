"""What glibc does with the memory that a step frees."""

from functools import cache

import torch


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next: it gives back what exceeds twice the largest
    block ever freed, and pages taken anew cost a step as much as its elementwise work. Up to 32 MB
    count; the block here is never touched. Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
