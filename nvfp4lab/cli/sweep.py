"""nvfp4lab sweep: the error of recipes over captured activations, a CSV row a layer and recipe."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from nvfp4lab.cli.command import CommandError

# What the package can stage, and what DeepSeek V4 stages today.
DEFAULT = ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed", "mxfp8-deepseek-v4")
SHOWN = ["layer", "site", "recipe", "tokens", "qsnr_db", "gain", "flushed_share", "scale_nan"]


def add(commands: argparse._SubParsersAction) -> None:
    text = "Measure recipes over captured activations: a CSV row for each layer, site and recipe."
    command = commands.add_parser(
        "sweep",
        help=text,
        description=text + " Killed or interrupted, the same command goes on. Exits 1 if a shard "
        "or some of its rows could not be counted; the others are.",
    )
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
    command.add_argument("--out", type=Path, required=True, metavar="CSV")
    command.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="the full statistics, of which the CSV is an excerpt, and from which the same command "
        "goes on; it stays (default: OUT.statistics)",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=_count, metavar="N", help="processes (default: this one)")
    where.add_argument(
        "--dask", metavar="ADDRESS", help="of a scheduler whose workers see the same files"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sweep, write the CSV as a whole, print its most telling columns."""
    from nvfp4lab import catalogue, sweeps

    names = list(args.recipes)
    if names == ["all"]:
        names = [n for n in catalogue.recipes() if n not in ("nvfp4-search", "nvfp4-stochastic")]
    try:
        recipes = [catalogue.recipe(name) for name in names]
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not args.out.absolute().parent.is_dir() or args.out.is_dir():
        raise CommandError(f"--out is a file in a folder that is there, got {args.out}")
    partial = args.out.with_name(args.out.name + ".partial")
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise CommandError(f"--out {args.out} cannot be written: {error}") from error
    state = args.state or args.out.with_name(args.out.name + ".statistics")
    with contextlib.ExitStack() as stack:
        executor = _executor(args, stack)
        try:
            swept = sweeps.sweep_statistics(args.shards, recipes, executor, state=state)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    frame = swept.to_frame()
    try:
        frame.to_csv(partial, index=False)
        os.replace(partial, args.out)
    except OSError as error:
        raise CommandError(f"--out {args.out} cannot be written: {error}") from error
    print(frame[SHOWN].round(4).to_string(index=False))
    print(f"{len(frame)} rows in {args.out}, the full statistics in {state}")
    for failure in swept.failed:
        print(f"nvfp4lab: not counted: {failure}", file=sys.stderr)
    return 1 if swept.failed else 0


def _executor(args: argparse.Namespace, stack: contextlib.ExitStack):
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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)
