"""What torch's launchers, ``torchrun`` first of all, tell a process by its environment."""

import os

# All of them have to be there: some of these names others use as well.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 where nobody launched several."""
    if any(name not in os.environ for name in _TOLD):
        return 0, 1
    return _number("RANK"), _number("WORLD_SIZE")


def local_number() -> int:
    """The number of this process among those of its machine."""
    return _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(
            f"the environment's {name} is {os.environ[name]!r}, no number: start processes by "
            "torchrun, or unset it"
        ) from None


def number_of_processes(asked: int | None) -> int:
    """How many processes a fit has: those that were launched, or this one alone."""
    size = launched()[1]
    if asked is None or asked == size:
        return size
    if asked == 1:
        return 1
    found = f"torchrun has started {size}" if size > 1 else "this one is alone"
    raise ValueError(
        f"processes={asked}, but {found}: processes are started from outside, each as a whole. In "
        f"a shell: torchrun --nproc-per-node {asked} -m scuvae fit IN.h5ad -o OUT.h5ad; or, with a "
        f"script that calls tl.fit: torchrun --nproc-per-node {asked} script.py. A notebook is "
        "one process: write the AnnData to a file, and fit that in a shell"
    )
