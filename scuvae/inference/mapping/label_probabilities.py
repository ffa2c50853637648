"""Probabilities of labels: two opinions, weighed by how often they were right of known cells.

One opinion is the share of a reference's votes (:mod:`.label_transfer`), which the model makes; the
other a logistic regression of labels on the values, which knows nothing of the model but uses what
tells labels apart and is little of the likelihood. Both are surer, or less sure, than they are
right. With shares p_j(k) of label k, and d the logarithm of a cell's total,

    ln p(k) = Σ_j (a_j + b_j d) ln(p_j(k) + ε_j) − log Σ_k:

a temperature for each opinion that may change with depth (Guo et al. 2017, of one opinion and no
depth). a and b are those under which the labels of reference cells are likeliest, each as if it
were new: its own vote is left out, those of other held-out cells too where it was held out of the
decoder's training, and the regression has not seen it. Counts are there twice, as they are and
thinned to a depth drawn log-uniformly from 10 counts up: weights then hold for shallow cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse as sp
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from scuvae._reliability import expected_calibration_error, reliability
from scuvae.batches import Batch, Cells, SparseRows
from scuvae.batches.sparse_rows import sparse
from scuvae.batches.thinning import shallow
from scuvae.inference.mapping.label_regression import LabelRegression
from scuvae.inference.mapping.label_transfer import votes
from scuvae.inference.refinement.profile_likelihood import profile_log_likelihood
from scuvae.model import VAE

# Reference cells at most that the regression, and that the weights are found from.
MOST_TRAINED, MOST_WEIGHED = 5000, 2000
_FOLDS = 3
# What an opinion counts as at least: one vote of a hundred; a regression's probability.
_LEAST = (0.01, 0.001)
# An affinity that gives a voter nothing to say.
_NONE = -1e30


@dataclass(frozen=True)
class Voters:
    """The reference's labelled cells: z, (voters, latent), and of each its label, one-hot."""

    model: VAE
    z: Tensor
    of_label: Tensor
    at_least: int

    def shares(self, batch: Batch, without: Tensor | None = None) -> np.ndarray:
        """Each label's share, (cells, labels); ``without`` says whose votes are left out."""
        found = profile_log_likelihood(self.model, batch, self.z)
        if without is not None:
            found = found.masked_fill(without, _NONE)
        shares: np.ndarray = (votes(found, self.at_least) @ self.of_label).double().cpu().numpy()
        return shares / shares.sum(1, keepdims=True)


@dataclass(frozen=True)
class Values:
    """How cells' values enter the regression: counts as log1p at one total, others as they are."""

    counts: bool
    typical: float

    def of(self, batch: Batch) -> Any:
        """(cells, genes), a CSR matrix of counts, else as they are held: CSR or an array."""
        x = sparse(batch.x) if self.counts else batch.x
        if not isinstance(x, SparseRows):
            return x.cpu().numpy()
        value = x.value
        if self.counts:
            value = (value * (self.typical / x.sum().clamp_min(1.0))[x.row]).log1p()
        parts = (part.cpu().numpy() for part in (value, x.col, x.starts))
        return sp.csr_matrix(tuple(parts), shape=x.shape)

    def depth(self, batch: Batch) -> np.ndarray:
        """ln of each cell's total over the typical one; 0 of other values than counts."""
        if not self.counts:
            return np.zeros(len(batch))
        total = _totals(batch).clamp_min(1.0).double().cpu().numpy()
        return np.log(total / self.typical)


def _totals(batch: Batch) -> Tensor:
    return batch.x.sum() if isinstance(batch.x, SparseRows) else batch.x.sum(1)


class LabelProbabilities:
    """Weights and a regression, made from a reference's cells.

    Parameters
    ----------
    voters
        Of the reference.
    cells
        Those of its cells that are among the voters, over the genes that new cells have.
    voter
        Their numbers among the voters.
    held_out
        Of each voter, whether it was held out of the decoder's training.
    generator
        For folds; thinning draws from the call's random state.

    Attributes
    ----------
    report
        What was found of the cells that weights were found from, weights and regression by others
        of them: ``ece``, ``n``, and the bins of :func:`scuvae._reliability.reliability`, as they
        are and, with ``thinned_`` before it, thinned.
    """

    def __init__(
        self,
        voters: Voters,
        cells: Cells,
        voter: np.ndarray,
        held_out: np.ndarray,
        generator: np.random.Generator,
    ) -> None:
        self.voters = voters
        counts = voters.model.likelihood.support == "counts"
        totals = cells.source.totals().cpu().numpy() if counts else np.ones(1)
        self.values = Values(counts, max(float(np.median(totals)), 1.0))
        n, n_labels = len(cells), voters.of_label.shape[1]
        weighed = generator.permutation(n)[:MOST_WEIGHED]
        said, code = self._asked(cells, voter, held_out, np.isin(np.arange(n), weighed))
        fold = np.tile(generator.permutation(n) % _FOLDS, len(said))
        values = _stacked([values for copy in said for values in copy.values])
        code = np.tile(code, len(said))
        asked, shares, depth = (
            np.concatenate([part for copy in said for part in getattr(copy, name)])
            for name in ("asked", "shares", "depth")
        )

        by_regression = np.empty((len(code), n_labels))
        for one in range(_FOLDS):
            others, own = np.flatnonzero(fold != one), np.flatnonzero((fold == one) & asked)
            if len(own):
                regression = LabelRegression.fit(values[others], code[others], n_labels)
                by_regression[own] = regression.probabilities(values[own])
        self.regression = LabelRegression.fit(values, code, n_labels)
        opinions = terms(shares, by_regression[asked], depth[asked])
        self.range = float(depth[asked].min()), float(depth[asked].max())
        self.weights = weigh(opinions, code[asked])

        found = np.empty_like(by_regression[asked])
        for one in range(_FOLDS):
            own = fold[asked] == one
            if own.any():
                found[own] = combine(weigh(opinions[:, ~own], code[asked][~own]), opinions[:, own])
        self.report = _report(found, code[asked], len(said))

    def _asked(
        self, cells: Cells, voter: np.ndarray, held_out: np.ndarray, weighed: np.ndarray
    ) -> tuple[list["_Said"], np.ndarray]:
        """What cells say, and thinned once more; votes of those that weights are found from."""
        where = self.voters.z.device
        copies = [_Said([], [], [], []) for _ in range(1 + self.values.counts)]
        apart = torch.as_tensor(held_out, device=where)
        number = torch.as_tensor(voter, device=where)
        for batch in chunks(cells, len(self.voters.z)):
            at = batch.index.cpu().numpy()
            own = number[batch.index]
            without = apart[own][:, None] & apart
            without = without | (torch.arange(len(apart), device=where) == own[:, None])
            chosen = torch.as_tensor(np.flatnonzero(weighed[at]), device=where)
            fewer = [shallow(batch, len(batch))] if self.values.counts else []
            for copy, some in zip(copies, [batch, *fewer], strict=True):
                copy.values.append(self.values.of(some))
                copy.depth.append(self.values.depth(some))
                copy.asked.append(weighed[at])
                if len(chosen):
                    copy.shares.append(self.voters.shares(some.take(chosen), without[chosen]))
        label = self.voters.of_label.argmax(1).cpu().numpy()[voter]
        return copies, label

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and shares of votes, (cells, labels) each; of cells without a count the
        shares, which are then those of labels among the voters."""
        shares = self.voters.shares(batch)
        depth = np.clip(self.values.depth(batch), *self.range)
        by_regression = self.regression.probabilities(self.values.of(batch))
        found = combine(self.weights, terms(shares, by_regression, depth))
        if self.values.counts:
            empty = (_totals(batch) == 0).cpu().numpy()
            found[empty] = shares[empty]
        return found, shares


@dataclass(frozen=True)
class _Said:
    """Of some cells, a batch after another: values, depths, whether they were asked, and shares of
    votes of those that were."""

    values: list[Any]
    depth: list[np.ndarray]
    asked: list[np.ndarray]
    shares: list[np.ndarray]


# Numbers in the table of cells and voters held at once: 64 MB. And cells: each time the voters'
# profiles are made anew.
NUMBERS_AT_ONCE, _CELLS = 2**24, 2048


def chunks(cells: Cells, n_voters: int) -> Iterator[Batch]:
    """All cells in order, as many at once as the table of their affinities has room for."""
    everyone = torch.arange(len(cells), device=cells.size_factor.device)
    return iter(cells.loader(everyone, min(_CELLS, max(1, NUMBERS_AT_ONCE // n_voters))))


def _stacked(parts: list[Any]) -> Any:
    if sp.issparse(parts[0]):
        return sp.vstack(parts, format="csr")
    return np.concatenate(parts)


def terms(shares: np.ndarray, by_regression: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """What the weights weigh, (2 or 4, cells, labels): logarithms, and these times depth."""
    logs = np.stack(
        [np.log(p + least) for p, least in zip((shares, by_regression), _LEAST, strict=True)]
    )
    return np.concatenate([logs, logs * depth[:, None]])


def combine(weights: np.ndarray, of: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(log_softmax(np.tensordot(weights, of, 1), 1))
    return found


def weigh(of: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The likeliest weights, with a unit of precision about half of each opinion: convex."""
    n, start = len(code), np.zeros(len(of))
    start[:2] = 0.5
    of_label = np.zeros(of.shape[1:])
    of_label[np.arange(n), code] = 1.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_softmax(np.tensordot(weights, of, 1), 1)
        off = weights - start
        slope = np.tensordot(of, np.exp(log_p) - of_label, 2)
        return float(off @ off - (log_p * of_label).sum()), slope + 2 * off

    found: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found


def _report(found: np.ndarray, code: np.ndarray, n_copies: int) -> dict[str, Any]:
    """ECE and bins of cells as they are, and of the thinned."""
    sure, right = found.max(1), found.argmax(1) == code
    out: dict[str, Any] = {}
    for prefix, rows in zip(
        ("", "thinned_"), np.split(np.arange(len(code)), n_copies), strict=False
    ):
        bins = reliability(sure[rows], right[rows])
        out[f"{prefix}ece"] = expected_calibration_error(bins)
        out |= {f"{prefix}{name}": values for name, values in bins.items()}
    out["n"] = len(code) // n_copies
    return out
