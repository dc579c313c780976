"""nvfp4lab identify: a kernel's decisions, from its input and output in two files.

What is found out is `diagnose`'s; here are the two files and the exit code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nvfp4lab.cli.command import CommandError, say


def add(commands: argparse._SubParsersAction) -> None:
    text = "Name the rounding, floors and layout of the kernel that wrote a tensor's FP4 bytes."
    command = commands.add_parser(
        "identify",
        help=text,
        description=text
        + " Exits 0 if one set of decisions, named or not, explains every byte, 1 if none does "
        "or a buffer contradicts it, 2 on bad input.",
    )
    command.add_argument(
        "input", type=Path, metavar="X.safetensors", help="the kernel's input, key `hidden`"
    )
    command.add_argument(
        "output",
        type=Path,
        metavar="Q.safetensors",
        help="what it wrote: keys `codes`, `scales` and, if it has one, `outer`",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the verdict on one kernel's output."""
    from nvfp4lab import diagnose
    from nvfp4lab.records import named, open_safetensors

    def read(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict:
        try:
            with open_safetensors(path) as file:
                keys = set(file.keys())
                if missing := [key for key in required if key not in keys]:
                    there = named(sorted(keys))
                    raise CommandError(f"{path} has no {' and no '.join(missing)}; it has {there}")
                if unread := sorted(keys - {*required, *optional}):
                    say(f"nvfp4lab: {path}: not read: {named(unread)}", sys.stderr)
                chosen = [*required, *(key for key in optional if key in keys)]
                return {key: file.get_tensor(key) for key in chosen}
        except ValueError as error:
            raise CommandError(str(error)) from error

    hidden = read(args.input, ("hidden",))["hidden"]
    written = read(args.output, ("codes", "scales"), ("outer",))
    try:
        found = diagnose.identify(hidden, **written)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    say(found.to_json() if args.json else found)
    return 0 if found.explained else 1
