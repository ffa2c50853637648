"""The plain algorithm of a blog post: tl.fit against the loop as its author would write it.

    python tests/benchmarks/seed.py --epochs 4000 --json out.json

200 cells × 500 genes of ``datasets.linear_factor``, 3 latent dimensions, Gaussian, decoder
3 → 128 → 128 → 500, diagonal q, 10 draws, full batch, RMSprop, no encoder. The plain loop uses
torch.distributions and torch.optim on the same one thread, or GPU; it maximises the same ELBO (math
in scuvae.inference.posteriors.objectives). Seconds are CPU seconds of all epochs, on a GPU wall
seconds.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from _common import Clock, platform_of, print_table, write_json
from torch import nn

import scuvae

COLUMNS = {
    "loop": ("loop", ""),
    "seconds": ("seconds", ".2f"),
    "ms": ("ms an epoch", ".3f"),
    "ratio": ("plain / this", ".2f"),
    "elbo": ("ELBO, last epoch", ".2f"),
}
DRAWS = 10


class Plain(nn.Module):
    """Unamortized VAE with a parameter table for the means and one for the scales."""

    def __init__(self, n_obs: int, n_vars: int, n_latent: int) -> None:
        super().__init__()
        self.q_mean = nn.Parameter(torch.zeros(n_obs, n_latent))
        self.q_scale_raw = nn.Parameter(torch.zeros(n_obs, n_latent))
        self.residual_scale_raw = nn.Parameter(torch.zeros(1))
        self.decoder = nn.Sequential(
            nn.Linear(n_latent, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, n_vars),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = nn.functional.softplus(self.q_scale_raw)
        kl = 0.5 * (-1 - 2 * scale.log() + self.q_mean**2 + scale**2).sum(1)
        z = torch.distributions.Normal(self.q_mean, scale).rsample(torch.Size([DRAWS]))
        residual = nn.functional.softplus(self.residual_scale_raw)
        log_p = torch.distributions.Normal(self.decoder(z), residual).log_prob(x)
        return -(log_p.mean(0).sum(1) - kl).sum()


def plain(x: np.ndarray, epochs: int, seed: int, device: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    values = torch.tensor(x, dtype=torch.float32, device=device)
    model = Plain(*values.shape, 3).to(device)
    optimizer = torch.optim.RMSprop(model.parameters())
    trace = []
    clock = Clock(device)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = model(values)
        if torch.isnan(loss):
            raise RuntimeError("nan loss")
        trace.append(loss.item())
        loss.backward()
        optimizer.step()
    return {"loop": "plain PyTorch", "seconds": clock.seconds(), "elbo": -trace[-1] / len(x)}


def ours(x: np.ndarray, epochs: int, seed: int, device: str) -> dict[str, Any]:
    """All of ``tl.fit``: the checks and the writing of slots as well."""
    adata = scuvae.datasets.linear_factor()
    adata.X = x
    clock = Clock(device)
    scuvae.tl.fit(
        adata,
        likelihood="gaussian",
        n_latent=3,
        n_layers=2,
        covariance="diagonal",
        local_step="gradient",
        optimizer="rmsprop",
        n_samples=DRAWS,
        batch_size=adata.n_obs,
        max_epochs=epochs,
        validation_fraction=0.0,
        early_stopping=False,
        device=device,
        progress=False,
        rng=seed,
    )
    history = scuvae.get.history(adata)
    seconds = clock.seconds()
    return {"loop": "scuvae.tl.fit", "seconds": seconds, "elbo": float(history["elbo"].iloc[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=int, default=4000)
    add("--repetitions", type=int, default=1, help="whole runs of each; medians are shown")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = np.asarray(scuvae.datasets.linear_factor().X, np.float32)
    for run in (plain, ours):  # what a first call loads is nobody's time
        run(x, 20, 0, args.device)
    runs = [
        run(x, args.epochs, seed, args.device)
        for seed in range(args.repetitions)
        for run in (plain, ours)
    ]
    rows = []
    for name in dict.fromkeys(run["loop"] for run in runs):
        mine = [run for run in runs if run["loop"] == name]
        row = {key: statistics.median(r[key] for r in mine) for key in ("seconds", "elbo")}
        rows.append({"loop": name, **row, "ms": 1e3 * row["seconds"] / args.epochs})
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
    print(f"{args.epochs} epochs, {args.device}, {torch.get_num_threads()} thread(s)\n")
    print_table(rows, COLUMNS)
    write_json(
        args.json,
        {"platform": platform_of(args.device), "arguments": vars(args), "rows": rows, "runs": runs},
    )


if __name__ == "__main__":
    main()
