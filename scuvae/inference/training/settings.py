"""The arguments of a fit that concern model and training, checked and resolved."""

import math
from dataclasses import dataclass

from scuvae._checks import one_of, real, whole
from scuvae.distributions.gaussian import COVARIANCES
from scuvae.inference.posteriors import POSTERIORS
from scuvae.inference.refinement.refine import LOCAL_STEPS
from scuvae.inference.training.optimizers import OPTIMIZERS
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood

LEARNING_RATES = {"adam": 1e-2, "rmsprop": 1e-2, "sgd": 1e-3}
# Cells a step.
BATCH_SIZE = 128
# Epochs where one takes a single step; with more cells fewer are needed, but more steps.
EPOCHS = 425
# Of counts, whose decoders have a prior.
DROPOUT = 0.05
# Others overfit few cells: as many drop every second hidden unit.
DROPOUT_CELLS = 1000
# What ``tl.fit(amortized=)`` takes beside the names in ``POSTERIORS``.
INFERENCE: dict[bool | str, str] = {False: "unamortized", True: "amortized", "semi": "semi"}


def scheme_of(amortized: bool | str) -> str:
    """The name in ``POSTERIORS`` that ``tl.fit(amortized=)`` stands for."""
    return INFERENCE.get(amortized, str(amortized))


def epochs_for(n_cells: float, batch_size: int) -> int:
    """How long to train on so many cells."""
    return min(200, max(10, round(EPOCHS / math.sqrt(math.ceil(n_cells / batch_size)))))


@dataclass(frozen=True)
class Settings:
    amortized: bool | str
    n_latent: int
    n_hidden: int
    n_layers: int
    covariance: str
    validation_fraction: float
    max_epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    local_step: str
    n_samples: int
    kl_weight: float
    dropout: float
    linear_path: bool

    @property
    def measured(self) -> bool:
        """Whether it is the recipe that was measured; others fit plain networks."""
        return _measured(self.optimizer, self.local_step)

    @classmethod
    def resolve(
        cls,
        n_obs: int,
        *,
        amortized: bool | str,
        likelihood: object,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        covariance: str | None,
        validation_fraction: float,
        max_epochs: int | None,
        batch_size: int | None,
        learning_rate: float | None,
        optimizer: str,
        local_step: str,
        n_samples: int,
        kl_weight: float,
        dropout: float | None,
    ) -> "Settings":
        """What ``tl.fit`` was asked, checked; what was left to it, decided for so many cells."""
        one_of(
            "amortized",
            amortized,
            [*INFERENCE, *(name for name in POSTERIORS if name not in INFERENCE)],
        )
        if amortized in ("unamortized", "amortized"):
            amortized = amortized == "amortized"
        kind = POSTERIORS[scheme_of(amortized)]
        if not isinstance(likelihood, Likelihood):
            one_of("likelihood", likelihood, ["auto", *LIKELIHOODS])
        one_of("optimizer", optimizer, OPTIMIZERS)
        one_of("local_step", local_step, LOCAL_STEPS)
        if covariance is None:
            covariance = LOCAL_STEPS[local_step].covariance if kind.has_rows else "diagonal"
        one_of("covariance", covariance, COVARIANCES)
        plain = not _measured(optimizer, local_step)
        fraction = real("validation_fraction", validation_fraction, low=0.0, below=1.0)
        size = BATCH_SIZE if batch_size is None else whole("batch_size", batch_size)
        if max_epochs is None:
            max_epochs = epochs_for(n_obs * (1 - fraction), size)
        if dropout is None:
            dropout = 0.0 if plain else min(0.5, DROPOUT_CELLS / (DROPOUT_CELLS + n_obs))
        if learning_rate is None:
            learning_rate = LEARNING_RATES[optimizer]
            if kind.has_rows and not plain:
                # The decoder does not wait for an encoder: it can take longer steps.
                learning_rate *= 2
        return cls(
            amortized=amortized,
            n_latent=whole("n_latent", n_latent),
            n_hidden=whole("n_hidden", n_hidden),
            n_layers=whole("n_layers", n_layers, at_least=0),
            covariance=covariance,
            validation_fraction=fraction,
            max_epochs=whole("max_epochs", max_epochs),
            batch_size=size,
            learning_rate=real("learning_rate", learning_rate, above=0.0),
            optimizer=optimizer,
            local_step=local_step,
            n_samples=whole("n_samples", n_samples),
            kl_weight=real("kl_weight", kl_weight, above=0.0),
            dropout=real("dropout", dropout, low=0.0, below=1.0),
            linear_path=not plain and n_layers > 0,
        )

    def check_memory(self, n_obs: int, n_vars: int, available: float) -> None:
        """Raise where the least that a fit has in memory is more than there is, in bytes.

        That is the networks with their gradients and, of one step's cells, q and what the decoder
        has in its narrowest place. All cells' q may lie on disk.
        """
        wide, deep, latent = self.n_hidden, self.n_layers, self.n_latent
        weights = n_vars * latent if not deep else (n_vars + latent + (deep - 1) * wide) * wide
        covariance = latent * (latent + 1) // 2 if self.covariance == "full" else latent
        cells = min(self.batch_size, n_obs)
        arrays = {
            "n_hidden": 2 * weights,
            "n_latent": cells * (latent + covariance),
            "n_samples": cells * min(n_vars, wide if deep else n_vars) * self.n_samples,
        }
        needed = 4 * sum(arrays.values())
        if needed <= available:
            return
        largest = max(arrays, key=lambda name: arrays[name])
        blamed = f"{largest}={getattr(self, largest)}"
        if largest == "n_hidden" and deep:
            blamed += f" with n_layers={deep}"
        elif largest == "n_hidden":  # a linear decoder
            largest = "n_latent"
            blamed = f"n_latent={latent}"
        raise ValueError(
            f"{blamed}: such a fit of {n_obs:,} cells and {n_vars:,} genes needs "
            f"{needed / 2**30:,.4g} GiB of memory at least, and there are "
            f"{available / 2**30:,.4g}. Pass less"
        )


def _measured(optimizer: str, local_step: str) -> bool:
    return optimizer == "adam" and LOCAL_STEPS[local_step].measured
