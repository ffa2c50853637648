"""Mistakes planted in a copy of the package, one after another: which do the tests catch?

``python tests/mutations.py [--only WORDS] [--list]``. Each mistake is a replacement of text that
occurs once in a file; the tests named beside it, run on the copy, must fail. What is heavy is
imported once; every mistake then has a process of its own, so that all take some minutes.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "scuvae"
# Seconds after which a mistake counts as noticed: its test no longer ends.
LONGEST = 600


@dataclass(frozen=True)
class Mistake:
    """``old`` becomes ``new`` in a file of the package; ``tests`` are arguments of pytest."""

    what: str
    file: str
    old: str
    new: str
    tests: str


IN, EV = "inference", "inference/evaluation"
HELD_OUT, WIDTHS = "test_held_out_cells.py", "test_widths.py"
# The eleven sorts that survived once: what is held out, and what is wide.
SURVIVED = [
    Mistake(
        "held-out cells are trained on",
        f"{IN}/training/fit.py",
        "np.flatnonzero(~held_out), device=where)",
        "np.arange(len(held_out)), device=where)",
        f"{HELD_OUT} -k learn",
    ),
    Mistake(
        "novelty is calibrated on training cells",
        "tl/_novelty.py",
        '(reference.obs[slot] == "validation").to_numpy()',
        '(reference.obs[slot] == "train").to_numpy()',
        f"{HELD_OUT} -k calibrated",
    ),
    Mistake(
        "an encoder is distilled on held-out cells",
        "tl/_to_encoder.py",
        "np.flatnonzero(held_out & useful), np.flatnonzero(~held_out & useful)",
        "np.flatnonzero(held_out & useful), np.flatnonzero(useful)",
        f"{HELD_OUT} -k distilled",
    ),
    Mistake(
        "unequal candidate pools in novelty",
        "tl/_novelty.py",
        "generator.choice(len(cells), pool, replace=False) for cells in (new, old)",
        "np.arange(len(cells)) for cells in (new, old)",
        f"{HELD_OUT} -k candidates",
    ),
    Mistake(
        "the KL's weight is lost in the last refinement",
        f"{IN}/training/fit.py",
        "local_step=settings.local_step, kl_weight=settings.kl_weight\n",
        "local_step=settings.local_step\n",
        f"{WIDTHS} -k weight",
    ),
    Mistake(
        "effective sample size by perplexity",
        f"{EV}/importance_sampling.py",
        "1 / draws.log_weight.softmax(0).square().sum(0)",
        "(-(draws.log_weight.softmax(0) * draws.log_weight.log_softmax(0)).sum(0)).exp()",
        f"{WIDTHS} -k kish",
    ),
    Mistake(
        "annealed moves are all accepted",
        f"{EV}/annealed_importance_sampling.py",
        "uniform_like(energy).log() < energy - new_energy",
        "new_energy.isfinite()",
        f"{WIDTHS} -k move",
    ),
    Mistake(
        "tl.sample decodes the mean",
        "tl/_sample.py",
        "model.decoder(q.draw(normal_like(q.mean)), batch.covariates)",
        "model.decoder(q.mean, batch.covariates)",
        f"{WIDTHS} -k samples_are",
    ),
    Mistake(
        "a predictive check without the spread between draws",
        "tl/_predictive.py",
        "(within + between) / len(z)",
        "within / len(z)",
        f"{WIDTHS} -k predictive",
    ),
    Mistake(
        "overdispersion times f in place of f²",
        f"{IN}/mapping/neighbour_residuals.py",
        "over * factor.square()",
        "over * factor",
        f"{WIDTHS} -k overdispersion",
    ),
    Mistake(
        "units are dropped at evaluation",
        "model/decoder.py",
        "self.dropout if self.training else 0.0",
        "self.dropout",
        f"{HELD_OUT} -k drops",
    ),
    Mistake(
        "held-out cells are judged in training mode",
        f"{IN}/training/loop.py",
        "            model.eval()\n            value = judge",
        "            value = judge",
        f"{HELD_OUT} -k without_dropout",
    ),
]
FORMULAS = [
    Mistake(
        "the KL of a Gaussian has +L (the seed's slip)",
        "model/priors/standard_normal.py",
        "mean.square().sum(-1) - mean.shape[-1] - 2 * q.log_det",
        "mean.square().sum(-1) + mean.shape[-1] - 2 * q.log_det",
        "test_objectives.py test_priors.py",
    ),
    Mistake(
        "the KL without the mean",
        "model/priors/standard_normal.py",
        "(trace + mean.square().sum(-1) - ",
        "(trace - ",
        "test_objectives.py test_priors.py",
    ),
    Mistake(
        "log density of z without 2π",
        "model/priors/standard_normal.py",
        " - 0.5 * z.shape[-1] * math.log(2 * math.pi)",
        "",
        "test_priors.py test_objectives.py test_ledger.py",
    ),
    Mistake(
        "the prior pulls outwards",
        "model/priors/standard_normal.py",
        "return -q.mean",
        "return q.mean",
        "test_refine.py",
    ),
    Mistake(
        "log determinant halved",
        "distributions/gaussian.py",
        "return diagonal.log().sum(-1)",
        "return 0.5 * diagonal.log().sum(-1)",
        "test_objectives.py test_priors.py",
    ),
    Mistake(
        "log q without the determinant",
        "distributions/gaussian.py",
        "(points.square() + _LOG_2PI).sum(-1) - self.log_det",
        "(points.square() + _LOG_2PI).sum(-1)",
        "test_ledger.py",
    ),
    Mistake(
        "marginal variance from the diagonal of C alone",
        "distributions/gaussian.py",
        "self.factor.square().sum(-1) if self.full",
        "self.factor.diagonal(dim1=-2, dim2=-1).square() if self.full",
        "test_latent.py test_refine.py test_fit.py",
    ),
    Mistake(
        "draws by Cᵀ",
        "distributions/gaussian.py",
        "(self.factor @ points.unsqueeze(-1)).squeeze(-1)",
        "(self.factor.mT @ points.unsqueeze(-1)).squeeze(-1)",
        "test_sample.py test_objectives.py test_ledger.py test_refine.py",
    ),
    Mistake(
        "importance weights without ln q",
        f"{EV}/importance_sampling.py",
        "log_likelihood + prior - log_q",
        "log_likelihood + prior",
        "test_ledger.py",
    ),
    Mistake(
        "the bound is not divided by the draws",
        f"{EV}/importance_sampling.py",
        "log_weight.logsumexp(0) - math.log(len(log_weight))",
        "log_weight.logsumexp(0)",
        "test_ledger.py",
    ),
    Mistake(
        "standard errors not divided by √n",
        f"{EV}/importance_sampling.py",
        "terms.std(0) / math.sqrt(len(terms))",
        "terms.std(0)",
        "test_ledger.py",
    ),
    Mistake(
        "a reported ELBO adds the KL",
        f"{EV}/importance_sampling.py",
        "reconstruction - draws.kl",
        "reconstruction + draws.kl",
        "test_ledger.py test_widths.py",
    ),
    Mistake(
        "annealing weighs one step too little",
        f"{EV}/annealed_importance_sampling.py",
        "range(1, n_anneal + 2)",
        "range(1, n_anneal + 1)",
        "test_ledger.py",
    ),
    Mistake(
        "negative binomial variance μ + μ/θ",
        "model/likelihoods/negative_binomial.py",
        "mu * (1 + mu * inverse_theta(self.log_theta[genes]))",
        "mu * (1 + inverse_theta(self.log_theta[genes]))",
        "test_likelihoods.py",
    ),
    Mistake(
        "its Fisher weight is the mean",
        "model/likelihoods/negative_binomial.py",
        "mu.div_(1 + mu * inverse_theta(self.log_theta[genes]))",
        "mu",
        "test_likelihoods.py",
    ),
    Mistake(
        "its chance of a zero without θ",
        "model/likelihoods/negative_binomial.py",
        "-log_theta.exp() * (mu * inverse_theta(log_theta)).log1p()",
        "-(mu * inverse_theta(log_theta)).log1p()",
        "test_likelihoods.py",
    ),
    Mistake(
        "its rate has the shape's mean",
        "model/likelihoods/negative_binomial.py",
        "mu * (gamma(theta.expand_as(mu)) / theta)",
        "mu * gamma(theta.expand_as(mu))",
        "test_likelihoods.py test_sample.py",
    ),
    Mistake(
        "variance-stabilising root without 2",
        "model/likelihoods/negative_binomial.py",
        "return 2 * (mu.sqrt() * root).asinh() / root",
        "return (mu.sqrt() * root).asinh() / root",
        "test_likelihoods.py test_embed.py",
    ),
    Mistake(
        "Poisson's variance-stabilising coordinate",
        "model/likelihoods/poisson.py",
        "2 * mu.sqrt()",
        "mu.sqrt()",
        "test_likelihoods.py test_embed.py",
    ),
    Mistake(
        "Poisson's chance of a zero",
        "model/likelihoods/poisson.py",
        "return (-mu).exp()",
        "return 1 / (1 + mu)",
        "test_likelihoods.py",
    ),
    Mistake(
        "zero inflation is not in the mean",
        "model/likelihoods/zero_inflated_negative_binomial.py",
        "return mu * torch.sigmoid(-self.logit_dropout[genes])",
        "return mu",
        "test_likelihoods.py test_denoise.py",
    ),
    Mistake(
        "zero inflation is not in the variance",
        "model/likelihoods/zero_inflated_negative_binomial.py",
        "(inverse_theta(self.log_theta[genes]) + dropout)\n        return (1 - dropout) * mu",
        "inverse_theta(self.log_theta[genes])\n        return (1 - dropout) * mu",
        "test_likelihoods.py",
    ),
    Mistake(
        "inflated zeros alone",
        "model/likelihoods/zero_inflated_negative_binomial.py",
        "dropout + (1 - dropout) * log_zero",
        "(1 - dropout) * log_zero",
        "test_likelihoods.py",
    ),
    Mistake(
        "a Gaussian's weight is 1/σ",
        "model/likelihoods/gaussian.py",
        "self.scale[genes].square().reciprocal().expand_as(mu)",
        "self.scale[genes].reciprocal().expand_as(mu)",
        "test_likelihoods.py",
    ),
    Mistake(
        "its variance is σ",
        "model/likelihoods/gaussian.py",
        "self.scale[genes].square().expand_as(mu)",
        "self.scale[genes].expand_as(mu)",
        "test_likelihoods.py test_widths.py",
    ),
    Mistake(
        "softmax slopes that do not sum to zero",
        "model/likelihoods/link.py",
        "slope.addcmul_(pi, total, value=-1)",
        "slope",
        "test_likelihoods.py",
    ),
    Mistake(
        "logsumexp without the largest",
        "model/likelihoods/link.py",
        "eta.amax(-1) - pi.amax(-1).log()",
        "-pi.amax(-1).log()",
        "test_likelihoods.py",
    ),
    Mistake(
        "a missing gene's share is not taken off",
        "model/vae.py",
        "batch.size_factor * share.exp()",
        "batch.size_factor",
        "test_project_genes.py test_project.py",
    ),
    Mistake(
        "curvature is not centred for the softmax",
        "model/vae.py",
        "return jacobian_gram(tangent, weight, fisher, shift)",
        "return jacobian_gram(tangent, weight, fisher, None)",
        "test_likelihoods.py test_refine.py test_networks.py",
    ),
    Mistake(
        "minibatch gradients are not scaled by n/B",
        f"{IN}/training/step.py",
        "weight = self.n_obs / len(batch)",
        "weight = 1.0",
        "test_objectives.py test_train.py",
    ),
    Mistake(
        "the weights' prior is left out",
        f"{IN}/training/step.py",
        "output.grad.addcmul_(output.detach(), self.output_precision)",
        "pass",
        "test_train.py test_fit.py test_networks.py",
    ),
    Mistake(
        "natural steps take the prior twice",
        f"{IN}/refinement/natural_gradient.py",
        "slopes.mean(0) / kl_weight + model.prior.slope(q)",
        "slopes.mean(0) / kl_weight + 2 * model.prior.slope(q)",
        "test_refine.py",
    ),
    Mistake(
        "a joint density without its prior",
        f"{IN}/refinement/gauss_newton.py",
        "value / kl_weight + prior.log_prob(mean), slope",
        "value / kl_weight, slope",
        "test_refine.py",
    ),
    Mistake(
        "steps that lower the objective are kept",
        f"{IN}/refinement/gauss_newton.py",
        "better = value >= self.value - slack",
        "better = value >= self.value - 1e9",
        "test_refine.py",
    ),
    Mistake(
        "a totals' shift in the wrong direction",
        f"{IN}/training/gene_totals.py",
        "shift = self.ratio.log().neg()",
        "shift = self.ratio.log()",
        "test_gene_totals.py",
    ),
    Mistake(
        "totals predicted at the means",
        f"{IN}/training/gene_totals.py",
        "model.decoder(q.draw(point), batch.covariates)",
        "model.decoder(q.mean, batch.covariates)",
        "test_gene_totals.py",
    ),
    Mistake(
        "thinned counts keep their size factor",
        "batches/thinning.py",
        "batch.size_factor[:n] * (fewer.sum() / total)",
        "batch.size_factor[:n]",
        "test_thinning.py",
    ),
    Mistake(
        "counts that are not whole are thinned to none",
        "batches/thinning.py",
        "binomial(whole, chance) + chance * (value - whole)",
        "binomial(whole, chance)",
        "test_thinning.py",
    ),
    Mistake(
        "the map is not centred",
        f"{IN}/mapping/embedding.py",
        "basis.total, basis.n_levels) - basis.centre",
        "basis.total, basis.n_levels)",
        "test_embed.py",
    ),
    Mistake(
        "the map's signs are left to chance",
        f"{IN}/mapping/embedding.py",
        "components * signs, total",
        "components, total",
        "test_embed.py",
    ),
    Mistake(
        "neighbours are not weighed by their variance",
        f"{IN}/mapping/neighbour_residuals.py",
        '(float(self.support != "real") + chosen @ self.variance)',
        "1.0",
        "test_neighbour_residuals.py",
    ),
    Mistake(
        "tails without the cell itself left out",
        f"{IN}/mapping/tail_probabilities.py",
        "        if self.itself:\n            weight[torch.arange(len(rows)), rows] = 0.0\n",
        "",
        "test_novelty.py test_depth.py",
    ),
    Mistake(
        "regressions keep the cell itself",
        f"{IN}/mapping/tail_probabilities.py",
        "(score - design @ (inverse @ score)) / (1 - leverage)",
        "(score - design @ (inverse @ score))",
        "test_novelty.py test_depth.py",
    ),
]
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
        "io/covariates.py",
        "return alike[0] if len(alike) == 1 else None",
        "return None",
        "test_catalogue_names.py test_covariates.py -k level",
    ),
    Mistake(
        "a second fit leaves the first's slots",
        "tl/_fit.py",
        "    keys.clear(out)\n",
        "",
        "test_fit.py -k replaces",
    ),
    Mistake(
        "the split is the other way round",
        "tl/_fit.py",
        'np.where(held_out, "validation", "train")',
        'np.where(held_out, "train", "validation")',
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
        "test_fit.py",
    ),
    Mistake(
        "random numbers from the global state",
        "_random.py",
        "out.normal_(generator=generator_on(values.device))",
        "out.normal_()",
        "test_isolation.py test_fit.py",
    ),
    Mistake(
        "a seed is not used",
        "runtime.py",
        "seed = int(rng) % 2**63",
        "seed = 0",
        "test_fit.py test_isolation.py",
    ),
    Mistake(
        "held-out cells are judged by new draws each time",
        f"{IN}/training/held_out.py",
        "torch.Generator().manual_seed(0)",
        "torch.Generator().manual_seed(torch.seed() % 2**31)",
        "test_train.py test_fit.py",
    ),
    Mistake(
        "gradients stay off where a process has them off",
        "runtime.py",
        "stack.enter_context(torch.enable_grad())",
        "pass",
        "test_isolation.py -k no_gradients",
    ),
    Mistake(
        "counts are fitted as real values without a word",
        "tl/_fit.py",
        "inputs.warn_of_counts_meant(matrix, adata, layer, genes)",
        "pass",
        "test_counts_meant.py",
    ),
]
MISTAKES = [*SURVIVED, *FORMULAS, *SLOTS]


def planted(mistake: Mistake, copy: Path) -> str:
    """Plant it; returned is the file's text as it was."""
    path = copy / "scuvae" / mistake.file
    text = path.read_text(encoding="utf-8")
    if text.count(mistake.old) != 1:
        raise SystemExit(
            f"{mistake.what}: {mistake.file} has {text.count(mistake.old)} such places"
        )
    path.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    return text


def failed(mistake: Mistake, copy: Path) -> bool:
    """Whether its tests fail, in a process of their own."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(TESTS)]
            signal.alarm(LONGEST)
            files = [f"{TESTS / w}" if w.endswith(".py") else w for w in mistake.tests.split()]
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                import pytest

                status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files]))
        finally:
            os._exit(status)
    _, state = os.waitpid(child, 0)
    # No tests found, or a broken command line, would be no proof.
    code = os.waitstatus_to_exitcode(state)
    if code > 1:
        raise SystemExit(f"{mistake.what}: pytest ended with {code}")
    return code != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mistakes that are called so")
    parser.add_argument("--list", action="store_true", help="check that all can be planted")
    args = parser.parse_args()
    chosen = [m for m in MISTAKES if args.only in m.what]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / "scuvae", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(TESTS.parent / "pyproject.toml", copy)
        # Compiled code of files that are not touched is made once.
        os.environ["NUMBA_CACHE_DIR"] = str(copy / "compiled")
        os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
        import anndata  # noqa: F401
        import scanpy  # noqa: F401
        import torch

        torch.set_num_threads(1)  # a forked process has no others
        survived = []
        for mistake in chosen:
            start = time.monotonic()
            text = planted(mistake, copy)
            try:
                caught = True if args.list else failed(mistake, copy)
            finally:
                path = copy / "scuvae" / mistake.file
                path.write_text(text, encoding="utf-8")
            seconds = time.monotonic() - start
            print(
                f"{'caught' if caught else 'SURVIVED':9}{seconds:6.0f} s  {mistake.what}",
                flush=True,
            )
            if not caught:
                survived.append(mistake.what)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught; survived: {survived or 'none'}")


if __name__ == "__main__":
    main()
