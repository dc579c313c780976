"""nvfp4lab sweep: the error of recipes over captured activations, a CSV row a layer and recipe.

What is measured is `sweeps`'. May be changed: SHOWN, the columns that are printed; the file has
all.
"""

from __future__ import annotations

import argparse
import contextlib

from nvfp4lab import files
from nvfp4lab.cli import shards
from nvfp4lab.cli.command import CommandError, say

SHOWN = ["layer", "site", "recipe", "tokens", "qsnr_db", "gain", "flushed_share", "scale_nan"]


def add(commands: argparse._SubParsersAction) -> None:
    text = "Measure recipes over captured activations: a CSV row for each layer, site and recipe."
    command = commands.add_parser(
        "sweep",
        help=text,
        description=text + " Killed or interrupted, the same command goes on. Exits 1 if a shard "
        "or some of its rows could not be counted; the others are.",
    )
    shards.add_arguments(command, "CSV", "an excerpt")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sweep, write the CSV as a whole, print its most telling columns."""
    from nvfp4lab import sweeps

    names, state = shards.recipes_of(args), shards.state_of(args)
    shards.check_out(args)
    with contextlib.ExitStack() as stack:
        executor = shards.executor_of(args, stack)
        try:
            swept = sweeps.sweep_statistics(args.shards, names, executor, state=state)
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    frame = swept.to_frame()
    with files.replacing(args.out) as partial:
        frame.to_csv(partial, index=False)
    say(frame[SHOWN].round(4).to_string(index=False))
    say(f"{len(frame)} rows in {args.out}, the full statistics in {state}")
    return shards.exit_code(swept)
