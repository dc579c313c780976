"""What every command may raise, and how all of them print.

Names of files and sites come from whoever wrote them; a terminal obeys some of what text can hold.
"""

from __future__ import annotations

import sys
from typing import TextIO


class CommandError(Exception):
    """A request that cannot be carried out; the message goes to the user, without a traceback."""


def say(text: object, file: TextIO | None = None) -> None:
    """Print with what cannot be printed, escape sequences among it, written as \\x1b."""
    print(printable(str(text)), file=file or sys.stdout)


def printable(text: str) -> str:
    """The text with everything but printable characters, line breaks and tabs escaped."""
    kept = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(kept)
