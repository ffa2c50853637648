"""Cells of a donor whom the fit has not seen: labels, novelty and time, against having fitted them.

For each donor in turn: a fit of the other donors' cells, the donor's cells projected with
``new_batches="estimate"`` and labelled; and a fit of all, in which the donor's cells are labelled
by the other donors'. Accuracy of labels, held-out ELBO's kin (the donor's ELBO), and CPU seconds.

    python tests/benchmarks/new_donor.py FILE.h5ad [--cells 1500] [--donors 3]
"""

import argparse
import time
import warnings

import anndata as ad
import numpy as np
import torch

from scuvae import tl


def seconds(call, *args, **options) -> float:
    start = time.process_time()
    call(*args, **options)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--batch", default="batch")
    parser.add_argument("--labels", default="cell_type")
    parser.add_argument("--cells", type=int, default=1500)
    parser.add_argument("--of-donor", type=int, default=150)
    parser.add_argument("--donors", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(args.file)
    rng = np.random.default_rng(0)
    batch = adata.obs[args.batch].astype(str).to_numpy()
    names = np.unique(batch)
    print("donor  n  s_fit  s_estimate  s_known  acc_new  acc_part  acc_as_known  novel  elbo_gain")
    for name in names[rng.permutation(len(names))[: args.donors]]:
        others, own = (rng.permutation(np.flatnonzero(m)) for m in (batch != name, batch == name))
        old = adata[np.sort(others[: args.cells])].copy()
        new = adata[np.sort(own[: args.of_donor])].copy()
        fit = seconds(tl.fit, old, batch_key=args.batch, progress=False)
        known = new.copy()
        known.obs[args.batch] = old.obs[args.batch].iloc[0]
        as_known = seconds(tl.project, known, old)
        estimate = seconds(tl.project, new, old, new_batches="estimate")
        tl.transfer_labels(new, old, labels=args.labels)
        tl.transfer_labels(known, old, labels=args.labels)
        tl.novelty(new, old)
        for cells in (new, known):
            tl.score(cells, n_samples=10)
        everyone = ad.concat([old, new])
        tl.fit(everyone, batch_key=args.batch, progress=False)
        part = everyone[everyone.obs[args.batch].astype(str) == name].copy()
        mine = (everyone.obs[args.batch].astype(str) == name).to_numpy()
        labels = everyone.obs[args.labels].astype(object)
        everyone.obs[args.labels] = labels.where(~mine, None).astype("category")
        tl.transfer_labels(part, everyone, labels=args.labels)

        def accuracy(cells: ad.AnnData) -> float:
            truth = cells.obs[args.labels].astype(str)
            return float((cells.obs["scuvae_label"].astype(str) == truth).mean())

        gain = float(new.obs["scuvae_elbo"].mean() - known.obs["scuvae_elbo"].mean())
        novel = float((new.obs["scuvae_novelty"] > 1).mean())
        print(
            f"{name}  {new.n_obs}  {fit:.1f}  {estimate:.1f}  {as_known:.1f}  {accuracy(new):.3f}  "
            f"{accuracy(part):.3f}  {accuracy(known):.3f}  {novel:.2f}  {gain:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
