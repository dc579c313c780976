"""Files that are written whole or not at all; every file that the package leaves is written here.

What is half written lies in a hidden folder beside its target, under the target's name, and so do
temporary files that a library makes of its own accord. A process that is killed leaves that folder;
the next one of the same machine that writes there takes it away. To write a file, use `replacing`.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

SCRATCH = ".nvfp4lab-"  # how the name of a process's own folder begins
_MACHINE = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # short: sockets lie in it, see runs


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Where to write what then takes the place of `path`, flushed to the disk.

    If the block or the writing fails, `path` is as it was and nothing is left beside it. A link
    stays a link, to the new file; a file that was there gives its mode to the new one.

    Raises: OSError with `path` as its file name, whatever file could not be written: no such
    folder, a folder or device in its place, read-only, no space left.

        with files.replacing("o.csv") as partial:
            frame.to_csv(partial)
    """
    with _partial(path) as (partial, target):
        mode = (target if target.exists() else partial).stat().st_mode
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if partial.stat().st_mode != mode:  # safetensors makes its files for their owner alone
            partial.chmod(mode)
        os.replace(partial, target)


def check(path: str | Path) -> None:
    """Raises what `replacing` would of a file that cannot be written; before hours of work."""
    with _partial(path):
        pass


@contextmanager
def scratch(parent: str | Path) -> Iterator[Path]:
    """A folder of this process in `parent`, for as long as the block runs."""
    clear(Path(parent))
    prefix = f"{SCRATCH}{os.getpid()}-{_MACHINE}-"
    own = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    with own as folder:
        yield Path(folder)


def append(path: str | Path, data: bytes | memoryview) -> None:
    """Add to the end of a file, flushed to the disk; an error leaves some of it there.

    Raises: OSError with `path` as its file name.
    """
    with _naming(path), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@lru_cache(maxsize=256)
def clear(parent: Path) -> None:
    """Take away the folders of processes of this machine that are no more.

    Once a process, or once more after 256 other folders: it reads the whole folder.
    """
    if os.name != "posix":  # there no process can be asked for without harm
        return
    for folder in parent.glob(f"{SCRATCH}*-{_MACHINE}-*"):
        try:
            os.kill(int(folder.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError):  # another user's; nobody's
            continue


@contextmanager
def _partial(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """An empty file, and the one that it is to replace."""
    target = Path(os.path.realpath(path))
    with _naming(path):
        if not target.parent.is_dir():
            raise OSError(errno.ENOENT, f"there is no folder {target.parent}")
        if target.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        if target.exists():
            if not target.is_file():
                raise OSError(errno.EINVAL, "it is no ordinary file")
            target.open("ab").close()  # refuses a read-only one, which could be replaced
        with scratch(target.parent) as folder:
            partial = folder / target.name
            partial.touch()
            yield partial, target


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Makes `path` the file name of an OSError: many name none, or one that nobody gave."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, why, str(path)) from error
