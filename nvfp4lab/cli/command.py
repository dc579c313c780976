"""What every command may raise, how it refuses a file that it could not write, and how it prints.

Names of files and sites come from whoever wrote them; a terminal obeys some of what text can hold.
For every module of the folder: what two commands do alike stands here (`shards` has what two share
that read captures).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from nvfp4lab import files


class CommandError(Exception):
    """A request that cannot be carried out; the message goes to the user, without a traceback."""


def check_writable(option: str, path: Path, first: Path | None = None) -> None:
    """Before hours of work, not after; a file that is there is left as it is.

    first: what is written first, where `path` is a folder.
    """
    try:
        files.check(path if first is None else first)
    except OSError as error:
        raise CommandError(f"{option} {path} cannot be written: {error.strerror}") from error


def count(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def say(text: object, file: TextIO | None = None) -> None:
    """Print with what cannot be printed, escape sequences among it, written as \\x1b."""
    print(printable(str(text)), file=file or sys.stdout)


def printable(text: str) -> str:
    """The text with everything but printable characters, line breaks and tabs escaped."""
    kept = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(kept)
