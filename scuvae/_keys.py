"""The name of every AnnData slot that a fit owns, made from ``key_added`` in one place."""

from dataclasses import dataclass

from anndata import AnnData

DEFAULT = "scuvae"
# The default of ``external.scvi``, whose slots are no fit of ours.
SCVI = "scvi"

# Per-cell columns of obs: in nats, but for the split, for novelty, and for what says how
# importance weights do.
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
    "split",
)


@dataclass(frozen=True)
class Keys:
    """Slots of one fit: the defaults for ``key=None``, else names made from ``key`` verbatim.

    ``encoder`` and ``encoder_scale`` hold an encoder's q beside the refined one, ``variance`` the
    squared scales, as scvi-tools stores them.
    """

    uns: str
    mean: str
    scale: str
    covariance: str
    variance: str
    encoder: str
    encoder_scale: str
    obs: dict[str, str]
    layer: str

    @classmethod
    def of(cls, key: str | None, default: str = DEFAULT) -> "Keys":
        if key is not None and (not isinstance(key, str) or not key or "/" in key):
            raise ValueError(
                f"key={key!r} cannot name a fit: pass a string without '/', or None for {default!r}"
            )
        uns = default if key is None else key
        mean = f"X_{uns}" if uns == default else uns
        return cls(
            uns=uns,
            mean=mean,
            scale=f"{mean}_scale",
            covariance=f"{mean}_covariance",
            variance=f"{mean}_variance",
            encoder=f"{mean}_encoder",
            encoder_scale=f"{mean}_encoder_scale",
            obs={name: f"{uns}_{name}" for name in OBS_NAMES},
            layer=f"{uns}_denoised",
        )

    @property
    def obsm(self) -> tuple[str, ...]:
        moments = (self.mean, self.scale, self.covariance, self.variance)
        return (*moments, self.encoder, self.encoder_scale)

    def clear(self, adata: AnnData) -> None:
        """Remove every slot of this key, so that nothing of an earlier fit outlives it."""
        adata.uns.pop(self.uns, None)
        if self.layer in adata.layers:
            del adata.layers[self.layer]
        for slot in self.obsm:
            if slot in adata.obsm:
                del adata.obsm[slot]
        self.clear_obs(adata, *OBS_NAMES)

    def clear_obs(self, adata: AnnData, *names: str) -> None:
        for name in names:
            if self.obs[name] in adata.obs:
                del adata.obs[self.obs[name]]
