"""One HTML page of what the workflow has found, its pictures inside.

python report.py FOLDER OUTPUT
"""

import base64
import json
import sys
from html import escape
from pathlib import Path

import pandas as pd

FIGURES = {
    "umap": "The map. Islands are kinds of cells; borders within an island are less sure.",
    "embedding-scores": "How well each cell's place is known, and how well it is explained.",
    "loss": "The dashed line's end should be flat, its dot at or near the end.",
    "predictive-check": "Points on the line are genes that the fit would reproduce.",
    "volcano": "Genes of the first group against the rest; coloured: 5 % false ones expected.",
}
STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "td,th{text-align:left;padding:.2em .8em .2em 0;vertical-align:top}"
)
pd.set_option("display.max_colwidth", None)  # names of genes are not cut off


def main(folder: str, output: str) -> None:
    said = {
        name: json.loads(Path(folder, f"{name}.json").read_text())
        for name in ("fit", "score", "check", "markers")
    }
    fit = said["fit"]["fit"]
    rows = {
        "cells × genes": f"{fit['n_obs']:,} × {fit['n_vars']:,}",
        "likelihood": fit["likelihood"],
        "told to the model": ", ".join(f"{k}={v}" for k, v in fit["data"].items()) or "nothing",
        "epochs": fit["epochs"],
        "held-out ELBO (nats per cell)": round(fit["held_out_elbo"], 1),
        "importance-weighted bound": round(said["score"]["fit"]["measures"]["log_evidence"], 1),
        "farthest genes": ", ".join(list(said["check"].get("farthest_genes", {}))[:8]),
        "seconds of the fit": round(said["fit"]["seconds"]),
        "version": fit["version"],
    }
    found = said["markers"]["genes_at_fdr_05"]
    markers = pd.read_csv(Path(folder, "markers.csv"))
    best = markers.groupby("group", sort=False)["names"].apply(lambda x: ", ".join(x[:6]))
    table = pd.DataFrame({"genes with 5 % false": found, "first": best.rename(str)})
    parts = [
        "<h1>scuvae report</h1>",
        pd.Series(rows).astype(str).to_frame("").to_html(header=False, border=0),
        "<h2>Groups and their markers</h2>",
        table.to_html(border=0),
    ]
    for name, text in FIGURES.items():
        image = base64.b64encode(Path(folder, "figures", f"{name}.png").read_bytes()).decode()
        parts.append(f"<h2>{name}</h2><p>{escape(text)}</p>")
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{image}">')
    page = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    Path(output).write_text(
        f"<!doctype html><html lang=en><head>{head}<title>scuvae report</title>"
        f"<style>{STYLE}</style></head><body>{page}</body></html>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
