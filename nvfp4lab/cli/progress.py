"""How far a notebook is, on one line.

Used by `study` and `report`; sweeps and captures have tqdm's bars.
"""

from __future__ import annotations

import sys
import time


class Progress:
    """One line for a notebook, rewritten on a terminal; a log gets its end, and a sign of life."""

    def __init__(self, name: str, width: int):
        self.name, self.started = name.ljust(width), time.monotonic()
        self.printed = self.started
        self.done, self.total = 0, 0

    def show(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if sys.stdout.isatty():
            print(f"\r{self._line()}", end="", flush=True)
        elif time.monotonic() - self.printed > 20:
            print(self._line(), flush=True)
            self.printed = time.monotonic()

    def end(self, outcome: str) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{self._line()}  {outcome}", flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        width = len(str(self.total))
        return f"{self.name}  {self.done:{width}}/{self.total} cells  {seconds:6.1f} s"
