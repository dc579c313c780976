"""The command line: `nvfp4lab COMMAND`, a module a command.

Each module has one `add` that describes the command's arguments and one `run` that carries it out;
to add a command, write the two and name the module in COMMANDS. What a command needs is imported
inside `run`, so that `--help` is quick. Exit codes: 0 done, 1 the work failed, 2 it could not be
done as asked, a full disk included, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # a log gets a sign of life now and then
    try:
        with _terminable():
            code = args.run(args)
            sys.stdout.flush()
        return code
    except CommandError as error:
        say(f"nvfp4lab: {error}", sys.stderr)
        return 2
    except OSError as error:
        if error.filename is not None:
            print(f"nvfp4lab: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        return _without_output(error)
    except KeyboardInterrupt:
        print("\nnvfp4lab: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("\nnvfp4lab: terminated", file=sys.stderr)
        return 143


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with no half-written file and no worker left."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _without_output(error: OSError) -> int:
    """An error that names no file is of standard output: a full disk, or a reader that is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at its end
    if isinstance(error, BrokenPipeError):
        return 141  # as of a program that SIGPIPE ends
    print(f"nvfp4lab: standard output: {error}", file=sys.stderr)
    return 2
