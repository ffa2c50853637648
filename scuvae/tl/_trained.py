"""A model and its cells' posteriors, from the first step of training to the last."""

from contextlib import nullcontext

import numpy as np
import pandas as pd

import scuvae.inference.training.fit as training
from scuvae.batches import Cells
from scuvae.inference.training.checkpoint import Checkpoint
from scuvae.inference.training.distributed import ALONE, Processes
from scuvae.inference.training.fit import Begin
from scuvae.inference.training.settings import Settings
from scuvae.model import VAE
from scuvae.runtime import logger


def trained(
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
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The history of a training of ``model``, and the moments of every cell's q.

    Of several processes the first has those of all cells, with the cells' ``total`` beside them;
    others have nothing. ``begin``: as :func:`scuvae.inference.training.fit.start` takes it.
    """
    if early_stopping and not group.most(int(held_out.any())):
        logger.warning("no cells are held out: early stopping is off")
    begun = training.start(
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
    bar = training.bar("fit", settings.max_epochs, shown, begun.n_done)
    with bar as on_epoch, keeper or nullcontext():
        history = training.train(**begun.arguments, on_epoch=on_epoch)
    q = training.finish(begun)
    if group.several:
        q["total"] = cells.size_factor.cpu().numpy()[:, None]
        gathered = {name: group.collected(values, cells.room) for name, values in q.items()}
        q = {name: values for name, values in gathered.items() if values is not None}
    return pd.DataFrame(history, index=pd.RangeIndex(len(history), name="epoch")), q
