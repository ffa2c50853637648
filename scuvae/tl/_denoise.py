"""tl.denoise: posterior mean expression."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scuvae._adata import find_level
from scuvae._checks import flag, names, real, whole
from scuvae._errors import near
from scuvae._keys import Keys, check_name
from scuvae.batches import Batch, Cells
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.mapping.alignment import Alignment
from scuvae.inference.training.gene_totals import DENOISING_DRAWS
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_entry, read_fit
from scuvae.io.further_genes import read_further
from scuvae.io.genes import cells_of, places
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.model.covariates import Design
from scuvae.model.extended_model import ExtendedModel
from scuvae.runtime import CHUNK, isolated, resolve_device

# An h5ad file keeps a table's column names in one attribute: h5py fails at 4,200 of them.
MOST_COLUMNS = 4000


@isolated
def denoise(
    adata: AnnData,
    *,
    key: str | None = None,
    layer_added: str | None = None,
    library_size: float | None = None,
    genes: Iterable[str] | None = None,
    batch: Any = None,
    covariates: Mapping[str, Any] | None = None,
    scale: bool = False,
    n_samples: int = DENOISING_DRAWS,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | pd.DataFrame | tuple[pd.DataFrame, pd.DataFrame] | None:
    """Posterior mean expression: E_q[E[x | z]] for each cell and gene.

    On the scale of the data: counts at the cell's own size factor, chances of a one, or Gaussian
    means. What scvi-tools calls ``get_normalized_expression``, with ``batch`` for its
    ``transform_batch``. By default each gene's means add up to its counts over all cells of a fit
    to counts, to some hundredths, but for what zero inflation takes of all. Genes that
    :func:`scuvae.tl.extend_genes` added are genes like others, on the same scale.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    layer_added
        The slot to write; None for ``"scuvae_denoised"``, or ``"k_denoised"`` with ``key="k"``.
    library_size
        A total in counts over all of the model's genes, the same for every cell; None for each
        cell's own size factor. (A zero-inflated mean is that before dropout, times its chance.)
    genes
        Names of genes: return these alone as a DataFrame, and write nothing.
    batch
        Decode every cell as if it came from this batch of the fit; the average over several for a
        list of them, or over all of the fit's for ``"average"``, even where a batch has that name
        (``["average"]`` is that batch). None for each cell's own. Names are compared by what they
        say: 1, 1.0 and "1" are one. Each cell's z is moved to where cells of its kind are that come
        from there, as far as :func:`scuvae.tl.embed` has found it.
    covariates
        The same of any of the fit's covariates, by the names of their columns, such as
        ``{"sex": "F", "age": 40.0}``: a level, several to average over, or ``"average"``; a value
        of a continuous one, or ``"average"`` for the fit's mean. Each cell's own of those that are
        not named. The difference of two calls is what a covariate does.
    scale
        Also the standard deviation over q of E[x | z], which is the posterior's: noise of the data
        about their mean is not in it.
    n_samples
        Fixed draws of z per cell; 0 decodes the posterior mean alone.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    With ``genes`` a float32 DataFrame (n_obs, genes), and with ``scale`` two of them. Otherwise
    None, or with ``copy=True`` the AnnData. Sets

    ``layers["scuvae_denoised"]``
        A dense float32 array (n_obs, n_vars), where the fit models all genes of ``adata`` and the
        posteriors stand on all of them.
    ``obsm["scuvae_denoised"]``
        Otherwise: a float32 DataFrame (n_obs, genes), of those genes that were modelled and
        observed, in the order of ``adata``.
    ``layers`` or ``obsm["scuvae_denoised_scale"]``
        With ``scale``, the same of the standard deviations.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``; ``layer_added`` is the layer that was fitted; a gene,
        batch or covariate is unknown; ``library_size`` for a Gaussian or Bernoulli likelihood,
        which has no totals; ``scale`` of fewer than two draws; a table for ``obsm`` that an h5ad
        file may fail to hold.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.denoise(adata)
    >>> adata.layers["scuvae_denoised"].shape
    (700, 765)
    >>> scuvae.tl.denoise(adata, genes=["CD3D", "LYZ"], library_size=1e4).shape
    (700, 2)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_samples = whole("n_samples", n_samples, at_least=0)
    if flag("scale", scale) and n_samples < 2:
        raise ValueError(f"scale=True needs draws: pass n_samples >= 2, not {n_samples}")
    size = checked_library_size(fit, library_size)
    wanted = None if genes is None else names("genes", genes)
    if wanted is not None and (copy or layer_added is not None):
        raise ValueError(
            "genes= returns a DataFrame and writes nothing: leave out copy= and layer_added="
        )
    name = _name(fit, Keys.of(key), layer_added)
    chosen = chosen_covariates(fit.design, batch, covariates)
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    known, positions = places(adata, fit, cells)
    blocks: list[tuple[VAE | ExtendedModel, Cells, np.ndarray]] = [(fit.model, cells, positions)]
    extended = read_further(adata, key, fit)
    if extended is not None:
        more = extended.cells(adata, cells, where)
        others, positions = extended.places(adata, more)
        blocks.append((extended.model, more, positions))
        known = np.concatenate([known, others])
    columns = adata.var_names[known]
    if wanted is None:
        at = np.argsort(known)
    else:
        at = columns.get_indexer(wanted)
        if (at < 0).any():
            unknown = wanted[int(np.flatnonzero(at < 0)[0])]
            raise ValueError(
                f"genes: {unknown!r} is no gene that was modelled and observed. "
                f"{near(unknown, columns)}"
            )
    columns = columns[at]
    whole_layer = len(known) == adata.n_vars
    if wanted is None and not whole_layer:
        _check_table(columns)

    stored = stored.to(where)
    mean = stored.mean
    saved = read_entry(adata, key).get("embed", {}).get("alignment")
    alignment = None if saved is None else Alignment.of(saved, mean)
    points = normal_points(n_samples, mean) if n_samples else mean.new_zeros(1, 1, mean.shape[1])
    parts = [np.empty((len(cells), len(columns)), np.float32) for _ in range(1 + scale)]
    done = 0
    for model, seen, positions in blocks:
        place = np.flatnonzero((at >= done) & (at < done + len(positions)))
        genes_of = torch.as_tensor(positions[at[place] - done], device=where)
        done += len(positions)
        if not len(place):
            continue
        decode = _Decode(model.to(where), genes_of, size, *chosen, alignment)
        with torch.no_grad():
            for some in seen.loader(torch.arange(len(cells), device=where), CHUNK):
                z = stored[some.index].draw(points)
                rows = some.index.cpu().numpy()
                for part, values in zip(parts, decode.moments(some, z), strict=False):
                    part[rows[:, None], place] = values.cpu().numpy()

    tables = [pd.DataFrame(part, adata.obs_names, columns) for part in parts]
    if wanted is not None:
        return (tables[0], tables[1]) if scale else tables[0]
    out = target(adata, copy)
    keys = Keys.of(key)
    if name == keys.layer:  # what an earlier call left says something else
        for slot in keys.denoised:
            for held in (out.layers, out.obsm):
                if slot in held:
                    del held[slot]
    for added, part, table in zip((name, f"{name}_scale"), parts, tables, strict=False):
        if whole_layer:
            out.layers[added] = part
        else:
            out.obsm[added] = table
    return out if copy else None


@dataclass(frozen=True)
class _Decode:
    """Means of ``genes`` at a total; ``which`` of the covariates' columns are not the cell's own
    but those of each of some ``rows``, over which means are averaged; ``alignment`` says where z of
    a cell is as if told so."""

    model: VAE | ExtendedModel
    genes: Tensor
    size: float | None
    which: Tensor | None
    rows: Tensor | None
    alignment: Alignment | None

    def moments(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over draws of E[x | z], (cells, genes) each."""
        mean = square = torch.zeros((), device=z.device)
        for n, point in enumerate(z):
            value = self.expected(batch, point)
            step = value - mean
            mean = mean + step / (n + 1)
            square = square + step * (value - mean)
        return mean, (square / len(z)).sqrt()

    def expected(self, batch: Batch, z: Tensor) -> Tensor:
        if self.size is not None:
            total = torch.full_like(batch.size_factor, self.size)
            batch = replace(batch, size_factor=total, size_of_all=True)
        own = batch.covariates
        if self.which is None or self.rows is None or own is None:
            return self._mean(batch, z, own)
        value = torch.zeros((), device=z.device)
        alignment = self.alignment
        r = None if alignment is None else alignment.responsibilities(z, own)
        for row in self.rows.to(z):
            told, at = torch.where(self.which.to(z.device), row, own), z
            if alignment is not None and r is not None:
                at = z + alignment.added(r, told - own)
            value = value + self._mean(batch, at, told)
        return value / len(self.rows)

    def _mean(self, batch: Batch, z: Tensor, covariates: Tensor | None) -> Tensor:
        eta = self.model.decoder(z, covariates)
        size = self.model.size_factor(batch, eta)
        likelihood = self.model.likelihood_of(covariates)
        return likelihood.mean(eta, size, batch.observed)[:, self.genes]


def checked_library_size(fit: Fit, library_size: float | None) -> float | None:
    if library_size is None:
        return None
    size = real("library_size", library_size, above=0)
    if fit.model.likelihood.link != "softmax":
        raise ValueError(
            f"library_size={library_size!r}: likelihood={fit.model.likelihood.name!r} has no "
            "totals to scale to. Pass None"
        )
    return size


def _name(fit: Fit, keys: Keys, layer_added: str | None) -> str:
    """The slot to write, in layers or obsm."""
    name = keys.layer if layer_added is None else check_name("layer_added", layer_added)
    if name == fit.layer or name in keys.moments:
        taken = ", the layer that was fitted" if name == fit.layer else ""
        raise ValueError(
            f"layer_added={layer_added!r}{taken}: pass another name, or None for {keys.layer!r}"
        )
    return name


def chosen_covariates(
    design: Design, batch: Any, covariates: Mapping[str, Any] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The columns that are not each cell's own, and their rows: see Design.given."""
    if covariates is not None and not isinstance(covariates, Mapping):
        raise TypeError(
            f"covariates={covariates!r} is a {type(covariates).__name__}: pass a dict of columns "
            "and values, such as {'sex': 'F'}"
        )
    wanted = dict(covariates or {})
    if batch is not None:
        if design.batch is None:
            raise ValueError(f"batch={batch!r}, but the fit has no batch_key: pass None")
        if design.batch.key in wanted:
            raise ValueError(
                f"batch= and covariates= both speak of {design.batch.key!r}: leave out one"
            )
    chosen: dict[str, list[int] | float] = {}
    levels = {one.key: list(one.levels) for one in design.categorical}
    amounts = {one.key: one for one in design.continuous}
    if batch is not None and design.batch is not None:
        chosen[design.batch.key] = _numbers("batch: {} is no batch", batch, design.batches)
    for key, value in wanted.items():
        if key in levels:
            what = f"covariates: {{}} is no level of {key!r}"
            chosen[key] = _numbers(what, value, levels[key])
        elif key in amounts:
            average = isinstance(value, str) and value == "average"
            chosen[key] = amounts[key].mean if average else real(f"covariates[{key!r}]", value)
        else:
            raise ValueError(
                f"covariates: {key!r} is no covariate of the fit. {near(key, [*levels, *amounts])}"
            )
    return design.given(chosen) if chosen else (None, None)


def _numbers(what: str, wanted: Any, levels: list[str]) -> list[int]:
    """Levels by number: one, several, or all for "average"."""
    if isinstance(wanted, str) and wanted == "average":
        return list(range(len(levels)))
    single = isinstance(wanted, str) or not isinstance(wanted, Iterable)
    names = [wanted] if single else list(wanted)
    if not names:
        raise ValueError(
            f"{what.split(':')[0]} is empty: pass a level of the fit, or None for each cell's own"
        )
    found = []
    for name in names:
        number = find_level(name, levels)
        if number is None:
            raise ValueError(
                f"{what.format(repr(str(name)))} of the fit. {near(name, levels)} Or pass 'average'"
            )
        found.append(number)
    return list(dict.fromkeys(found))


def _check_table(columns: pd.Index) -> None:
    """Raise where a table of these genes would leave ``adata`` unfit for a file."""
    slashed = [name for name in columns if "/" in str(name)]
    if len(columns) <= MOST_COLUMNS and not slashed:
        return
    found = f"the gene name {slashed[0]!r}" if slashed else f"{len(columns)} columns"
    raise ValueError(
        f"the fit models {len(columns)} of adata's genes, so the result would be a table in obsm, "
        f"but with {found} an h5ad file may fail to hold it: pass genes=[...] for a DataFrame, or "
        "adata[:, the modelled genes].copy(), which gets a layer"
    )
