"""What is held out stays out: nothing that is learned or calibrated depends on it.

The cells' values are changed, and what must not have seen them is the same, to the bit.
"""

from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from helpers import SCHEMES, SMALL, fingerprint, small_counts, small_data, small_fit

from scuvae import get, tl
from scuvae.inference.training import held_out as held_out_cells
from scuvae.model import VAE
from scuvae.tl import _novelty


def held_out_of(adata: AnnData) -> np.ndarray:
    return (adata.obs["scuvae_split"] == "validation").to_numpy()


def shuffled(adata: AnnData, rows: np.ndarray) -> AnnData:
    """The genes' values permuted within some cells: other cells, of the same totals."""
    changed = adata.copy()
    rng = np.random.default_rng(3)
    x = np.array(changed.X)
    for row in np.flatnonzero(rows):
        x[row] = rng.permutation(x[row])
    changed.X = x
    return changed


def learned(adata: AnnData, but: tuple[str, ...] = ()) -> Any:
    state = adata.uns["scuvae"]["state"]
    parts = {
        f"{part}/{name}": array
        for part, arrays in state.items()
        for name, array in arrays.items()
        if f"{part}/{name}" not in but
    }
    return fingerprint(parts)


@pytest.mark.parametrize("likelihood", ["gaussian", "negative_binomial"])
@pytest.mark.parametrize("amortized", SCHEMES)
def test_a_fit_does_not_learn_from_held_out_cells(amortized: bool | str, likelihood: str) -> None:
    options: dict[str, Any] = {
        "likelihood": likelihood,
        "amortized": amortized,
        "validation_fraction": 0.3,
        "early_stopping": False,
    }
    first = small_fit(small_data(likelihood), **options)
    second = small_data(likelihood)
    second = small_fit(shuffled(second, held_out_of(first)), **options)
    last = max(name for name in first.uns["scuvae"]["state"]["decoder"] if name.endswith("bias"))
    # Intercepts give back every gene's total over all cells that are described.
    but = (f"decoder/{last}",) if likelihood != "gaussian" else ()
    assert learned(first, but) == learned(second, but)
    third = small_fit(shuffled(small_data(likelihood), ~held_out_of(first)), **options)
    assert learned(first, but) != learned(third, but), "of training cells it does"


@pytest.fixture(scope="module")
def reference() -> AnnData:
    return small_fit(small_counts(n_obs=120), validation_fraction=0.3)


def test_an_encoder_is_not_distilled_on_held_out_cells(reference: AnnData) -> None:
    """After one epoch there is nothing to choose from: held-out cells have no part at all."""
    held_out = held_out_of(reference)
    found = []
    for adata in (reference.copy(), shuffled(reference, held_out), shuffled(reference, ~held_out)):
        tl.to_encoder(adata, max_epochs=1, batch_size=32)
        found.append(fingerprint(adata.uns["scuvae"]["state"]["encoder"]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_novelty_is_calibrated_on_held_out_cells(reference: AnnData) -> None:
    held_out = held_out_of(reference)
    assert held_out.sum() >= 20
    found = []
    for old in (reference, shuffled(reference, ~held_out), shuffled(reference, held_out)):
        new = small_counts(n_obs=30, seed=5)
        tl.novelty(new, old, n_samples=4)
        found.append(fingerprint(new.obs))
    assert found[0] == found[1], "training cells have no part"
    assert found[0] != found[2]


@pytest.mark.parametrize("n_new", [25, 80])
def test_novelty_has_as_many_candidates_on_both_sides(
    n_new: int, reference: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cells lie closer together, what they miss agrees more."""
    sizes = []
    shared = _novelty.shared_scores

    def counted(fit: Any, cells: Any, q: Any, candidates: np.ndarray, *rest: Any) -> torch.Tensor:
        sizes.append((len(cells), len(set(candidates.tolist()))))
        return shared(fit, cells, q, candidates, *rest)

    monkeypatch.setattr(_novelty, "shared_scores", counted)
    tl.novelty(small_counts(n_obs=n_new, seed=5), reference, n_samples=4)
    (new, of_new), (old, of_old) = sizes
    assert (new, old) == (n_new, held_out_of(reference).sum())
    assert of_new == of_old == min(new, old)


def test_held_out_cells_are_judged_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are all cells, once the fit has ended."""
    modes = []
    elbo = held_out_cells.HeldOutCells.elbo

    def watched(self: Any, model: VAE) -> float:
        modes.append(any(part.training for part in model.modules()))
        return elbo(self, model)

    monkeypatch.setattr(held_out_cells.HeldOutCells, "elbo", watched)
    adata = small_counts()
    tl.fit(adata, **SMALL, dropout=0.5)
    assert modes
    assert not any(modes)
    model = get.model(adata)
    assert not model.decoder.training


def test_a_decoder_drops_units_in_training_alone() -> None:
    adata = small_fit(small_counts(), n_hidden=64, dropout=0.5)
    decoder = get.model(adata).decoder
    z = torch.ones(5, decoder.n_latent if hasattr(decoder, "n_latent") else 3)
    decoder.eval()
    assert torch.equal(decoder(z), decoder(z))
    decoder.train()
    assert not torch.equal(decoder(z), decoder(z))
