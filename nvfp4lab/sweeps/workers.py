"""Tasks on an executor, their outcomes in order; and which GPU is whose.

Outcomes come in the order of the tasks whatever the executor, so that what is added up from them is
the same to the last bit. Nothing here knows what a task is.

A worker, which is a thread or a process, claims a GPU by a lock of the operating system on a file
named by the GPU's UUID: two workers of one machine never take the same one while another is free,
whoever started them, and a worker that dies gives its own back. Two workers took the two GPUs of
one machine (H100s); more GPUs, and claims by threads, were tested with made-up UUIDs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

T = TypeVar("T")
_own = threading.local()  # each worker's Claim


def check_executor(executor: Any) -> None:
    """Raises: TypeError for anything but None and a concurrent.futures.Executor."""
    if executor is None or isinstance(executor, Executor):
        return
    got = f"{type(executor).__module__.split('.')[0]}.{type(executor).__name__}"
    if hasattr(executor, "get_executor"):  # dask's Client
        raise TypeError(f"executor is a {got}: pass client.get_executor() in its place")
    raise TypeError(f"executor is a concurrent.futures.Executor or None, got a {got}")


def processes(count: int) -> ProcessPoolExecutor:
    """An executor of `count` new processes that share the cores and leave Ctrl-C to their parent.

    They are spawned, not forked: a fork of a process that uses torch's threads or CUDA may hang. So
    a script that uses them starts below `if __name__ == "__main__":`, as multiprocessing asks.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, initializer=_start_process, initargs=(threads,))


def _start_process(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers: they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def outcomes(
    work: Callable[[T], Any], tasks: Iterable[T], executor: Executor | None, in_flight: int
) -> Generator[tuple[T, Any], None, None]:
    """(task, work(task) or the Exception that it raised) for each task, in their order.

    in_flight: tasks submitted at a time. If a worker process dies and takes the executor with it,
    what it had in hand and all that follows is run one task at a time in a process of its own, so
    that a task that kills its process is found, and fails alone.
    """
    if executor is None:
        try:
            for task in tasks:
                yield task, _caught(work, task)
        finally:
            _release_device()
        return
    pending: deque[tuple[T, Future | None]] = deque()
    alone = _Alone()
    try:
        for task in tasks:
            if len(pending) >= in_flight:
                yield _outcome(work, *pending.popleft(), alone)
            pending.append((task, _submitted(executor, work, task)))
        while pending:
            yield _outcome(work, *pending.popleft(), alone)
    finally:
        for _, future in pending:
            if future is not None:
                future.cancel()
        alone.close()


def _caught(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _submitted(executor: Executor, work: Callable, task: Any) -> Future | None:
    try:
        return executor.submit(work, task)
    except BrokenExecutor:
        return None


def _outcome(work: Callable, task: T, future: Future | None, alone: _Alone) -> tuple[T, Any]:
    result = BrokenExecutor() if future is None else _caught(future.result)
    return task, alone.run(work, task) if isinstance(result, BrokenExecutor) else result


class _Alone:
    """One task at a time in a process of its own, a new one after each that died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Callable, task: Any) -> Any:
        future = None if self._pool is None else _submitted(self._pool, work, task)
        if future is None:
            self._pool = processes(1)
            future = self._pool.submit(work, task)
        result = _caught(future.result)
        if isinstance(result, BrokenExecutor):
            self.close()
            return RuntimeError(f"its worker process died: {result}")
        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


@dataclass(frozen=True)
class Claim:
    """A GPU by its index, and the lock that makes it the worker's own; None: it is shared."""

    index: int
    lock: FileLock | None


def claim(uuids: Sequence[str], folder: str | Path) -> Claim:
    """The first GPU that nobody has claimed; if all are, one of them by the number of the thread.

    uuids: of the GPUs in the order of their indices. folder: where the locks lie, the same for all
    workers of a machine.
    """
    for index, uuid in enumerate(uuids):
        lock = FileLock(Path(folder) / f"nvfp4lab-gpu-{uuid}.lock", mode=0o666)
        try:
            lock.acquire(blocking=False)
            return Claim(index, lock)
        except (Timeout, OSError):  # another worker's, or another user's
            continue
    return Claim(threading.get_native_id() % len(uuids), None)


def worker_device() -> torch.device:
    """The device of this worker: the GPU that it claimed at its first task, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not hasattr(_own, "claim"):
        count = torch.cuda.device_count()
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
        _own.claim = claim(uuids, tempfile.gettempdir())
    return torch.device("cuda", _own.claim.index)


def _release_device() -> None:
    """Give up what this thread has claimed."""
    held: Claim | None = getattr(_own, "claim", None)
    if held is not None:
        if held.lock is not None:
            held.lock.release()
        del _own.claim
