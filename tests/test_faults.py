"""Kills, full disks, read-only folders and signals: nothing is lost, doubled or left half done."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from sweep_runs import capture, hidden, save
from test_capture import ABOUT, Recorder, expected, read, record, require_same

import nvfp4lab as nv
from nvfp4lab import cli

ROOT = Path(nv.__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX processes")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@posix
@pytest.mark.parametrize(("work", "least"), [("captured", 40), ("reported", 20), ("studied", 15)])
def test_killed_at_any_step_and_done_again_it_is_as_if_nothing_had_happened(tmp_path, work, least):
    done = run(str(ROOT / "tests/dying.py"), work, str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > least  # the steps were there to die at


# a full disk ------------------------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, which fails as a full disk does, by another name."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_statistics(path: Path) -> None:
    nv.measure(hidden(16, 0, width=4096), "nvfp4").save(path)


WRITERS = {"record": lambda path: save(path, hidden(700, 0)), "statistics": save_statistics}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_does_not_fit_leaves_the_old_file_and_names_it(tmp_path, kind):
    path = tmp_path / "old"
    path.write_text("old")
    with room_for(20_000), pytest.raises(OSError, match="File too large") as raised:
        WRITERS[kind](path)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "old")]


@pytest.mark.parametrize("room", [0, 300, 1000, 2000], ids=lambda room: f"{room} bytes")
def test_a_capture_goes_on_in_the_same_process_when_there_is_room_again(tmp_path, room):
    recorder = Recorder(tmp_path / "c", ABOUT, shard_bytes=25 * 160)
    record(recorder, 0)
    record(recorder, 1)
    for number in (2, 3):
        with room_for(room), pytest.raises(OSError, match=r"File too large: '.*/c/"):
            record(recorder, number)
        recorder.end()
    recorder.finish()
    require_same(read(tmp_path / "c"), expected(range(4)))


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--state", "kept"], "o.csv"), ([], "o.csv.statistics/layer00.mlp_input.nvfp4.npz")],
)
def test_a_sweep_says_what_did_not_fit_and_goes_on(tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    capture(tmp_path / "capture")
    command = ["sweep", "capture", "--recipes", "nvfp4", "--out", "o.csv", *options]
    if options:
        assert cli.main(command) == 0
        Path("o.csv").unlink()
    with room_for(100):
        assert cli.main(command) == 2
    assert capsys.readouterr().err.endswith(f"nvfp4lab: {named}: File too large\n")
    assert not Path("o.csv").exists() and not list(tmp_path.rglob(".nvfp4lab-*"))
    assert cli.main(command) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("output", ["full", "gone"])
def test_output_that_nobody_takes_ends_a_command_without_a_traceback(tmp_path, output):
    from safetensors.torch import save_file

    q = nv.quantize(hidden(16, 0), "nvfp4")
    save_file({"hidden": hidden(16, 0)}, tmp_path / "x")
    save_file({"codes": q.codes, "scales": torch.as_tensor(q.scales)}, tmp_path / "q")
    target = "> /dev/full" if output == "full" else "| true"
    python = shlex.quote(sys.executable)
    command = f"set -o pipefail; {python} -m nvfp4lab.cli identify x q --json {target}"
    done = run(
        "-c",
        f"import subprocess, sys; sys.exit(subprocess.call(['bash', '-c', {command!r}]))",
        folder=tmp_path,
    )
    if output == "full":
        assert "nvfp4lab: standard output: [Errno 28] No space left" in done.stderr
    assert done.returncode == (2 if output == "full" else 141) and "Traceback" not in done.stderr
