"""Files are written whole or not at all, whatever goes wrong, and an error names the file."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4lab import files

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX files and processes")


@pytest.fixture
def old(tmp_path) -> Path:
    (tmp_path / "a.csv").write_text("old")
    return tmp_path / "a.csv"


def write(path: Path) -> None:
    with files.replacing(path) as partial:
        partial.write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_new_file_takes_the_old_ones_place(old):
    with files.replacing(old) as partial:
        partial.write_text("new")
        assert old.read_text() == "old" and partial.name == old.name
    assert contents(old.parent) == {"a.csv": "new"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ValueError(), KeyboardInterrupt()]
)
def test_a_block_that_fails_leaves_the_old_file_alone(old, error):
    with pytest.raises(type(error)), files.replacing(old) as partial:
        partial.write_text("half")
        raise error
    assert contents(old.parent) == {"a.csv": "old"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_step_that_fails_leaves_the_old_file_alone_and_names_it(old, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "a name that nobody gave")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.csv'") as raised:
        write(old)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(old)
    assert contents(old.parent) == {"a.csv": "old"}


def test_an_error_without_a_number_keeps_its_text(old):
    short = "1024 requested and 0 written"  # numpy's
    with pytest.raises(OSError, match=rf"{short}: '.*a\.csv'"), files.replacing(old):
        raise OSError(short)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("no/a.csv", FileNotFoundError, "there is no folder .*/no: '.*no/a.csv'"),
        ("a.csv/b.csv", FileNotFoundError, "there is no folder .*/a.csv"),
        (".", IsADirectoryError, "it is a folder"),
        pytest.param(os.devnull, OSError, "it is no ordinary file", marks=posix),
        pytest.param("n" * 300, OSError, "name too long", marks=posix),
    ],
)
@pytest.mark.parametrize(
    "refused_by", [files.check, lambda path: files.replacing(path).__enter__()]
)
def test_what_cannot_be_written_is_refused_before_anything_is(old, path, kind, message, refused_by):
    with pytest.raises(kind, match=message):
        refused_by(old.parent / path)
    assert contents(old.parent) == {"a.csv": "old"}


def test_checking_changes_nothing(old):
    before = old.stat()
    files.check(old)
    files.check(old.with_name("b.csv"))
    assert old.stat() == before and contents(old.parent) == {"a.csv": "old"}


@posix
def test_the_longest_name_that_the_file_system_takes_can_be_written(tmp_path):
    with files.replacing(tmp_path / ("n" * 255)) as partial:
        partial.write_text("new")
    assert contents(tmp_path) == {"n" * 255: "new"}


@posix
def test_a_link_stays_a_link_to_the_new_file(old):
    link = old.with_name("link.csv")
    link.symlink_to(old.name)
    with files.replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and old.read_text() == "new"


@posix
@pytest.mark.parametrize(("before", "mode"), [(None, 0o640), (0o664, 0o664)])
def test_the_mode_is_the_old_files_or_what_open_gives(old, before, mode):
    old.unlink() if before is None else old.chmod(before)
    umask = os.umask(0o027)
    try:
        with files.replacing(old) as partial:
            partial.touch()
            partial.chmod(0o600)  # as safetensors does
    finally:
        os.umask(umask)
    assert stat.S_IMODE(old.stat().st_mode) == mode


@posix
def test_a_read_only_file_is_not_replaced(old):
    old.chmod(0o444)
    assert "Permission denied" in by_another_user(old.parent, f"files.check({str(old)!r})")
    assert contents(old.parent) == {"a.csv": "old"}


@posix
def test_a_read_only_folder_is_named(old):
    old.parent.chmod(0o555)
    try:
        said = by_another_user(old.parent, f"files.check({str(old)!r})")
        assert f"Permission denied: '{old}'" in said
    finally:
        old.parent.chmod(0o755)


def by_another_user(folder: Path, code: str) -> str:
    """stderr of the code, run by a user who owns the folder and its files but is not root."""
    drop = ""
    if os.geteuid() == 0:
        for path in [folder, *folder.iterdir()]:
            os.chown(path, 65534, 65534)
        for parent in folder.parents:
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        drop = "os.setuid(65534)\n"
    code = f"import os\nfrom nvfp4lab import files\n{drop}{code}"
    root = Path(files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    return done.stderr


CHILD = """
import os, sys
from nvfp4lab import files
with files.replacing(sys.argv[1]) as partial:
    partial.write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


@posix
@pytest.mark.parametrize("killed", [True, False])
def test_only_what_a_killed_process_left_is_taken_away(old, killed):
    root = Path(files.__file__).parents[1]
    command = [sys.executable, "-c", CHILD, str(old)]
    child = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    if killed:
        child.send_signal(signal.SIGKILL)
        child.wait()
    files.clear.cache_clear()
    with files.replacing(old.with_name("b.csv")) as partial:
        partial.write_text("new")
    left = [path for path in old.parent.iterdir() if path.name.startswith(files.SCRATCH)]
    child.stdin.close()
    child.wait()
    child.stdout.close()
    assert len(left) == (0 if killed else 1)
    assert contents(old.parent) == {"a.csv": "old" if killed else "half", "b.csv": "new"}
