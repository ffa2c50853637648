"""The name of every AnnData slot that a fit owns, made from ``key_added`` in one place."""

import re
from dataclasses import dataclass

from anndata import AnnData

DEFAULT = "scuvae"
# The default of ``external.scvi``, whose slots are no fit of ours.
SCVI = "scvi"

# Per-cell columns of obs: in nats, but for the split, for novelty, for labels, for shares and
# probabilities, for scales, and for what says how importance weights do.
OBS_NAMES = (
    "elbo",
    "elbo_se",
    "reconstruction",
    "kl",
    "log_evidence",
    "log_evidence_se",
    "effective_sample_size",
    "pareto_k",
    "log_evidence_annealed",
    "log_evidence_annealed_se",
    "elbo_encoder",
    "elbo_encoder_se",
    "amortization_gap",
    "amortization_gap_se",
    "amortization_gap_diagonal",
    "amortization_gap_diagonal_se",
    "approximation_gap_diagonal",
    "approximation_gap_diagonal_se",
    "amortization_gap_full",
    "amortization_gap_full_se",
    "approximation_gap_full",
    "approximation_gap_full_se",
    "novelty",
    "novelty_counts",
    "novelty_latent",
    "novelty_distance",
    "novelty_shared",
    "label",
    "label_share",
    "label_probability",
    "split",
    "scale",
    "neighbor_stability",
    "component",
)


# Bytes of a key: names made from it have up to 60 more, and zarr makes files of them.
_LONGEST = 190


@dataclass(frozen=True)
class Keys:
    """Slots of one fit: the defaults for ``key=None``, else names made from ``key`` verbatim.

    ``encoder`` and ``encoder_scale`` hold an encoder's q beside the refined one, ``variance`` the
    squared scales, as scvi-tools stores them. ``sample`` is the stem of :meth:`samples`.
    """

    uns: str
    mean: str
    scale: str
    covariance: str
    variance: str
    encoder: str
    encoder_scale: str
    embed: str
    components: str
    factors: str
    loadings: str
    obs: dict[str, str]
    layer: str
    sample: str
    calibration: str
    predictive_check: str
    label_probabilities: str
    label_calibration: str

    @classmethod
    def of(cls, key: str | None, default: str = DEFAULT) -> "Keys":
        if key is not None and not _names_slots(key):
            raise ValueError(
                f"key={key!r} cannot name a fit, whose slots must go into files: pass a string "
                f"without '/', not '.' or '..', or None for {default!r}"
            )
        uns = default if key is None else key
        keys = cls._named(uns, f"X_{uns}" if uns == default else uns)
        if uns == DEFAULT != default:
            raise ValueError(
                f"key={key!r} is the name of the default fit, whose uns[{key!r}] it would share: "
                f"pass None for {default!r}, or another name"
            )
        for other in (DEFAULT, SCVI):
            shared = set(keys.obsm) & set(cls._named(other, f"X_{other}").obsm)
            if shared and uns != other:
                raise ValueError(
                    f"key={key!r} would share obsm[{min(shared)!r}] with the slots of {other!r}: "
                    f"pass None for the default fit, or a name that does not begin like "
                    f"'X_{other}'"
                )
        return keys

    @classmethod
    def _named(cls, uns: str, mean: str) -> "Keys":
        return cls(
            uns=uns,
            mean=mean,
            scale=f"{mean}_scale",
            covariance=f"{mean}_covariance",
            variance=f"{mean}_variance",
            encoder=f"{mean}_encoder",
            encoder_scale=f"{mean}_encoder_scale",
            embed=f"{mean}_embed",
            components=f"{mean}_components",
            factors=f"{mean}_factors",
            loadings=f"{uns}_loadings",
            obs={name: f"{uns}_{name}" for name in OBS_NAMES},
            layer=f"{uns}_denoised",
            sample=f"{uns}_sample",
            calibration=f"{uns}_calibration",
            predictive_check=f"{uns}_predictive_check",
            label_probabilities=f"{uns}_label_probabilities",
            label_calibration=f"{uns}_label_calibration",
        )

    @property
    def moments(self) -> tuple[str, ...]:
        """Slots of q, and of an encoder's beside it."""
        moments = (self.mean, self.scale, self.covariance, self.variance)
        return (
            *moments,
            self.encoder,
            self.encoder_scale,
            self.embed,
            self.components,
            self.factors,
        )

    @property
    def denoised(self) -> tuple[str, ...]:
        """Layers, or tables in obsm where not all genes were modelled."""
        return (self.layer, f"{self.layer}_scale")

    @property
    def obsm(self) -> tuple[str, ...]:
        return (*self.moments, *self.denoised, self.label_probabilities)

    def check_free(self, adata: AnnData) -> None:
        """Raise where ``uns`` holds something else than a fit under this key."""
        entry = adata.uns.get(self.uns)
        if entry is None or (hasattr(entry, "keys") and {"state", "manifest"} & set(entry.keys())):
            return
        raise ValueError(
            f"adata.uns[{self.uns!r}] holds something else than a fit, which would be lost: pass "
            "another key_added=, or delete it"
        )

    def clear(self, adata: AnnData) -> None:
        """Remove every slot of this key, so that nothing of an earlier fit outlives it."""
        for slot in (
            *(self.uns, self.calibration, self.predictive_check, self.loadings),
            self.label_calibration,
        ):
            adata.uns.pop(slot, None)
        if self.loadings in adata.varm:
            del adata.varm[self.loadings]
        for slot in self.denoised:
            if slot in adata.layers:
                del adata.layers[slot]
        self.clear_samples(adata)
        for slot in self.obsm:
            if slot in adata.obsm:
                del adata.obsm[slot]
        self.clear_obs(adata, *OBS_NAMES)

    def samples(self, n_samples: int) -> list[str]:
        """The layers of so many draws: one has no number."""
        if n_samples == 1:
            return [self.sample]
        return [f"{self.sample}_{i}" for i in range(n_samples)]

    def is_sample(self, layer: str | None) -> bool:
        """Whether a layer bears the name of a draw, however many there were."""
        # anndata 0.13 lists X among the layers, by the name None.
        return layer is not None and bool(re.fullmatch(re.escape(self.sample) + r"(_\d+)?", layer))

    def clear_samples(self, adata: AnnData) -> None:
        for name in [layer for layer in adata.layers if self.is_sample(layer)]:
            del adata.layers[name]

    def clear_obs(self, adata: AnnData, *names: str) -> None:
        for name in names:
            if self.obs[name] in adata.obs:
                del adata.obs[self.obs[name]]


def check_name(argument: str, name: object) -> str:
    """A name that a slot gets, and its file's, which not every string can be."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}={name!r} is a {type(name).__name__}: pass a string")
    if not _names_slots(name):
        raise ValueError(
            f"{argument}={name!r} cannot name a slot, which must go into files: pass a string "
            f"without '/', not '.' or '..', of at most {_LONGEST} bytes"
        )
    return name


def check_holds_no_fit(adata: AnnData, argument: str, name: str) -> None:
    """Raise where ``uns`` has a fit under a name that something else is to get."""
    entry = adata.uns.get(name)
    if hasattr(entry, "keys") and "state" in entry:
        raise ValueError(
            f"{argument}={name!r} is the name of a fit, which adata.uns[{name!r}] holds: pass "
            "another"
        )


def _names_slots(key: object) -> bool:
    """Whether a key, and what is made from it, can be names in an HDF5 file and a zarr store."""
    if not isinstance(key, str) or {"/", "\0"} & set(key) or set(key) <= {"."}:
        return False
    try:
        return len(key.encode()) <= _LONGEST
    except UnicodeEncodeError:  # half a character
        return False
