"""What `sweep` and `report` share: what is measured by which recipes, where it is computed, and the
file that comes of it.

An option of both commands is added here; one of a single command there.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4lab.cli.command import CommandError, check_writable, count, say

if TYPE_CHECKING:
    from nvfp4lab.sweeps import Swept

# What the package can stage, and what DeepSeek V4 stages today.
DEFAULT = ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed", "mxfp8-deepseek-v4")
SLOW_OR_RANDOM = ("nvfp4-search", "nvfp4-stochastic")  # not among `all`


def add_arguments(command: argparse.ArgumentParser, out: str, of_it: str) -> None:
    """out: what the file is called in the usage; of_it: what the file is of the statistics."""
    command.add_argument(
        "shards", nargs="+", metavar="DIR", help="capture folders, or single record files"
    )
    command.add_argument(
        "--recipes",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help="or `all`: every one but nvfp4-search, which is slow, and nvfp4-stochastic "
        f"(default: {' '.join(DEFAULT)})",
    )
    command.add_argument("--out", type=Path, required=True, metavar=out)
    command.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help=f"the full statistics, of which the {out} is {of_it}, and from which the same command "
        "goes on; it stays (default: OUT.statistics)",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=count, metavar="N", help="processes (default: this one)")
    where.add_argument(
        "--dask", metavar="ADDRESS", help="of a scheduler whose workers see the same files"
    )


def recipes_of(args: argparse.Namespace) -> list[str]:
    """The names that --recipes gives, all of them known."""
    from nvfp4lab import catalogue

    names = list(args.recipes)
    if names == ["all"]:
        return [name for name in catalogue.recipes() if name not in SLOW_OR_RANDOM]
    try:
        return [catalogue.recipe(name).name for name in names]
    except ValueError as error:
        raise CommandError(str(error)) from error


def state_of(args: argparse.Namespace) -> Path:
    return args.state or args.out.with_name(args.out.name + ".statistics")


def check_out(args: argparse.Namespace) -> None:
    """Before hours of work: --out can be written, and is no file of the captures themselves."""
    from nvfp4lab import records

    check_writable("--out", args.out)
    if not args.out.exists():
        return
    for shard in map(Path, args.shards):
        try:
            measured = [*records.record_files(shard), shard / records.CAPTURE_FILE]
        except (OSError, ValueError):
            continue  # the sweep names what it cannot read
        if any(file.exists() and args.out.samefile(file) for file in measured):
            raise CommandError(f"--out {args.out} is a file of the capture {shard}, not replaced")


def executor_of(args: argparse.Namespace, stack: contextlib.ExitStack):
    """None, or what --workers or --dask ask for, until the stack is left."""
    from nvfp4lab import sweeps

    if args.workers is not None:
        pool = sweeps.processes(args.workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        return pool
    if args.dask is None:
        return None
    try:
        from distributed import Client
    except ImportError:
        raise CommandError("--dask needs distributed: pip install 'nvfp4lab[dask]'") from None
    try:
        client = stack.enter_context(Client(args.dask, timeout="10s"))
    except (OSError, ValueError) as error:
        raise CommandError(f"no dask scheduler at {args.dask}: {error}") from error
    return client.get_executor()


def exit_code(swept: Swept) -> int:
    """1 where something could not be counted, which goes to stderr, else 0."""
    for failure in swept.failed:
        say(f"nvfp4lab: not counted: {failure}", sys.stderr)
    return 1 if swept.failed else 0
