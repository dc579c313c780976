"""`killed_at_every_step`: a work is killed at each step that changes a file, and done again.

A script of tests/test_faults.py. Each life is a fork of a process that has imported all there is,
so that a life takes milliseconds. May be changed: works may be added.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import torch
from sweep_runs import capture
from test_capture import ABOUT, Recorder, record

from nvfp4lab import cli, publish, report, runs
from nvfp4lab.sweeps import state

STEPS = ("replace", "truncate", "fsync", "mkdir", "unlink", "rmdir")


def life(work: Callable[[Path], object], folder: Path, last: int | None) -> bool:
    """Whether the work in a process of its own came to its end before its step number `last`."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def stepping(real):
            def step(*arguments, **options):
                if next(count) == last:
                    if real is os_fsync:  # what was written last has not all reached the disk
                        os.ftruncate(arguments[0], max(0, os.fstat(arguments[0]).st_size - 5))
                    os.kill(os.getpid(), signal.SIGKILL)
                return None if real is os_fsync else real(*arguments, **options)

            return step

        os_fsync = os.fsync
        for name in STEPS:
            setattr(os, name, stepping(getattr(os, name)))
        try:
            work(folder)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit("a life ended by itself")
    return code == 0


def left(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, but for locks; and every folder."""
    found = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in found}


def killed_at_every_step(work: Callable[[Path], object], start: Path) -> int:
    """How many steps the work has; exits if one of its deaths shows in what is there at the end."""
    folder = start.parent / "work"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        return folder

    life(work, fresh(), None)
    want = left(folder)
    step = 0
    while not life(work, fresh(), step):
        life(work, folder, None)
        got = left(folder)
        if got != want:
            names = sorted(n for n in got.keys() | want.keys() if got.get(n) != want.get(n))
            sys.exit(f"killed at step {step}, then done again, these differ: {names}")
        step += 1
    return step


def captured(folder: Path) -> None:
    with Recorder(folder / "c", ABOUT, shard_bytes=25 * 160) as recorder:  # of two passes
        for number in range(recorder.passes, 3):
            record(recorder, number)


def reported(folder: Path) -> None:
    state.SAVE_EVERY = 0
    runs.execute = lambda path, *_, **__: nbformat.read(path, as_version=4)
    publish.to_html = lambda *_, **__: "a page"
    out = folder / "o.html"
    report.write_report(CAPTURE, out, ["nvfp4-tensor"], state=folder / "state", progress=False)


def studied(folder: Path) -> None:
    def executed(path: Path, **_) -> nbformat.NotebookNode:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="4")]
        return notebook

    runs.execute = executed
    publish.to_html = lambda *_, **__: "a page"
    os.chdir(folder)
    builtins.print = lambda *_, **__: None
    if cli.main(["study", "--in-place"]):
        raise RuntimeError("the study failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work, where = globals()[sys.argv[1]], Path(sys.argv[2])
    start = where / "start"
    start.mkdir()
    CAPTURE = where / "capture"
    if os.fork() == 0:  # torch runs in children alone: a fork of its threads may hang
        capture(CAPTURE)
        os._exit(0)
    os.wait()
    if work is studied:
        (start / "notebooks").mkdir()
        cell = nbformat.v4.new_code_cell("2 + 2", id="a")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), start / "notebooks/01_a.ipynb")
    print(json.dumps(killed_at_every_step(work, start)))
