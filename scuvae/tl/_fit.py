"""tl.fit: AnnData -> Batch -> posterior -> q -> ELBO -> train -> slots."""

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae import __version__
from scuvae._checks import flag, random_state_alias, real, whole
from scuvae._keys import Keys
from scuvae._launched import launched, number_of_processes
from scuvae.batches import Cells
from scuvae.batches.sources.registry import source_of
from scuvae.inference.posteriors import POSTERIORS
from scuvae.inference.training.distributed import agreed_seed, joined, own_rows
from scuvae.inference.training.held_out import hold_out
from scuvae.inference.training.settings import DROPOUT, INFERENCE, Settings, scheme_of
from scuvae.io import inputs
from scuvae.io.covariates import read_covariates, size_factors
from scuvae.io.model_arrays import build_model
from scuvae.io.slots import target
from scuvae.model.likelihoods import Likelihood
from scuvae.model.priors import Prior
from scuvae.runtime import isolated, memory_of, own_device, random_state, resolve_device
from scuvae.tl._checkpoint import check_folder, kept_in
from scuvae.tl._fit_slots import FitSlots, split_of
from scuvae.tl._fit_warnings import warn_of_factors, warn_of_shapes
from scuvae.tl._grow import Growth, check_call
from scuvae.tl._grown_settings import given_of
from scuvae.tl._model_parts import (
    check_dispersion,
    choose_likelihood,
    choose_prior,
    encoder_input,
    instance_of,
    with_slopes,
)
from scuvae.tl._trained import trained


@isolated
@random_state_alias
def fit(
    adata: AnnData,
    *,
    amortized: bool | str = False,
    likelihood: str | Likelihood = "auto",
    dispersion: str = "gene",
    prior: str | Prior = "standard_normal",
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    covariance: str | None = None,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    batch_key: str | None = None,
    categorical_covariate_keys: Iterable[str] | None = None,
    continuous_covariate_keys: Iterable[str] | None = None,
    size_factor_key: str | None = None,
    validation_fraction: float = 0.1,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    optimizer: str = "adam",
    local_step: str = "natural",
    n_samples: int = 1,
    kl_weight: float = 1.0,
    dropout: float | None = None,
    early_stopping: bool = True,
    check_values: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    processes: int | None = None,
    device: str = "auto",
    rng: int | np.random.Generator | None = 0,
    reference: AnnData | str | PathLike[str] | None = None,
    key: str | None = None,
    fine_tune: bool = False,
    key_added: str | None = None,
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Fit a variational autoencoder to the cells of ``adata``, with or without an encoder.

    z ~ prior, x ~ likelihood(decoder(z)). Every cell gets an approximate posterior q(z), a
    Gaussian: from parameters of its own (the default), from an encoder network, or from parameters
    of its own with an encoder trained beside them. The training cells maximise the ELBO; a held-out
    part, whose q is optimised with the decoder frozen, decides when to stop.

    Parameters
    ----------
    adata
        Cells × genes. Raw counts for count likelihoods. A matrix on disk (backed ``.h5ad``,
        ``.zarr``, a dask array) is read from there, by blocks, and never written to.
    amortized
        ``False``: every cell its own parameters. ``True``: an encoder. ``"semi"``: every cell its
        own parameters, under which the decoder is fitted, and an encoder that follows the decoder;
        at the end each cell's q is refined from the better of the two. It costs 1.5 to 1.9 times as
        much as ``True``, and its encoder may be better or worse: for those who want an encoder
        beside posteriors that owe it nothing. Encoders of counts learn from cells of fewer counts
        too, thinned to 10 and more.
    likelihood
        ``"gaussian"``, ``"poisson"``, ``"negative_binomial"`` (``"nb"``),
        ``"zero_inflated_negative_binomial"`` (``"zinb"``), ``"bernoulli"`` for zeros and ones (no
        size factor), an instance of a registered likelihood, or ``"auto"``: negative binomial for
        non-negative whole numbers, else Gaussian.
    dispersion
        ``"gene"``; ``"gene-batch"``: what the likelihood has of each gene (dispersion, dropout)
        each batch has for itself, held near their mean by a prior: see docs/batches.md.
    prior
        ``"standard_normal"``; ``"mixture"``: up to 20 Gaussians, fitted to the cells' posteriors,
        as many as the data need (see :class:`scuvae.model.priors.mixture.Mixture`); or an instance
        of a registered prior.
    n_latent, n_hidden, n_layers
        Latent dimensions; width and number of the hidden layers of decoder and encoder.
        ``n_layers=0`` is a linear decoder.
    covariance
        ``"full"`` or ``"diagonal"`` covariance of q; None: full where local steps are natural,
        diagonal otherwise.
    layer
        The layer to fit; None for ``adata.X``.
    mask_var
        A boolean column of ``adata.var``, such as ``"highly_variable"``, or a boolean array: the
        genes to model. None for all.
    batch_key
        Column of ``adata.obs`` with each cell's batch, which decoder and encoder are told: what
        differs between batches is not in the latent variable. Levels are what values say: 1, 1.0,
        True and "1" are one; unused categories do not count. Of counts and of zeros and ones, up to
        16 levels of all covariates together also change how genes go with the latent variable.
    categorical_covariate_keys
        Further such columns, as a list.
    continuous_covariate_keys
        Columns of numbers that decoder and encoder are told as well, standardised by the mean and
        standard deviation over the cells of the fit.
    size_factor_key
        Column of ``adata.obs`` with each cell's expected total over the modelled genes, in counts;
        None for its total over them.
    validation_fraction
        Part of the cells held out from training. They get a posterior all the same. Which ones does
        not depend on ``rng``: fits of the same cells are judged by the same ones, and those of two
        seeds are trained on the same.
    max_epochs
        None: 425 / √(steps an epoch), at least 10 and at most 200.
    batch_size
        Cells a step, of all processes together; ``adata.n_obs`` for full batches. None for 128.
    learning_rate
        Of the networks; None for 1e-2 (adam, rmsprop), 2e-2 (adam with natural steps and no
        encoder) or 1e-3 (sgd). With adam it falls to zero along a cosine.
    optimizer
        ``"adam"``, ``"rmsprop"`` or ``"sgd"``, with PyTorch's defaults.
    local_step
        How a cell's own parameters move: ``"natural"`` gradient, or ``"gradient"`` by
        ``optimizer`` with moments for every cell.
    n_samples
        Draws of z per cell and step.
    kl_weight
        Weight of the KL term; 1 is the ELBO.
    dropout
        Share of the decoder's hidden units that a training step drops; None: 0 with rmsprop, sgd or
        gradient steps; else 0.05 for counts, zeros and ones, and 1000 / (1000 + cells), at most
        0.5, for real values.
    early_stopping
        Stop when the held-out ELBO no longer rises, and keep the best decoder.
    check_values
        False lets fractional values pass under a count likelihood.
    checkpoint
        A folder that keeps how far training has come, every ``checkpoint_every`` seconds and when
        it ends: a call that was ended, at whatever moment, goes on from there when it is made
        again, and gives what it would have given (to the byte on a CPU). Ctrl-C and SIGTERM are
        answered after the present step, with a checkpoint. Delete the folder to begin anew.
    checkpoint_every
        In seconds; 0 after every step.
    processes
        How many fit together, each with some of the cells: ``torchrun`` starts them, each with the
        whole ``adata`` (one on disk is read by each in part). None: as many as were started; 1:
        this one alone. They give what one gives, but for draws and rounding, and the first one's
        ``adata`` has it. See docs/scale.md.
    device
        ``"auto"`` (CUDA where there is one, else CPU), ``"cpu"``, ``"cuda"``, ``"mps"``. On CUDA
        devices training steps are recorded as graphs and replayed; with ``SCUVAE_CUDA_GRAPHS=0`` in
        the environment they are taken one by one.
    rng
        Seed, :class:`numpy.random.Generator` or None. Global random states are neither read nor
        changed; the same seed on the same machine's CPU writes the same bytes, while a GPU adds in
        any order. ``random_state`` is an alias.
    reference
        A finished fit that the cells of ``adata`` are added to, instead of one from the start: a
        fitted AnnData, the path of one, or a model file. What scArches calls surgery, and
        scvi-tools ``load_query_data``. Genes are matched by name, cells too: those of the
        reference, told by ``obs_names``, start from the posteriors that it has, others from the
        best under its decoder. What makes the model (likelihood, prior, latent dimensions, layers,
        scheme, covariates, totals) is the reference's; an argument that says otherwise is an error.
        Levels of covariates that it has not seen are taken as they come. See docs/new_cells.md.
    key
        The reference's fit; None for the default.
    fine_tune
        False: the reference's decoder stays, its cells keep their posteriors, and new ones have
        those of :func:`scuvae.tl.project` with ``new_batches="estimate"``. True: all is trained
        further on ``adata``, by default in three tenths of the epochs of a fit from the start. Of
        new cells alone the result is a model of these.
    key_added
        Name of the fit; see below.
    copy
        Return a copy with the fit and leave ``adata`` alone.
    progress
        Show one bar; None: where there is a terminal or notebook.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets the following fields (with ``key_added="k"``:
    ``k`` in place of ``X_scuvae`` and ``scuvae``), replacing all of an earlier fit of that name:

    ``obsm["X_scuvae"]``, ``obsm["X_scuvae_scale"]``
        Posterior means and standard deviations, float32 (n_obs, n_latent).
    ``obsm["X_scuvae_covariance"]``
        Lower triangle of the covariance, row-major, for a full covariance.
    ``uns["scuvae"]``
        ``params``, ``history`` (nats per cell and epoch), ``var_names``, and ``state``: the model
        as plain arrays. With it ``adata`` is a complete model, also when read back from a file.
        ``embed``: the map's basis. ``latent``: along the principal axes of the posterior means,
        which no rotation changes, their ``variance``, the cells' average ``uncertainty`` (a
        variance) and ``kl`` (nats), and ``n_active``, how many axes vary by more than .01.
    ``obsm["X_scuvae_embed"]``
        The map, float32 (n_obs, 15), for ``sc.pp.neighbors(use_rep=)``: :func:`scuvae.tl.embed`.
    ``obs["scuvae_scale"]``
        Geometric mean of a cell's posterior standard deviations: 1 for the prior's.
    ``obs["scuvae_split"]``
        Categorical: ``train`` or ``validation``; ``added`` to a decoder that stayed as it was.
    ``obsm["X_scuvae_components"]``, ``obs["scuvae_component"]``
        With ``prior="mixture"``: the chances that the cell is of each component, and the likeliest.

    Raises
    ------
    OSError
        The file was written to while it was read; another process has ended or hangs.
    ValueError, TypeError
        For values, slots or arguments that cannot be fitted, before any work; a checkpoint of other
        cells, genes or settings: what differs is listed.
    scuvae.inference.training.loop.TrainingError
        The loss became infinite or NaN: names epoch, batch and cells.

    Notes
    -----
    ELBO: Kingma & Welling, ICLR 2014. Natural-gradient steps: Khan & Rue, "The Bayesian Learning
    Rule", JMLR 2023. Count likelihoods with a softmax mean: Lopez et al., Nat Methods 2018.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)  # yours: also layer="counts", batch_key="donor"
    >>> adata.obsm["X_scuvae_embed"].shape  # sc.pp.neighbors(adata, use_rep="X_scuvae_embed")
    (700, 15)
    """
    inputs.check_anndata(adata, copy=copy)
    flag("early_stopping", early_stopping)
    flag("check_values", check_values)
    flag("copy", copy)
    checkpoint_every = real("checkpoint_every", checkpoint_every, low=0.0)
    if checkpoint is not None:
        check_folder(checkpoint)
    n_processes = number_of_processes(None if processes is None else whole("processes", processes))
    keys = Keys.of(key_added)
    keys.check_free(adata)
    asked: dict[str, Any] = {
        "amortized": amortized,
        "likelihood": likelihood,
        "n_latent": n_latent,
        "n_hidden": n_hidden,
        "n_layers": n_layers,
        "covariance": covariance,
        "validation_fraction": validation_fraction,
        "max_epochs": max_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "local_step": local_step,
        "n_samples": n_samples,
        "kl_weight": kl_weight,
        "dropout": dropout,
    }
    settings = Settings.resolve(adata.n_obs, **asked)
    check_call(reference, fine_tune, key, n_processes)
    if reference is not None:
        asked |= {
            "dispersion": dispersion,
            "prior": prior,
            "mask_var": mask_var,
            "batch_key": batch_key,
            "categorical_covariate_keys": categorical_covariate_keys,
            "continuous_covariate_keys": continuous_covariate_keys,
            "size_factor_key": size_factor_key,
            "check_values": check_values,
        }
        given = given_of(fit, asked)
        growth = Growth(adata, reference, key, layer, device, given, fine_tune=fine_tune)
        slots = growth.slots(
            early_stopping=early_stopping,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            rng=rng,
            progress=progress,
        )
        out = target(adata, copy)
        slots.write(out, key_added)
        return out if copy else None
    inputs.check_unique_genes(adata)
    genes = inputs.gene_mask(adata, mask_var)
    matrix = inputs.read_matrix(adata, layer, genes, in_memory=False)
    where = own_device(resolve_device(device), n_processes)
    settings.check_memory(adata.n_obs, matrix.shape[1], memory_of(where))
    held_out = hold_out(adata.n_obs, settings.validation_fraction)
    own, seen = slice(None), adata
    if n_processes > 1:  # each sees its own cells
        own = own_rows(held_out, *launched())
        matrix, seen = inputs.rows_of(matrix, own), adata[own]
    chosen = choose_likelihood(likelihood, matrix, inputs.slot_name(layer))
    check_dispersion(dispersion, chosen, batch_key, matrix.shape[1])
    inputs.check_values(
        matrix,
        seen,
        layer,
        genes,
        likelihood=chosen.name,
        support=chosen.support,
        fractions=not check_values,
    )
    if likelihood == "auto" and chosen.support == "real":
        inputs.warn_of_counts_meant(matrix, seen, layer, genes)
    if dropout is None and settings.linear_path and chosen.link != "identity":
        # Its weights' prior keeps such a decoder from overfitting.
        settings = replace(settings, dropout=DROPOUT)
    p_of_z = choose_prior(prior, settings.n_latent)
    covariates = read_covariates(
        adata, batch_key, categorical_covariate_keys, continuous_covariate_keys
    )
    size_factor = size_factors(adata, size_factor_key)
    warn_of_shapes(matrix, settings, chosen)
    if size_factor is not None:
        warn_of_factors(size_factor_key, size_factor[own], matrix, chosen, seen, layer, genes)
    has_encoder = POSTERIORS[scheme_of(settings.amortized)].has_encoder

    arguments: dict[str, Any] = {
        **settings.__dict__,
        "likelihood": chosen.name,
        "dispersion": dispersion,
        "prior": p_of_z.name,
        # Of the package's own schemes amortized says it.
        "has_encoder": None if settings.amortized in INFERENCE else has_encoder,
        "encoder_input": encoder_input(chosen) if has_encoder else None,
        "layer": layer,
        **({} if covariates is None else covariates.design.to_params()),
        "covariate_slopes": True if with_slopes(settings, chosen, covariates) else None,
        "encoder_covariates": True if has_encoder and covariates is not None else None,
        "size_factor_key": size_factor_key,
        "mask_var": mask_var if isinstance(mask_var, str) else None,
        "early_stopping": early_stopping,
        "check_values": check_values,
        "device": where.type,
        "processes": n_processes if n_processes > 1 else None,
        "rng": int(rng) if isinstance(rng, int | np.integer) else None,
        "version": __version__,
        "torch_version": version("torch").split("+")[0],
        "anndata_version": version("anndata"),
    }
    # Files have no place for None: an argument that is None is left out.
    params = {name: value for name, value in arguments.items() if value is not None}
    with (
        joined(n_processes, where, own.start or 0) as group,
        random_state(agreed_seed(rng, group), where) as generator,
    ):
        group.check_alike(params)
        n_vars = matrix.shape[1]
        model = build_model(params, n_vars, instance_of(chosen, n_vars), p_of_z).to(where)
        cells = Cells(
            source_of(matrix, where),
            size_factor=_tensor(None if size_factor is None else size_factor[own], where),
            covariates=None if covariates is None else covariates.part(own).to(where),
        )
        keeper = None
        if checkpoint is not None:
            about = (adata, genes, params, cells, covariates, group)
            keeper = kept_in(checkpoint, checkpoint_every, *about)
        history, q = trained(
            model,
            cells,
            held_out[own],
            settings,
            early_stopping=early_stopping,
            seed=int(generator.integers(2**63)),
            keeper=keeper,
            group=group,
            progress=progress,
        )
    if group.rank:  # the first has it all
        return target(adata, copy) if copy else None
    total = torch.from_numpy(q.pop("total")[:, 0]) if n_processes > 1 else cells.size_factor
    names = adata.var_names.astype(str)  # files have names, whatever an index holds
    about_it = {
        "params": params,
        "history": history,
        "var_names": np.array(names if genes is None else names[genes], object),
    }
    slots = FitSlots.of(model, q, about_it, covariates, total, split_of(held_out))
    # All is at hand: what interrupts a call before here leaves the earlier fit as it was.
    out = target(adata, copy)
    slots.write(out, key_added)
    return out if copy else None


def _tensor(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, device=device)
