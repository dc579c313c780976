"""What every command may raise, how it refuses a file that it could not write, and how it prints.

Names of files and sites come from whoever wrote them; a terminal obeys some of what text can hold.
"""

from __future__ import annotations

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


def say(text: object, file: TextIO | None = None) -> None:
    """Print with what cannot be printed, escape sequences among it, written as \\x1b."""
    print(printable(str(text)), file=file or sys.stdout)


def printable(text: str) -> str:
    """The text with everything but printable characters, line breaks and tabs escaped."""
    kept = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(kept)
