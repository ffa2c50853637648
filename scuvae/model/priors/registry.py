"""The priors by name."""

from scuvae.model.priors.base import Prior
from scuvae.model.priors.mixture import Mixture
from scuvae.model.priors.standard_normal import StandardNormal

PRIORS: dict[str, type[Prior]] = {"standard_normal": StandardNormal, "mixture": Mixture}
