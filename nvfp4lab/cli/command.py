"""What every command may raise, and how it refuses a file that it could not write."""

from __future__ import annotations

from pathlib import Path

from nvfp4lab import files


class CommandError(Exception):
    """A request that cannot be carried out; the message goes to the user, without a traceback."""


def check_writable(option: str, path: Path) -> None:
    """Before hours of work, not after; a file that is there is left as it is."""
    try:
        files.check(path)
    except OSError as error:
        raise CommandError(f"{option} {path} cannot be written: {error.strerror}") from error
