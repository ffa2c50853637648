"""The parser of all commands, and how an error ends one."""

import argparse
from collections.abc import Sequence

import scuvae.cli.commands.demo_command as demo_command
import scuvae.cli.commands.model_command as model_command
import scuvae.cli.commands.plot_command as plot_command
import scuvae.cli.commands.verb_command as verb_command
from scuvae import __version__
from scuvae.cli.messages import located, messages, say
from scuvae.cli.parsers import Parser, subcommand, unknown
from scuvae.cli.signals import Terminated, terminable
from scuvae.cli.thread_limit import use_threads
from scuvae.cli.verbs import CHECKS, VERBS


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    if rest:
        unknown(args.parser, rest)
    try:
        with terminable(), messages(args.verbose), use_threads(args.threads):
            args.run(args)
    except KeyboardInterrupt as error:
        return say(str(error) or "interrupted", 130)
    except Terminated:
        return say("terminated", 143)
    except SystemExit as error:
        if error.code != 143:
            raise
        # After a checkpoint, which a fit answers SIGTERM with.
        return say(f"terminated: the fit goes on from {args.checkpoint}", 143)
    except Exception as error:
        if args.debug:
            raise
        return say(f"error: {located(error, args)}", 1)
    return 0


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="scuvae",
        description="Variational autoencoders for single-cell counts, with or without an encoder.",
        epilog="scuvae COMMAND --help says what each takes. Flags have the names of the arguments "
        "of scuvae's functions.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"scuvae {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, verb in VERBS.items():
        verb_command.add(commands, name, verb)
    text = "check a fit: what it predicts, or how far its intervals can be trusted"
    kinds = subcommand(commands, "check", text).add_subparsers(
        title="checks", required=True, metavar="CHECK"
    )
    for name, verb in CHECKS.items():
        verb_command.add(kinds, name, verb)
    plot_command.add(commands, "plot")
    model_command.add(commands, "model")
    demo_command.add(commands, "demo")
    return top
