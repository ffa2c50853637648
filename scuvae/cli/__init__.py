"""The command line: ``scuvae fit``, ``project``, ``model``, ``demo``; one file a command.

Flags carry the names of the keyword arguments of ``tl``, and an unset flag is not passed, so
that defaults stand in ``tl`` alone. torch, anndata and scanpy are imported once the arguments
are known to be good: ``--help`` and a mistyped path answer at once.
"""

from scuvae.cli.command_line import main

__all__ = ["main"]
