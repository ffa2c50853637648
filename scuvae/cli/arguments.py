"""Flags: what a verb's keyword arguments are called, take and mean on the command line.

A flag carries the name of its argument, and arguments of one name mean the same in every verb:
:data:`FLAGS` has each once, and a verb's table (:mod:`scuvae.cli.verbs`) names those that it takes.
A test compares these tables with the verbs' own signatures.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scuvae.cli.paths import lines


@dataclass(frozen=True)
class Flag:
    """``takes`` makes an argument's value of a word; None: the flag stands for ``stands_for``.

    ``slot``: the part of AnnData in which there has to be what the flag names.
    """

    text: str
    takes: Callable[[str], Any] | None = str
    metavar: str | None = None
    slot: str | None = None
    stands_for: bool = True
    name: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, group: Any, argument: str) -> None:
        flag = self.name or f"--{argument.replace('_', '-')}"
        if self.takes is None:
            action = "store_true" if self.stands_for else "store_false"
            flags = [flag if self.stands_for else f"--no-{flag.removeprefix('--')}"]
            if argument == "progress":
                flags.insert(0, "-q")
            group.add_argument(*flags, dest=argument, action=action, help=self.text)
            return
        words = {"type": self.takes, "metavar": self.metavar, **self.more}
        group.add_argument(flag, dest=argument, help=self.text, **words)


def column(text: str, slot: str = "obs") -> Flag:
    return Flag(text, str, "COLUMN", slot)


def needed(flag: Flag) -> Flag:
    """Of an argument without a default."""
    return replace(flag, more={**flag.more, "required": True})


def columns(text: str) -> Flag:
    return Flag(text, str, "COLUMN", "obs", more={"nargs": "+", "action": "extend"})


def number(text: str, metavar: str = "N") -> Flag:
    return Flag(text, int, metavar)


def fraction(text: str, metavar: str = "F") -> Flag:
    return Flag(text, float, metavar)


def word(text: str, metavar: str = "NAME") -> Flag:
    return Flag(text, str, metavar)


def switch(text: str) -> Flag:
    """``--x`` passes ``x=True``."""
    return Flag(text, None)


def switch_off(text: str) -> Flag:
    """``--no-x`` passes ``x=False``."""
    return Flag(text, None, stands_for=False)


def pairs(text: str) -> Flag:
    return Flag(text, _pair, "NAME=VALUE", more={"nargs": "+", "action": _Pairs})


class _Pairs(argparse.Action):
    """Stores NAME=VALUE words as a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | dict(values))


def _pair(text: str) -> tuple[str, str | float]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE, such as sex=F or age=40")
    try:
        return name, float(value)
    except ValueError:
        return name, value


class One(argparse.Action):
    """Stores a single word as it is, several as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else list(values))


class Some(argparse.Action):
    """Stores words as a list, but the single word ``all`` as it is."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, "all" if values == ["all"] else list(values))


def one_or_more(text: str, metavar: str) -> Flag:
    return Flag(text, str, metavar, more={"nargs": "+", "action": One})


def some_or_all(text: str, metavar: str) -> Flag:
    return Flag(text, str, metavar, more={"nargs": "+", "action": Some})


FLAGS: dict[str, Flag] = {
    "key": word("the fit to use, where there are several", "KEY"),
    "key_added": word("name of the slots written (default: scuvae, X_scuvae, ...)", "KEY"),
    "layer": Flag("layer with the counts (default: that of the fit; of a new fit X)", str, "NAME",
                  "layers"),
    "genes": Flag("text file with names of genes, one a line (default: all)", lines, "FILE"),
    "covariance": word("full or diagonal: of a cell's posterior", "KIND"),
    "local_step": word("natural or gradient: how a cell's posterior is updated"),
    "max_steps": number("local steps at most"),
    "max_epochs": number("stop after so many passes over the cells"),
    "batch_size": number("cells in a batch"),
    "learning_rate": fraction("step size of the optimizer"),
    "n_samples": number("draws per cell: more take longer and vary less"),
    "n_reference": number("reference cells at most; of more, so many drawn at random"),
    "polish": Flag(
        "further steps on each posterior; with the word moments, then its moments as they are",
        str,
        "moments",
        more={"nargs": "?", "const": True},
    ),
    "device": word("auto, cpu, cuda or mps"),
    "rng": number("seed of all draws", "SEED"),
    "progress": switch_off("no progress bar, and no lines in its place"),
}  # fmt: skip


def choose(names: Sequence[str], own: dict[str, Flag]) -> dict[str, Flag]:
    """The flags of some arguments: a verb's ``own``, or what is said of all."""
    return {name: own.get(name) or FLAGS[name] for name in names}


def passed_on(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of a verb's arguments that were given: defaults stand in the verb alone."""
    return {name: value for name, value in vars(args).items() if name in names}
