"""Observed values against what each fit predicts for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from .._checks import whole
from .._keys import DEFAULT
from ._common import BLOCK, finish, fits, fitted_to, matrix, panels, picture

COLUMNS = 4


@picture
def observed_vs_predicted(
    adata: AnnData,
    *,
    keys: str | Sequence[str] | None = None,
    oracle: str | None = None,
    layer: str | None = None,
    max_points: int = 200_000,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | PathLike[str] | None = None,
    return_fig: bool = False,
) -> list[Axes] | Figure | None:
    """Observed value against predicted value, one panel per fit.

    Predictions are read from the layers that :func:`scuvae.tl.denoise` writes,
    ``adata.layers[f"{key}_denoised"]``, or from the table in ``obsm`` that it writes where not all
    genes were modelled. Counts are drawn as a density on log1p axes (brighter: more
    entries, on a logarithmic scale), other values as points. Each title has Pearson's correlation
    over all entries, for counts that of log1p values. The red line is observed = predicted.

    Parameters
    ----------
    adata
        Data with fits by :func:`scuvae.tl.fit` and their denoised layers.
    keys
        The fits' ``key_added``, one or several; None draws every fit.
    oracle
        A layer with the truth, as in simulations, drawn in the first panel.
    layer
        The observed values; None takes what each fit was fitted to.
    max_points
        Entries drawn per panel: of larger matrices a fixed random selection of rows and columns.
    ax
        Axes to draw in, one per panel; None makes a figure.
    show
        Whether to show the figure. None: if it was made here and can be seen.
    save
        A file to write the picture to, such as ``"loss.png"`` or ``"loss.pdf"``; it is then not
        shown unless ``show=True``.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    The panels' axes, the figure with ``return_fig``, or None if the figure was shown.

    Raises
    ------
    ValueError
        If a fit, its denoised layer, the oracle or the observed layer does not exist.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.linear_factor()
    >>> (ax,) = scuvae.pl.observed_vs_predicted(adata, keys=[], oracle="oracle", show=False)
    >>> ax.get_title()
    'Oracle\\nr = 0.814'
    """
    max_points = whole("max_points", max_points)
    chosen = fits(adata, keys)
    drawn = []
    if oracle is not None:
        fit = chosen[0] if chosen else None
        drawn.append(("Oracle", _Pair.of(adata, fit, layer, matrix(adata, oracle))))
    for key in chosen:
        drawn.append((key, _Pair.of(adata, key, layer, _denoised(adata, key))))
    if not drawn:
        raise ValueError("Nothing to draw: keys is empty and oracle is None.")

    own = ax is None
    axes = panels(ax, len(drawn), COLUMNS, (2.4, 2.6), sharex=True, sharey=True)
    for i, (panel, (name, pair)) in enumerate(zip(axes, drawn, strict=True)):
        observed, predicted = pair.sample(max_points)
        counts = _are_counts(observed) and bool((predicted >= 0).all())
        r = pair.correlation(log1p=counts)
        (_draw_counts if counts else _draw_values)(panel, observed, predicted)
        panel.set_title(f"{name}\n{_in_words(r, counts)}", fontsize="medium")
        kind = "count" if counts else "value"
        panel.set_xlabel(f"Predicted {kind}")
        if i % COLUMNS == 0 or not own:
            panel.set_ylabel(f"Observed {kind}")

    return finish(axes, axes[0], own=own, show=show, save=save, return_fig=return_fig)


@dataclass(frozen=True)
class _Pair:
    """Two matrices of the same cells and genes, read a block at a time."""

    observed: Any
    predicted: Any
    # The genes that the fit models, as column numbers.
    genes: np.ndarray

    @classmethod
    def of(cls, adata: AnnData, key: str | None, layer: str | None, predicted: Any) -> "_Pair":
        """``layer=None``: the layer that the fit was fitted to."""
        observed, genes = fitted_to(adata, key, layer)
        return cls(observed, predicted, genes)

    def sample(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """At most ``n`` entries: rows and columns thinned alike, the same on every call."""
        n_rows, n_cols = self.predicted.shape[0], len(self.genes)
        keep = min(1.0, np.sqrt(n / (n_rows * n_cols)))
        generator = np.random.default_rng(0)
        size = max(1, min(n, int(n_rows * keep)))
        rows = np.sort(generator.choice(n_rows, size=size, replace=False))
        size = max(1, min(n_cols, n // len(rows)))
        genes = self.genes[np.sort(generator.choice(n_cols, size=size, replace=False))]
        return self._read(rows, genes)

    def correlation(self, *, log1p: bool) -> float:
        """Pearson's r over all entries, in one pass (Chan et al. 1983)."""
        n, mean, scatter = 0, np.zeros(2), np.zeros((2, 2))
        for block in self._blocks():
            values = np.log1p(block) if log1p else np.stack(block)
            size = values.shape[1]
            if size == 0:
                continue
            centre = values.mean(axis=1)
            values -= centre[:, None]
            step = centre - mean
            scatter += values @ values.T + np.outer(step, step) * (n * size / (n + size))
            mean += step * (size / (n + size))
            n += size
        spread = np.sqrt(scatter[0, 0] * scatter[1, 1])
        return float(scatter[0, 1] / spread) if spread > 0 else float("nan")

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        n_rows = self.predicted.shape[0]
        size = max(1, BLOCK // self.predicted.shape[1])
        for start in range(0, n_rows, size):
            yield self._read(slice(start, min(start + size, n_rows)), self.genes)

    def _read(self, rows: Any, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        observed, predicted = (
            dense(matrix[rows][:, genes]).ravel() for matrix in (self.observed, self.predicted)
        )
        finite = np.isfinite(observed) & np.isfinite(predicted)
        return observed[finite], predicted[finite]


def dense(block: Any) -> np.ndarray:
    if hasattr(block, "compute"):
        block = block.compute()
    if hasattr(block, "toarray"):
        block = block.toarray()
    return np.asarray(block, dtype=np.float64)


def _denoised(adata: AnnData, key: str) -> Any:
    name = f"{key}_denoised"
    if name in adata.obsm:  # a table of the modelled genes, where these are not all
        return adata.obsm[name].reindex(columns=adata.var_names).to_numpy()
    if name not in adata.layers:
        arguments = "" if key == DEFAULT else f", key={key!r}"
        raise ValueError(
            f"adata.layers has no {name!r}. Call scuvae.tl.denoise(adata{arguments}, "
            f"layer_added={name!r}) first."
        )
    return adata.layers[name]


def _are_counts(values: np.ndarray) -> bool:
    return bool((values >= 0).all() and (values == np.rint(values)).all())


def _in_words(r: float, counts: bool) -> str:
    if np.isnan(r):
        return "r undefined"
    return f"r = {r:.3f}" + (" (log1p)" if counts else "")


def _draw_values(ax: Axes, observed: np.ndarray, predicted: np.ndarray) -> None:
    # The more points, the fainter. Rasterized: as vectors, 200,000 of them make a huge file.
    alpha = float(np.clip(1e4 / max(len(observed), 1), 0.02, 0.5))
    ax.scatter(predicted, observed, s=1, c="black", alpha=alpha, linewidths=0, rasterized=True)
    ax.axline((0, 0), slope=1, color="tab:red", linewidth=0.8)


def _draw_counts(ax: Axes, observed: np.ndarray, predicted: np.ndarray) -> None:
    top = max(observed.max(initial=1), predicted.max(initial=1))
    # Whole counts have one row each while they are few, then rows of equal height.
    across = np.expm1(np.linspace(0, np.log1p(top), 81))
    # expm1(log1p(top)) may fall short of top, and the largest count out of the picture.
    across[-1] = top
    up = np.concatenate([[-0.5], np.unique(np.floor(across)) + 0.5])
    density, _, _ = np.histogram2d(observed, predicted, bins=(up, across))
    ax.set_xscale("function", functions=(np.log1p, np.expm1))
    ax.set_yscale("function", functions=(np.log1p, np.expm1))
    ax.pcolormesh(
        across,
        up,
        np.ma.masked_equal(density, 0),
        norm=LogNorm(vmin=1),
        cmap="viridis",
        rasterized=True,
    )
    ax.plot(across, across, color="tab:red", linewidth=0.8)
    ticks = [t for t in (0, *np.outer(10.0 ** np.arange(7), (1, 3)).ravel()) if t <= top]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_locator(NullLocator())
