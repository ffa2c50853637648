"""What a fit's model is made of: a registered name, or an instance, of a likelihood and a prior."""

import copy as copying
from typing import Any

from scuvae._checks import one_of
from scuvae._errors import near
from scuvae.inference.training.settings import Settings
from scuvae.io import inputs
from scuvae.model.covariates import Covariates
from scuvae.model.likelihoods import LIKELIHOODS, Likelihood
from scuvae.model.likelihoods.by_level import DISPERSIONS
from scuvae.model.priors import PRIORS, Prior
from scuvae.runtime import logger


def choose_likelihood(
    likelihood: str | Likelihood, matrix: Any, slot: str
) -> type[Likelihood] | Likelihood:
    if isinstance(likelihood, Likelihood):
        if likelihood.n_vars != matrix.shape[1]:
            raise ValueError(
                f"likelihood has n_vars={likelihood.n_vars}, {slot} has {matrix.shape[1]} modelled "
                "genes: make it with their number"
            )
        if LIKELIHOODS.get(likelihood.name) is not type(likelihood):
            raise ValueError(
                f"likelihood of class {type(likelihood).__name__} is not registered: set "
                f"scuvae.model.likelihoods.LIKELIHOODS[{likelihood.name!r}] to it, so that the fit "
                f"can be read back. {near(likelihood.name, LIKELIHOODS)}"
            )
        return copying.deepcopy(likelihood)
    if likelihood == "auto":
        likelihood = "negative_binomial" if inputs.is_whole(matrix) else "gaussian"
        logger.info(
            "likelihood='auto': %s holds %s values, using %s",
            slot,
            "whole" if likelihood != "gaussian" else "real",
            likelihood,
        )
    return LIKELIHOODS[likelihood]


def instance_of(chosen: type[Likelihood] | Likelihood, n_vars: int) -> Likelihood:
    return chosen if isinstance(chosen, Likelihood) else chosen(n_vars)


def choose_prior(prior: str | Prior, n_latent: int) -> Prior:
    if not isinstance(prior, Prior):
        return PRIORS[one_of("prior", prior, PRIORS)](n_latent)
    if prior.n_latent != n_latent:
        raise ValueError(
            f"prior has n_latent={prior.n_latent}, the fit {n_latent}: make it with as many"
        )
    if PRIORS.get(prior.name) is not type(prior):
        raise ValueError(
            f"prior of class {type(prior).__name__} is not registered: set "
            f"scuvae.model.priors.PRIORS[{prior.name!r}] to it, so that the fit can be read back. "
            f"{near(prior.name, PRIORS)}"
        )
    return copying.deepcopy(prior)


def encoder_input(likelihood: type[Likelihood] | Likelihood) -> str | None:
    """How values enter an encoder; as they are where nothing is said."""
    entering = likelihood.encoder_input()
    return None if entering == "values" else entering


def check_dispersion(
    dispersion: str, likelihood: type[Likelihood] | Likelihood, batch_key: str | None, n_vars: int
) -> None:
    if one_of("dispersion", dispersion, DISPERSIONS) == "gene":
        return
    if batch_key is None:
        raise ValueError(
            "dispersion='gene-batch' is of batches: name their column by batch_key=, or pass 'gene'"
        )
    if not list(instance_of(likelihood, n_vars).parameters()):
        raise ValueError(
            f"dispersion='gene-batch': likelihood={likelihood.name!r} has no dispersion. Pass "
            "'gene', or likelihood='negative_binomial' for counts"
        )


# Each level of a covariate adds n_latent columns to the decoder's widest product.
_MOST_WITH_SLOPES = 16


def with_slopes(
    settings: Settings, likelihood: type[Likelihood] | Likelihood, covariates: Covariates | None
) -> bool:
    """Whether each level of the covariates has a linear path of its own."""
    if covariates is None or not settings.linear_path or likelihood.link == "identity":
        return False  # of an identity the linear path has no prior that would hold them back
    n = covariates.design.n_columns
    if n > _MOST_WITH_SLOPES:
        logger.info(
            "covariates have %d levels, more than %d: they shift genes, and the latent space has "
            "the same slopes in all of them",
            *(n, _MOST_WITH_SLOPES),
        )
    return n <= _MOST_WITH_SLOPES
