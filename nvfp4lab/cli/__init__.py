"""The command line: `nvfp4lab COMMAND`, a module a command.

Each module has one `add` that describes the command's arguments and one `run` that carries it out;
to add a command, write the two and name the module in COMMANDS. What a command needs is imported
inside `run`, so that `--help` is quick. Exit codes: 0 done, 1 the work failed, 2 it could not be
started as asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nvfp4lab.cli import bench, capture, identify, report, study, sweep
from nvfp4lab.cli.command import CommandError, say

COMMANDS = (study, capture, sweep, report, identify, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="nvfp4lab", description="What it costs to stage MoE activations in NVFP4."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        say(f"nvfp4lab: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnvfp4lab: interrupted", file=sys.stderr)
        return 130
