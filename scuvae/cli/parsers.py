"""Parsers of commands, and what they say of a word that they do not know."""

import argparse
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """One that guesses which flag or command was meant."""

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(message + self._guess(message))

    def _guess(self, message: str) -> str:
        """What is near to the flags that are not known, or to the command that is not."""
        choice = re.match(r"argument \w+: invalid choice: '([^']*)'", message)
        if choice:
            commands = [
                name
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
                for name in action.choices
            ]
            return _meant(choice[1], commands)
        known = self._option_string_actions
        flags = [word.split("=")[0] for word in self.words if word.startswith("--")]
        return "".join(_meant(flag, known) for flag in flags if flag not in known)


def _meant(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; {word}: did you mean {close[0]}?" if close else ""


def unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    """End for words that no parser took; ``parser`` is the command's own."""
    if isinstance(parser, Parser):
        parser.words = list(words)
    parser.error(f"unrecognized arguments: {' '.join(words)}")


def subcommand(commands: Any, name: str, text: str, usage: str = "") -> argparse.ArgumentParser:
    """The parser of a command; ``usage`` is what its words must be."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if usage:
        sub.usage = f"{sub.prog} {usage}"
    return sub


def runs(sub: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Give a command the flags of all, and ``run`` for main to call."""
    every = sub.add_argument_group("of every command")
    every.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what is done; twice for more"
    )
    every.add_argument(
        "--debug", action="store_true", default=False, help="show the traceback of an error"
    )
    text = "threads at most (default: what torch, numba and BLAS take)"
    every.add_argument("--threads", type=_positive, default=None, metavar="N", help=text)
    text = "say what would be read, called and written; compute and write nothing"
    every.add_argument("--dry-run", action="store_true", default=False, help=text)
    sub.set_defaults(run=run, parser=sub, command=sub.prog.partition(" ")[2])


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)
