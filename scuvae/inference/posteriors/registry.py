"""The posteriors by name."""

from scuvae.inference.posteriors.amortized import AmortizedPosterior
from scuvae.inference.posteriors.base import Posterior
from scuvae.inference.posteriors.semi_amortized import SemiAmortizedPosterior
from scuvae.inference.posteriors.unamortized import UnamortizedPosterior

POSTERIORS: dict[str, type[Posterior]] = {
    "amortized": AmortizedPosterior,
    "unamortized": UnamortizedPosterior,
    "semi": SemiAmortizedPosterior,
}
