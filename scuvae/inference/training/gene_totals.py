"""Each gene's total over all cells, as it is and as a fit has it; and a fit that gives it back.

A negative binomial of small θ hardly minds a wrong mean, and dropout makes one: a gene's means may
add up to another number than its counts. The decoder's last intercepts can be moved so that they
do not, at hardly a cost in likelihood.
"""

import math

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.batches.sparse_rows import sparse
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.model import VAE

# Draws that tl.denoise takes expectations over: of its means totals should be right.
DENOISING_DRAWS = 8
# A gene without a count gets a mean so much smaller at most: its logarithm has to stay finite.
_LARGEST = 100.0
_LEAST = 1e-8


class GeneTotals:
    """Totals of each gene over cells, (genes,), float64, on the host: added up a batch at a time.

    Parameters
    ----------
    model
        Of counts, in evaluation mode.
    n_samples
        Fixed draws of q that expectations are taken over.
    """

    def __init__(self, model: VAE, n_samples: int = 2) -> None:
        self.model, self.n_samples = model, n_samples
        self.observed = torch.zeros(model.n_vars, dtype=torch.float64)
        self.predicted = torch.zeros_like(self.observed)

    @torch.no_grad()
    def add(self, batch: Batch, q: Gaussian) -> None:
        """The cells of a batch, and their q."""
        model, x = self.model, sparse(batch.x)
        observed = x.value.new_zeros(model.n_vars).index_add_(0, x.col.long(), x.value)
        predicted = torch.zeros_like(observed)
        likelihood = model.likelihood_of(batch.covariates)
        for point in normal_points(self.n_samples, q.mean):
            eta = model.decoder(q.draw(point), batch.covariates)
            size = model.size_factor(batch, eta)
            predicted += likelihood.mean(eta, size, batch.observed).sum(0)
        self.observed += observed.cpu().double()
        self.predicted += predicted.cpu().double() / self.n_samples

    @property
    def ratio(self) -> Tensor:
        """Predicted over observed."""
        return self.predicted.clamp_min(_LEAST) / self.observed.clamp_min(_LEAST)

    @property
    def off(self) -> float:
        """By how much the worst gene's share of all counts is off, as a part of it."""
        share = self.ratio[self.observed > 0] * (self.observed.sum() / self.predicted.sum())
        return float((share - 1).abs().max()) if len(share) else 0.0

    @torch.no_grad()
    def give_back(self) -> None:
        """Move the decoder's intercepts so that predicted totals are the observed ones.

        One round of b_g += ln(Σ_i x_ig / Σ_i μ_ig); the softmax couples genes, so that what is off
        by a tenth is off by a hundredth afterwards. With zero inflation expected counts add up to
        less than a cell's total, whatever the intercepts: genes then share what is missing.
        """
        shift = self.ratio.log().neg()
        shift = torch.where(self.observed > 0, shift, shift.clamp_min(-math.log(_LARGEST)))
        bias = self.model.decoder.output.bias
        bias.add_(shift.to(bias))
