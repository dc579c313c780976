"""nvfp4lab report: where which recipe is safe in captured activations, as one HTML page.

What is judged, and by which limits, is `report`'s; the arguments that it has in common with `sweep`
are `shards`'.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from nvfp4lab.cli import shards
from nvfp4lab.cli.command import CommandError, say
from nvfp4lab.cli.progress import Progress


def add(commands: argparse._SubParsersAction) -> None:
    text = "Say in one HTML page which recipes are safe on captured activations, layer by layer."
    command = commands.add_parser(
        "report",
        help=text,
        description=text + " The page loads nothing. The first recipe is looked at closest. Killed "
        "or interrupted, the same command goes on, and so does `sweep` from its statistics. Exits "
        "1 if a shard or some of its rows could not be counted; the page says which.",
    )
    shards.add_arguments(command, "HTML", "a summary")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sweep, make the page, print what the recipes come to."""
    from nvfp4lab import report, runs

    names, state = shards.recipes_of(args), shards.state_of(args)
    shards.check_out(args)
    progress = Progress("page", width=4)
    with contextlib.ExitStack() as stack:
        executor = shards.executor_of(args, stack)
        try:
            swept = report.write_report(
                args.shards, args.out, names, executor, state=state, on_cell=progress.show
            )
        except runs.NotebookError as error:
            progress.end("FAILED")
            say(f"nvfp4lab: the page could not be made: {error}", sys.stderr)
            return 1
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    progress.end("ok")
    say(report.summary(report.verdicts(swept)).to_string(index=False))
    say("at how many sites: safe and lossy against exact scales on these tokens, broken by a NaN")
    say(f"Open {args.out}; the full statistics are in {state}")
    return shards.exit_code(swept)
