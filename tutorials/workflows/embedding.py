"""A UMAP of the fit's neighbour graph, clusters where no column of groups is named, a picture.

python embedding.py INPUT OUTPUT PICTURE GROUPS
"""

import sys

import anndata
import matplotlib
import scanpy as sc

matplotlib.use("Agg")


def main(source: str, target: str, picture: str, groups: str) -> None:
    adata = anndata.read_h5ad(source)
    sc.tl.umap(adata, random_state=0)
    if not groups:
        groups = "leiden"
        sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    figure = sc.pl.umap(adata, color=groups, show=False, return_fig=True)
    figure.savefig(picture, dpi=150, bbox_inches="tight")
    adata.write_h5ad(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
