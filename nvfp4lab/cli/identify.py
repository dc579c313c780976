"""nvfp4lab identify: a kernel's decisions, from its input and output in two files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nvfp4lab.cli.command import CommandError


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
    from safetensors import SafetensorError, safe_open

    from nvfp4lab import diagnose

    def read(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict:
        try:
            with safe_open(path, "pt") as file:
                if missing := [key for key in required if key not in file.keys()]:  # noqa: SIM118
                    there = ", ".join(file.keys())
                    raise CommandError(f"{path} has no {' and no '.join(missing)}; it has {there}")
                there = [*required, *(key for key in optional if key in file.keys())]  # noqa: SIM118
                if unread := sorted(set(file.keys()) - {*required, *optional}):
                    print(f"nvfp4lab: {path}: not read: {', '.join(unread)}", file=sys.stderr)
                return {key: file.get_tensor(key) for key in there}
        except (OSError, SafetensorError) as error:
            raise CommandError(
                f"{path} is no safetensors file that can be read: {error}"
            ) from error

    hidden = read(args.input, ("hidden",))["hidden"]
    written = read(args.output, ("codes", "scales"), ("outer",))
    try:
        found = diagnose.identify(hidden, **written)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(found.to_json() if args.json else found)
    return 0 if found.explained else 1
