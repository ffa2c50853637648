"""scvi-tools' SCVI as a model of ours: trained and cached as plain arrays, read as a VAE.

In evaluation mode SCVI's decoder (linear, batch norm, ReLU, linear, softmax) is our ``Decoder``
with the batch norm folded into the first layer, its likelihood our negative binomial with
θ = exp(px_r), so every evaluation of ours runs on it unchanged. :func:`check` holds the two against
each other.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from _common import Clock
from torch import Tensor, nn

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE, Decoder
from scuvae.model.likelihoods import LIKELIHOODS

MODEL: dict[str, Any] = {
    "n_hidden": 128,
    "n_latent": 10,
    "n_layers": 1,
    "dispersion": "gene",
    "gene_likelihood": "nb",
    "use_observed_lib_size": True,
}
# Of all that SCVI holds, what its NB needs in evaluation, and its ZINB beside.
_NEEDED = ("px_r", "z_encoder.", "decoder.px_decoder.", "decoder.px_scale_decoder.")
_INFLATION = "decoder.px_dropout_decoder."


def default_epochs(n_obs: int) -> int:
    """scvi-tools' own default number of epochs (1.4: ``get_max_epochs_heuristic``)."""
    return max(1, min(round(20_000 / n_obs * 400), 400))


class Trace:
    """A training run of SCVI: its weights after some epochs, and the CPU seconds of every epoch."""

    def __init__(self, about: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        self.about = about
        self.epochs: list[int] = about["epochs"]
        self.cpu_s: list[float] = about["cpu_s"]  # cumulative, after each epoch
        self.weights = weights  # each array with a leading axis over ``epochs``

    @property
    def max_epochs(self) -> int:
        return self.epochs[-1]

    def seconds(self, epoch: int) -> float:
        return self.cpu_s[epoch - 1]

    def state(self, epoch: int) -> dict[str, Tensor]:
        i = self.epochs.index(epoch)
        return {name: torch.tensor(values[i]) for name, values in self.weights.items()}

    def model(self, epoch: int) -> VAE:
        return as_vae(self.state(epoch))


def trace(
    train: ad.AnnData,
    seed: int,
    max_epochs: int,
    *,
    name: str,
    cache: str | None,
    every: int = 5,
    likelihood: str = "nb",
) -> Trace:
    """SCVI's training on these cells, from the cache or anew.

    A run of more epochs begins as a run of fewer does, epoch for epoch: SCVI's defaults have no
    schedule that depends on ``max_epochs`` (its KL warm-up takes 400 epochs in any case).
    """
    stem = "scvi" if likelihood == "nb" else f"scvi_{likelihood}"
    base = Path(cache) / f"{stem}_{name}_{train.n_vars}_seed{seed}" if cache else None
    if base is not None and base.with_suffix(".json").exists():
        about = json.loads(base.with_suffix(".json").read_text())
        same = about["n_obs"] == train.n_obs and about["total"] == float(train.X.sum())
        if same and about["epochs"][-1] >= max_epochs and max_epochs in about["epochs"]:
            with np.load(base.with_suffix(".npz")) as arrays:
                return Trace(about, dict(arrays))
    run = _train(train, seed, max_epochs, every, likelihood)
    if base is not None:
        base.parent.mkdir(parents=True, exist_ok=True)
        np.savez(base.with_suffix(".npz"), **run.weights)
        base.with_suffix(".json").write_text(json.dumps(run.about, indent=1) + "\n")
    return run


def seconds_per_epoch(
    train: ad.AnnData,
    n_epochs: int = 3,
    *,
    likelihood: str = "nb",
    batch_size: int = 128,
    device: str = "cpu",
    setting: dict[str, Any] | None = None,
) -> float:
    """What an epoch of SCVI costs now, the machine as busy as it is; the first is not counted."""
    run = _train(train, 0, n_epochs + 1, n_epochs + 1, likelihood, batch_size, device, setting)
    return (run.cpu_s[-1] - run.cpu_s[0]) / n_epochs


def _train(
    train: ad.AnnData,
    seed: int,
    max_epochs: int,
    every: int,
    likelihood: str = "nb",
    batch_size: int = 128,
    device: str = "cpu",
    setting: dict[str, Any] | None = None,
) -> Trace:
    threads = torch.get_num_threads()
    warnings.filterwarnings("ignore", module="lightning")
    import logging

    import scvi
    from lightning.pytorch import Callback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    torch.set_num_threads(threads)
    adata = train.copy()
    scvi.model.SCVI.setup_anndata(adata)
    options = {**MODEL, "gene_likelihood": likelihood, **(setting or {})}
    needed = _NEEDED if likelihood == "nb" else (*_NEEDED, _INFLATION)
    model = scvi.model.SCVI(adata, **options)
    # Often at first, every fifth epoch of the first 200, then every twentieth.
    keep = {1, 2, 3, max_epochs}
    keep |= {e for e in range(every, max_epochs + 1, every) if e <= 200 or e % (4 * every) == 0}
    kept: list[int] = []
    states: list[dict[str, np.ndarray]] = []
    cpu_s: list[float] = []

    class Recorder(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.clock = Clock(device)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            cpu_s.append(self.clock.seconds())
            epoch = trainer.current_epoch + 1
            if epoch in keep:
                with self.clock.paused():
                    kept.append(epoch)
                    states.append(
                        {
                            name: value.cpu().numpy().copy()
                            for name, value in model.module.state_dict().items()
                            if name.startswith(needed)
                        }
                    )

    whole = Clock()
    model.train(
        max_epochs=max_epochs,
        batch_size=batch_size,
        accelerator="cpu" if device == "cpu" else "gpu",
        train_size=1.0,
        early_stopping=False,
        enable_progress_bar=False,
        callbacks=[Recorder()],
    )
    about = {
        "scvi_tools": scvi.__version__,
        "torch": torch.__version__,
        "model": options,
        "seed": seed,
        "n_obs": train.n_obs,
        "n_vars": train.n_vars,
        "total": float(train.X.sum()),
        "epochs": kept,
        "cpu_s": cpu_s,
        "whole_call_cpu_s": whole.seconds(),
    }
    return Trace(about, {name: np.stack([s[name] for s in states]) for name in states[0]})


def as_scvi(run: Trace, epoch: int, train: ad.AnnData) -> Any:
    """scvi-tools' own model with the weights that a run had after an epoch.

    ``train`` is set up for it. What the weights lack, evaluation does not ask for.
    """
    import scvi

    scvi.model.SCVI.setup_anndata(train)
    model = scvi.model.SCVI(train, **run.about["model"])
    found = model.module.load_state_dict(run.state(epoch), strict=False)
    if found.unexpected_keys or any(name.startswith(_NEEDED) for name in found.missing_keys):
        raise RuntimeError(f"this scvi-tools names SCVI's weights differently: {found}")
    model.module.eval()
    model.is_trained_ = True
    return model


# --- SCVI's weights as a VAE ---------------------------------------------------------------------


def as_vae(state: dict[str, Tensor]) -> VAE:
    """SCVI in evaluation mode: one hidden layer, no batches, NB with a dispersion for each gene."""
    n_vars, n_hidden = state["decoder.px_scale_decoder.0.weight"].shape
    first = "decoder.px_decoder.fc_layers.Layer 0"
    weight, bias = _folded(state, first)
    decoder = Decoder(weight.shape[1], n_vars, n_hidden=n_hidden, n_layers=1)
    with torch.no_grad():
        _put(decoder.layers[0], weight, bias)
        _put(
            decoder.layers[1],
            state["decoder.px_scale_decoder.0.weight"],
            state["decoder.px_scale_decoder.0.bias"],
        )
        likelihood = LIKELIHOODS["negative_binomial"](n_vars)
        likelihood.log_theta.copy_(state["px_r"])
    model = VAE(decoder, likelihood, SCVIEncoder(state)).eval()  # type: ignore[arg-type]
    return model.requires_grad_(False)


class SCVIEncoder(nn.Module):
    """SCVI's encoder in evaluation mode: log1p counts → q(z)."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        weight, bias = _folded(state, "z_encoder.encoder.fc_layers.Layer 0")
        self.hidden = nn.Linear(weight.shape[1], weight.shape[0])
        n_latent = state["z_encoder.mean_encoder.weight"].shape[0]
        self.mean = nn.Linear(weight.shape[0], n_latent)
        self.log_variance = nn.Linear(weight.shape[0], n_latent)
        with torch.no_grad():
            _put(self.hidden, weight, bias)
            for layer, name in ((self.mean, "mean_encoder"), (self.log_variance, "var_encoder")):
                _put(layer, state[f"z_encoder.{name}.weight"], state[f"z_encoder.{name}.bias"])

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Gaussian:
        h = self.hidden(x.log1p()).relu()
        scale = (self.log_variance(h).exp() + 1e-4).sqrt()
        return Gaussian(self.mean(h), scale)


def _folded(state: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer followed by batch norm in evaluation mode."""
    part = {n[len(layer) + 1 :]: v.double() for n, v in state.items() if n.startswith(layer)}
    gain = part["1.weight"] / (part["1.running_var"] + 1e-3).sqrt()
    bias = (part["0.bias"] - part["1.running_mean"]) * gain + part["1.bias"]
    return (part["0.weight"] * gain[:, None]).float(), bias.float()


def _put(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def check(state: dict[str, Tensor], batch: Batch) -> dict[str, float]:
    """Hold :func:`as_vae` against scvi-tools' own module, on the same cells and draws of z.

    SCVI adds 1e-8 to every mean, which lifts a cell's log p(x | z) by up to a nat where a count
    meets a smaller mean (.003 nats on average after 400 epochs on pbmc_facs). We do not, so log p
    is compared with SCVI's own formula at its own mean and θ without that; the lift is returned.

    Returns the largest differences over cells; raises where they exceed float32's noise.
    """
    import scvi
    from scvi.distributions._negative_binomial import log_nb_positive

    from scuvae.batches.sparse_rows import dense

    x = dense(batch.x)
    module = scvi.module.VAE(x.shape[1], n_batch=1, **MODEL)
    left_out = module.load_state_dict(state, strict=False)
    if left_out.unexpected_keys or any(n.startswith(_NEEDED) for n in left_out.missing_keys):
        raise RuntimeError(f"this scvi-tools names SCVI's weights differently: {left_out}")
    module.eval()
    which = torch.zeros(len(x), 1, dtype=torch.long)
    tensors = {scvi.REGISTRY_KEYS.X_KEY: x, scvi.REGISTRY_KEYS.BATCH_KEY: which}
    model = as_vae(state)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = module.inference(x, which)
        z = found["z"]
        made = module.generative(z, found["library"], which)
        loss = module.loss(tensors, found, made)
        log_p = model.log_likelihood(batch, z)
        kl = model.prior.kl(model.encode(batch))

        few = z[:4]
        logits = _logits(module, few)
        eta, jacobian = model.decoder.jacobian(few)
        theirs = torch.func.jacfwd(lambda z: _logits(module, z))(few)
        theirs = theirs[range(len(few)), :, range(len(few))].mT  # a cell's z moves only its own

        module.double()
        px = module.generative(z.double(), found["library"].double(), which)["px"]
        exact = log_nb_positive(x.double(), px.mu, px.theta, eps=0.0).sum(-1)
    lift = -loss.dict_sum(loss.reconstruction_loss) - exact
    worst = {
        "log p(x | z)": _worst(log_p, exact),
        "KL": _worst(kl, loss.dict_sum(loss.kl_local)),
        "eta": _worst(eta, logits),
        "Jacobian": _worst(jacobian, theirs),
    }
    bounds = {"log p(x | z)": 1e-2, "KL": 1e-3, "eta": 1e-3, "Jacobian": 1e-3}
    if any(not worst[name] < bound for name, bound in bounds.items()):
        raise RuntimeError(f"SCVI as a VAE of ours is not scvi-tools' SCVI: {worst}")
    if not float(lift.mean().abs()) < 0.1:
        raise RuntimeError(f"SCVI's own loss is {float(lift.mean())} nats a cell from its formula")
    return {**worst, "mean lift by SCVI's 1e-8": float(lift.mean())}


def _logits(module: Any, z: Tensor) -> Tensor:
    """What SCVI's softmax is taken of."""
    which = torch.zeros(len(z), 1, dtype=torch.long)
    out: Tensor = module.decoder.px_scale_decoder[0](module.decoder.px_decoder(z, which))
    return out


def _worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
