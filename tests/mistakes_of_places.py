"""The mistakes that ``mutations.py`` plants: of slots, names, alignment and random numbers."""

from mistakes import IN, Mistake

SLOTS = [
    Mistake(
        "genes by position",
        "io/genes.py",
        "columns = None if same else position[found]",
        "columns = None if same else np.flatnonzero(found)",
        "test_project.py test_project_genes.py",
    ),
    Mistake(
        "columns spread over the wrong genes",
        "io/genes.py",
        "columns[matrix.indices], matrix.indptr)",
        "matrix.indices, matrix.indptr)",
        "test_project_genes.py",
    ),
    Mistake(
        "a mask's Series by position",
        "io/inputs.py",
        "values = _by_gene(adata, mask_var)",
        "values = mask_var",
        "test_catalogue_names.py -k mask",
    ),
    Mistake(
        "levels by their text alone",
        "_adata.py",
        "return alike[0] if len(alike) == 1 else None",
        "return None",
        "test_catalogue_names.py test_covariates.py -k level",
    ),
    Mistake(
        "a second fit leaves the first's slots",
        "tl/_fit_slots.py",
        "        keys.clear(out)\n",
        "",
        "test_fit.py -k replaces",
    ),
    Mistake(
        "the split is the other way round",
        "tl/_fit_slots.py",
        'held_out.astype(np.int8), ["train", "validation"]',
        'held_out.astype(np.int8), ["validation", "train"]',
        "test_fit.py test_held_out_cells.py",
    ),
    Mistake(
        "scales are written as variances",
        "distributions/gaussian.py",
        "return self.variance.sqrt() if self.full else self.factor",
        "return self.variance if self.full else self.factor",
        "test_fit.py test_refine.py",
    ),
    Mistake(
        "digests are not compared",
        "io/fit_state.py",
        "        manifest.check(written, settings, arrays, where)\n",
        "        pass\n",
        "test_fits_read_back.py -k changed",
    ),
    Mistake(
        "held-out cells depend on the seed of the process",
        f"{IN}/training/held_out.py",
        "np.random.default_rng(0).permutation",
        "np.random.default_rng().permutation",
        "test_fit.py -k same_seed",
    ),
    Mistake(
        "random numbers from the global state",
        "_random.py",
        "out.normal_(generator=generator_on(values.device))",
        "out.normal_()",
        "test_fit.py -k seed",
    ),
    Mistake(
        "a seed is not used",
        "runtime.py",
        "seed = int(rng) % 2**63",
        "seed = 0",
        "test_isolation.py -k each_seed",
    ),
    Mistake(
        "held-out cells are judged by new draws each time",
        f"{IN}/training/held_out.py",
        "torch.Generator().manual_seed(0)",
        "torch.Generator().manual_seed(torch.seed() % 2**31)",
        "test_fit.py -k same_seed",
    ),
    Mistake(
        "gradients stay off where a process has them off",
        "runtime.py",
        "stack.enter_context(torch.enable_grad())",
        "pass",
        "test_isolation.py -k gradients",
    ),
    Mistake(
        "counts are fitted as real values without a word",
        "tl/_fit.py",
        "inputs.warn_of_counts_meant(matrix, seen, layer, genes)",
        "pass",
        "test_counts_meant.py",
    ),
]
