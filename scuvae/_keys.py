"""The name of every AnnData slot that a fit owns, made from ``key_added`` in one place."""

from dataclasses import dataclass

from anndata import AnnData

DEFAULT = "scuvae"

# Per-cell columns of obs, each in nats but for the split.
OBS_NAMES = ("elbo", "reconstruction", "kl", "log_evidence", "amortization_gap", "split")


@dataclass(frozen=True)
class Keys:
    """Slots of one fit: the defaults for ``key=None``, else names made from ``key`` verbatim."""

    uns: str
    mean: str
    scale: str
    covariance: str
    obs: dict[str, str]
    layer: str

    @classmethod
    def of(cls, key: str | None) -> "Keys":
        if key is not None and (not isinstance(key, str) or not key or "/" in key):
            raise ValueError(
                f"key={key!r} cannot name a fit: pass a string without '/', or None for {DEFAULT!r}"
            )
        uns = DEFAULT if key is None else key
        mean = f"X_{uns}" if key is None or key == DEFAULT else key
        return cls(
            uns=uns,
            mean=mean,
            scale=f"{mean}_scale",
            covariance=f"{mean}_covariance",
            obs={name: f"{uns}_{name}" for name in OBS_NAMES},
            layer=f"{uns}_denoised",
        )

    def clear(self, adata: AnnData) -> None:
        """Remove every slot of this key, so that nothing of an earlier fit outlives it."""
        adata.uns.pop(self.uns, None)
        if self.layer in adata.layers:
            del adata.layers[self.layer]
        for slot in (self.mean, self.scale, self.covariance):
            if slot in adata.obsm:
                del adata.obsm[slot]
        self.clear_obs(adata, *OBS_NAMES)

    def clear_obs(self, adata: AnnData, *names: str) -> None:
        for name in names:
            if self.obs[name] in adata.obs:
                del adata.obs[self.obs[name]]
