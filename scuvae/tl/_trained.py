"""A model and its cells' posteriors: before the first step of training, and after the last."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd

import scuvae.inference.training.fit as training
from scuvae.batches import Cells
from scuvae.inference.training.checkpoint import Checkpoint
from scuvae.inference.training.distributed import ALONE, Processes
from scuvae.inference.training.fit import Begin, Start
from scuvae.inference.training.settings import Settings
from scuvae.model import VAE
from scuvae.runtime import logger


@contextmanager
def begun(
    model: VAE,
    cells: Cells,
    held_out: np.ndarray,
    settings: Settings,
    *,
    early_stopping: bool,
    seed: int,
    keeper: Checkpoint | None = None,
    group: Processes = ALONE,
    progress: bool | None = None,
    begin: Begin | None = None,
) -> Iterator[Start]:
    """A training of ``model``, whose arguments are to be given to ``train`` inside: with a bar,
    and with checkpoints where there is a keeper.

    ``begin``: as :func:`scuvae.inference.training.fit.start` takes it.
    """
    if early_stopping and not group.most(int(held_out.any())):
        logger.warning("no cells are held out: early stopping is off")
    start = training.start(
        model,
        cells,
        held_out,
        settings,
        early_stopping=early_stopping,
        seed=seed,
        checkpoint=keeper,
        processes=group,
        begin=begin,
    )
    shown = False if group.rank else progress
    bar = training.bar("fit", settings.max_epochs, shown, start.n_done)
    with bar as on_epoch, keeper or nullcontext():
        yield replace(start, arguments=start.arguments | {"on_epoch": on_epoch})


def ended(
    start: Start, history: list[dict[str, float]]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The history of a training, and the moments of every cell's q.

    Of several processes the first has those of all cells, with the cells' ``total`` beside them;
    others have nothing.
    """
    q, group, cells = training.finish(start), start.processes, start.cells
    if group.several:
        q["total"] = cells.size_factor.cpu().numpy()[:, None]
        gathered = {name: group.collected(values, cells.room) for name, values in q.items()}
        q = {name: values for name, values in gathered.items() if values is not None}
    return pd.DataFrame(history, index=pd.RangeIndex(len(history), name="epoch")), q
