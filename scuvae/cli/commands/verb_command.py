"""``scuvae VERB``: read, call one function of ``tl`` or ``pp``, write."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from scuvae._launched import launched, number_of_processes
from scuvae.cli.arguments import passed_on
from scuvae.cli.files import (
    checked_output,
    files_of,
    opened,
    read,
    read_slots,
    reading,
    unclobbered,
    write_text,
)
from scuvae.cli.parsers import runs, subcommand
from scuvae.cli.paths import data_path, json_path, reference_path, source_path, table_path
from scuvae.cli.verbs import Verb


def add(commands: Any, name: str, verb: Verb) -> None:
    reference = "--reference FILE " if verb.reads == "reference" else ""
    output = "{-o FILE | --table FILE}" if verb.table else "-o FILE"
    several = verb.calls == "tl.fit"
    words = f"INPUT {'[INPUT ...] ' * several}{reference}{output} [flags]"
    sub = subcommand(commands, name, verb.text, words)
    text = ".h5ad or .zarr; never written to"
    if several:
        text += ". Several, a folder of them, or a collection of annbatch's are one data set"
        sub.add_argument("input", type=source_path, nargs="+", metavar="INPUT", help=text)
    else:
        sub.add_argument("input", type=data_path, metavar="INPUT", help=text)
    if verb.reads == "reference":
        models = verb.calls == "tl.project"  # the others need the reference's cells
        kinds = reference_path if models else data_path
        text = f"the file with the fit: .h5ad, .zarr{' or a model file, .scuvae' * models}"
        sub.add_argument("--reference", type=kinds, required=True, metavar="FILE", help=text)
    if several:
        text = "add the cells to the fit in this file: .h5ad, .zarr or a model file, .scuvae"
        sub.add_argument(
            "--reference", type=reference_path, default=None, metavar="FILE", help=text
        )
    files = sub.add_argument_group("files")
    text = ".h5ad or .zarr; if it exists, replaced once the new one is complete"
    files.add_argument(
        "-o", "--output", type=data_path, required=not verb.table, metavar="FILE", help=text
    )
    if verb.table:
        what = {"genes": "the means of --genes", "groups": "the genes of all groups"}[verb.table]
        text = f"{what} as .csv or .tsv" + (
            ", beside -o or in its place" if verb.table == "groups" else ""
        )
        files.add_argument("--table", type=table_path, default=None, metavar="FILE", help=text)
        sub.set_defaults(output=None)
    add_json(files)
    add_no_clobber(files)
    text = "leave matrices on disk and read them as needed; inputs of 1 GB and more are by default"
    files.add_argument("--backed", action="store_true", default=False, help=text)
    for title, flags in verb.flags.items():
        group = sub.add_argument_group(title)
        for argument, flag in flags.items():
            flag.add(group, argument)
    runs(sub, run)
    sub.set_defaults(verb=verb)


def add_json(group: Any) -> None:
    text = "what was done, how the fit is and how it went, as .json"
    group.add_argument("--json", type=json_path, default=None, metavar="FILE", help=text)


def add_no_clobber(group: Any) -> None:
    text = "an output that exists is an error, and stays as it is"
    group.add_argument("--no-clobber", action="store_true", default=False, help=text)


def run(args: argparse.Namespace) -> None:
    verb: Verb = args.verb
    if isinstance(args.input, list):
        sources, found = args.input, files_of(args.input)
        args.input = found if len(found) > 1 else found[0]
    else:
        sources = [args.input]
    # Elsewhere it is no file, but a group of cells.
    reference = None if verb.reads == "fit" else args.reference
    arguments = passed_on(args, [name for name, _ in verb.all_flags()])
    if verb.calls == "tl.fit":
        number, size = launched()
        number_of_processes(arguments.get("processes"))  # said before the file is read
        if number and size > 1:  # the first one writes, and says what would be done
            if not args.dry_run:
                beside = {} if reference is None else {"reference": _reference(reference)}
                function_of(verb.calls)(reading(args), **beside, **arguments)
            return
    if verb.table == "genes":
        _check_table_of_genes(args, arguments)
    elif verb.table and args.output is None and args.table is None:
        raise ValueError("name an output: -o FILE, --table FILE or both")
    inputs = sources if reference is None else [*sources, reference]
    targets = {
        name: checked_output(path, *inputs)
        for name, path in (
            ("output", args.output),
            ("table", getattr(args, "table", None)),
            ("json", args.json),
        )
        if path is not None
    }
    unclobbered(args, targets)
    function = function_of(verb.calls)
    beside = {} if reference is None else {"reference": _reference(reference)}
    adata, save = _opened(args, targets.get("output"))
    if args.dry_run:
        check_names(adata, verb, arguments)
        print(plan(args, adata, arguments, targets))
        return
    start = perf_counter()
    made = function(adata, **beside, **arguments)
    seconds = perf_counter() - start
    unclobbered(args, targets)
    if "table" in targets:
        table = made if verb.table == "genes" else _groups(adata, arguments.get("key_added"))
        write_table(table, targets["table"])
    if "output" in targets:
        save(adata, targets["output"])
    if "json" in targets:
        from scuvae.cli.report import report

        write_text(report(args, adata, arguments, seconds), targets["json"])


def function_of(name: str) -> Callable[..., Any]:
    import scuvae

    part, function = name.split(".")
    found: Callable[..., Any] = getattr(getattr(scuvae, part), function)
    return found


def _reference(path: Path) -> Any:
    # A model file is read by tl, under the name of --key.
    return path if path.suffix == ".scuvae" else read(path)


def _opened(args: argparse.Namespace, output: Path | None) -> Any:
    """The input, and what writes it with the results: a large one's matrices stay on disk."""
    if output is not None:
        return opened(args, output, fitted=args.verb.reads == "fit")
    return read_slots(args), None


def _check_table_of_genes(args: argparse.Namespace, arguments: dict[str, Any]) -> None:
    if ("genes" in arguments) != (args.table is not None):
        raise ValueError("--genes and --table go together: some genes are written as a table")
    if (args.output is None) == (args.table is None):
        raise ValueError(
            "name one output: -o FILE for all genes, or --genes FILE --table FILE for some"
        )
    if "genes" in arguments and "scale" in arguments:
        raise ValueError("--scale writes two matrices: leave out --genes, and name -o FILE")


def _groups(adata: Any, key: str | None) -> Any:
    import scanpy as sc

    slot = "rank_genes_groups" if key is None else key
    table = sc.get.rank_genes_groups_df(adata, None, key=slot)
    found = adata.uns[slot]
    if "group" not in table:  # scanpy leaves it out where there is one
        table.insert(0, "group", found["names"].dtype.names[0])
    for name in ("prob_de", "lfsr", "expected_fdr"):
        values = {group: found[name][group] for group in found[name].dtype.names}
        table[name] = [v for group in values for v in values[group]]
    return table


def write_table(table: Any, target: Path) -> None:
    separator = "\t" if target.suffix == ".tsv" else ","
    index = table.index.dtype.kind not in "iu"  # cells have names, rows of a list have numbers
    write_text(table.to_csv(sep=separator, index=index), target)


def check_names(adata: Any, verb: Verb, arguments: dict[str, Any]) -> None:
    """Raise unless the columns and layers that flags name are there, and the fit."""
    from scuvae._errors import near

    for name, flag in verb.all_flags():
        if flag.slot is None or name not in arguments:
            continue
        value = arguments[name]
        known = getattr(adata, flag.slot).keys()
        for one in [value] if isinstance(value, str) else value:
            if one not in known:
                raise ValueError(f"adata.{flag.slot} has no {one!r}. {near(one, known)}")
    if verb.reads == "fit":
        from scuvae.io.fit_state import read_entry

        read_entry(adata, arguments.get("key"))


def plan(
    args: argparse.Namespace, adata: Any, arguments: dict[str, Any], targets: dict[str, Path]
) -> str:
    said = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    rows = [("calls", f"{args.verb.calls}({said})"), ("reads", _shape(args.input, adata))]
    if args.verb.reads != "fit" and args.reference is not None:
        rows.append(("reference", str(args.reference)))
    for name, target in targets.items():
        there = ", which exists and would be replaced" if os.path.lexists(target) else ""
        rows.append(("writes", f"{getattr(args, name)}{there}"))
    rows.append(("adds", args.verb.adds))
    text = "\n".join(f"{name:<10} {value}" for name, value in rows)
    return f"{text}\ndry run: nothing was computed or written"


def _shape(path: Path | list[Path], adata: Any) -> str:
    what = f"{len(path)} files, {path[0]} ..." if isinstance(path, list) else path
    return f"{what}: {adata.n_obs:,} cells x {adata.n_vars:,} genes"
