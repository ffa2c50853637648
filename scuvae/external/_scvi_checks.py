"""What the bridge to scvi-tools asks of a model and of cells, and the model's view of them."""

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae._errors import near
from scuvae.external._likelihoods import LIKELIHOODS
from scuvae.io import inputs


def check_model(model: object) -> None:
    """Raise where a model is not one whose generative module is scvi-tools' plain VAE."""
    kind = type(model)
    try:
        import scvi
    except ImportError as error:
        raise ImportError(
            "scuvae.external.scvi needs scvi-tools: pip install 'scuvae[scvi]'"
        ) from error
    if not isinstance(model, scvi.model.base.BaseModelClass):
        raise TypeError(
            f"model is a {kind.__module__}.{kind.__name__}: pass a trained scvi.model.SCVI"
        )
    name = f"scvi.model.{kind.__name__}"
    if not model.is_trained:
        raise ValueError(f"model is a {name} that is not trained: call model.train() first")
    module = model.module
    if type(module) not in (scvi.module.VAE, scvi.module.LDVAE):
        raise ValueError(
            f"model is a {name} with a {type(module).__name__} module: only SCVI and LinearSCVI, "
            "whose cells have the one latent vector z ~ N(0, I), are supported"
        )
    if module.latent_distribution != "normal":
        raise ValueError(
            f"model has latent_distribution={module.latent_distribution!r}: only 'normal' is "
            "supported, where the decoder sees z itself"
        )
    if not module.use_observed_lib_size:
        raise ValueError(
            "model has use_observed_lib_size=False: its library size is a second latent variable, "
            "which is not supported. Train with use_observed_lib_size=True"
        )
    if module.gene_likelihood not in LIKELIHOODS:
        known = near(module.gene_likelihood, LIKELIHOODS)
        raise ValueError(f"model has gene_likelihood={module.gene_likelihood!r}. {known}")
    if model.adata is None:
        raise ValueError(
            f"model was loaded without an AnnData: load it with one, {name}.load(path, adata=adata)"
        )
    if model.minified_data_type == "latent_posterior_parameters":
        raise ValueError(
            "model.adata is minified without counts, which refinement needs: set model.adata to "
            "the AnnData with counts, or minify with latent_posterior_parameters_with_counts"
        )


def loader_of(model: Any, adata: AnnData, batch_size: int) -> Any:
    """scvi-tools' own loader over the cells, in order; ``adata`` gets nothing written to it."""
    from scvi.dataloaders import AnnDataLoader

    inputs.check_anndata(adata)
    manager = model.adata_manager
    arguments = manager.registry["setup_args"]
    layer = arguments.get("layer")
    if adata is not model.adata:
        if model.minified_data_type is not None:
            raise ValueError(
                "model.adata is minified, and adata another AnnData: set model.adata to the "
                "AnnData that it was trained on first"
            )
        adata = _aligned(adata, [str(name) for name in model.adata.var_names])
        _check_covariates(adata, manager)
    matrix = inputs.read_matrix(adata, layer)
    real = model.module.gene_likelihood == "normal"
    inputs.check_values(
        matrix,
        adata,
        layer,
        None,
        likelihood=model.module.gene_likelihood,
        support="real" if real else "counts",
        # What the model was trained on is its own business.
        fractions=adata is model.adata or not inputs.is_whole(_matrix(model.adata, layer)),
        fitting=False,
    )
    if adata is not model.adata:
        shell = AnnData(
            None if layer is not None else adata.X,
            obs=adata.obs.copy(),
            var=pd.DataFrame(index=adata.var_names),
            layers={} if layer is None else {layer: adata.layers[layer]},
        )
        manager = manager.transfer_fields(shell)
    return AnnDataLoader(manager, shuffle=False, batch_size=batch_size)


def _matrix(adata: AnnData, layer: str | None) -> Any:
    return inputs.read_matrix(adata, layer)


def _aligned(adata: AnnData, var_names: list[str]) -> AnnData:
    """``adata`` with the model's genes, by name, in its order."""
    inputs.check_unique_genes(adata)
    position = adata.var_names.get_indexer(var_names)
    missing = np.flatnonzero(position < 0)
    if len(missing):
        raise ValueError(
            f"adata.var_names lack {len(missing)} of the model's {len(var_names)} genes, first "
            f"{var_names[missing[0]]!r}: scvi-tools' encoder needs them all. Fit with scuvae.tl.fit"
            " to project cells that lack genes"
        )
    if len(position) == adata.n_vars and (position == np.arange(adata.n_vars)).all():
        return adata
    return adata[:, position]


def _check_covariates(adata: AnnData, manager: Any) -> None:
    """Raise where the columns that the model was set up with are missing, or hold new categories.

    scvi-tools would say so too, without the cell and the remedy.
    """
    arguments = manager.registry["setup_args"]
    known = {}
    for name, registered in (("batch_key", "batch"), ("labels_key", "labels")):
        key = arguments.get(name)
        if key is not None:
            known[key] = manager.get_state_registry(registered)["categorical_mapping"]
    categorical = arguments.get("categorical_covariate_keys") or []
    if categorical:
        known |= dict(manager.get_state_registry("extra_categorical_covs")["mappings"])
    numbers = list(arguments.get("continuous_covariate_keys") or [])
    if arguments.get("size_factor_key"):
        numbers.append(arguments["size_factor_key"])
    for key in [*known, *numbers]:
        if key not in adata.obs:
            raise ValueError(
                f"adata.obs[{key!r}] does not exist, but the model was set up with it. "
                f"{near(key, adata.obs)}"
            )
    for key, categories in known.items():
        values = adata.obs[key]
        new = ~values.astype(str).isin([str(category) for category in categories]).to_numpy()
        if new.any():
            row = int(np.flatnonzero(new)[0])
            listed = ", ".join(repr(str(category)) for category in categories[:10])
            raise ValueError(
                f"adata.obs[{key!r}] holds {str(values.iloc[row])!r} at cell "
                f"{adata.obs_names[row]!r}, which the model has not seen. Known: {listed}. Drop "
                "these cells, or update the model with scvi-tools' load_query_data"
            )
    for key in numbers:
        values = pd.to_numeric(adata.obs[key], errors="coerce").to_numpy(dtype=float)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"adata.obs[{key!r}] holds {str(adata.obs[key].iloc[row])!r} at cell "
                f"{adata.obs_names[row]!r}: the model needs finite numbers there"
            )
