"""The likelihoods by name."""

from scuvae.model.likelihoods.base import Likelihood
from scuvae.model.likelihoods.bernoulli import Bernoulli
from scuvae.model.likelihoods.gaussian import Gaussian
from scuvae.model.likelihoods.negative_binomial import NegativeBinomial
from scuvae.model.likelihoods.poisson import Poisson
from scuvae.model.likelihoods.zero_inflated_negative_binomial import ZeroInflatedNegativeBinomial

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "nb": NegativeBinomial,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "zinb": ZeroInflatedNegativeBinomial,
}
