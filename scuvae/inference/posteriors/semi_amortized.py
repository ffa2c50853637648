"""A row for every cell, and an encoder that follows it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scuvae._random import permutation
from scuvae.batches import Batch, SparseRows
from scuvae.batches.sparse_rows import dense, sparse
from scuvae.batches.thinning import with_shallow
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.base import Posterior
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.posteriors.simulated import simulated
from scuvae.inference.posteriors.unamortized import UnamortizedPosterior
from scuvae.model import VAE
from scuvae.model.vae import frozen


class SemiAmortizedPosterior(Posterior):
    """A row for every cell, under which the decoder is fitted, and an encoder that follows.

    The rows move as those of an :class:`UnamortizedPosterior` and never ask the encoder, so that
    nothing can go round in circles: steps that started from the encoder and taught it where they
    led were measured to diverge. The encoder maximises the ELBO of its own q under the decoder as
    it is, which gets no gradient from it, on cells drawn from the decoder at their rows and on
    some of the batch's own, of both on thinned ones too. Measured beside an amortized fit's it was
    better on one data set and worse on another (tests/benchmarks/TRIED.md). Draws of counts cost as
    much as the rest of a step, so that the same drawn cells serve some steps.

    Parameters
    ----------
    mean, raw, local_step, optimizer, learning_rate
        Those of the table.
    """

    has_encoder = True
    has_rows = True
    draw_every = 8
    # One of so many cells that the encoder learns from is the batch's own.
    own_one_of = 4

    def __init__(
        self,
        mean: Tensor,
        raw: Tensor,
        *,
        local_step: str = "natural",
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.table = UnamortizedPosterior(
            mean, raw, local_step=local_step, optimizer=optimizer, learning_rate=learning_rate
        )
        self._drawn: Batch | None = None
        self._age = 0

    def rows(self) -> UnamortizedPosterior:
        return self.table

    def visit(self, on_host: Tensor) -> str | None:
        self.table.visit(on_host)
        return None  # the steps that draw cells are others than those that do not

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        q: Gaussian = self.table(model, batch, kl_weight)
        return q

    def step(self, model: VAE, batch: Batch, slope: Tensor, **options: Any) -> None:
        self.table.step(model, batch, slope, **options)

    def descend(
        self, model: VAE, batch: Batch, *, weight: float, kl_weight: float
    ) -> Tensor | None:
        decoder, training = model.decoder, model.decoder.training
        decoder.eval()  # the encoder serves the decoder without dropout
        seen = self._cells(model, batch)
        with frozen(decoder), frozen(model.likelihood):
            terms = elbo(model, seen, model.encode(seen))
            loss = kl_weight * terms.kl - terms.reconstruction
            (weight * loss.sum()).backward()
        decoder.train(training)
        return loss.detach().mean() * len(batch)

    @torch.no_grad()
    def _cells(self, model: VAE, batch: Batch) -> Batch:
        """What the encoder learns from in this step: drawn cells, own ones, thinned ones."""
        counts = model.likelihood.support == "counts"
        old = self._drawn
        if old is None or (self._age >= self.draw_every and len(batch) >= len(old)):
            drawn = simulated(model, batch, self.table(model, batch))
            if counts:
                x = sparse(drawn.x)
                # A size factor that is the cell's total is that of the drawn cell, too.
                totals = batch.size_factor == sparse(batch.x).sum()
                size_factor = torch.where(totals, x.sum().clamp_min(1), batch.size_factor)
                drawn = replace(drawn, x=x, size_factor=size_factor)
            old, self._age = drawn, 0
        self._drawn, self._age = old, self._age + 1
        n_own = len(batch) // self.own_one_of
        some = permutation(len(old))[: len(batch) - n_own].to(batch.index.device)
        seen = old.take(some)
        if n_own:
            seen = seen.followed_by(batch.take(torch.arange(n_own, device=batch.index.device)))
        return with_shallow(seen) if counts else seen

    def store(self, rows: Tensor, q: Gaussian) -> None:
        """Put ``q`` into the table's rows."""
        self.table.store(rows, q)

    def training_state(self) -> dict[str, Any]:
        """The drawn cells that serve some steps, and how many they have served."""
        drawn = self._drawn
        if drawn is None:
            return {}
        given = {"index": drawn.index, "size_factor": drawn.size_factor}
        if drawn.covariates is not None:
            given["covariates"] = drawn.covariates
        plain = {"sparse": isinstance(drawn.x, SparseRows), "size_of_all": drawn.size_of_all}
        return {"x": dense(drawn.x), "age": self._age, **given, **plain}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._drawn, self._age = None, 0
        if not state:
            return
        where = self.table.mean.device
        x, index, size_factor = (state[name].to(where) for name in ("x", "index", "size_factor"))
        covariates = state.get("covariates")
        self._age = int(state["age"])
        self._drawn = Batch(
            sparse(x) if state["sparse"] else x,
            index,
            size_factor,
            None if covariates is None else covariates.to(where),
            size_of_all=bool(state["size_of_all"]),
        )
