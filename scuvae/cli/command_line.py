"""The parser of all commands, and how an error ends one."""

import argparse
from collections.abc import Sequence
from types import ModuleType

from scuvae import __version__
from scuvae.cli import demo_command, fit_command, model_command, project_command
from scuvae.cli.arguments import subcommand
from scuvae.cli.messages import Terminated, messages, one_line, say, terminable

COMMANDS: dict[str, ModuleType] = {
    "fit": fit_command,
    "project": project_command,
    "model": model_command,
    "demo": demo_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        with terminable(), messages(args.verbose):
            args.run(args)
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except Terminated:
        return say("terminated", 143)
    except Exception as error:
        if args.debug:
            raise
        return say(f"error: {one_line(error)}", 1)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scuvae",
        description="Variational autoencoders for single-cell counts, with or without an encoder.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"scuvae {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add(subcommand(commands, name, command.TEXT, getattr(command, "run", None)))
    return top
