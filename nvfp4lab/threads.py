"""Work in pieces, each piece on one thread from its first operation to its last.

torch splits every operation between its threads and joins them after it. Where a piece of work fits
a cache its operations take microseconds, and so many joins cost more than they bring; on a busy
machine, where a thread may wait for its turn at each of them, very much more. Here threads part
once and meet once. This module knows nothing of what the work is. How many threads are worth it,
the caller says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def for_each(work: Callable[[Item], object], items: Iterable[Item], most: int = 8) -> None:
    """work(item) for every item, in any order, on `most` or `torch.get_num_threads()` threads, the
    fewer of both.

    Operations in work are not split; it runs in inference mode. What it raises, this raises. A
    thread of the caller's that first uses torch in the moment in which this starts may take over
    that torch has one thread.
    """
    remaining = deque(items)
    of_torch = torch.get_num_threads()
    threads = min(of_torch, most, len(remaining)) if torch.backends.openmp.is_available() else 1

    @torch.inference_mode()
    def work_off() -> None:
        while remaining:
            try:
                item = remaining.popleft()
            except IndexError:  # another thread was quicker
                return
            work(item)

    if threads <= 1:
        return work_off()
    parting = threading.Barrier(threads + 1)

    def run() -> None:
        torch.get_num_threads()  # or its first operation would forget what is set now
        torch.set_num_threads(1)  # for this thread, and those that have not used torch yet
        parting.wait()
        work_off()

    with ThreadPoolExecutor(threads) as pool:
        try:
            running = [pool.submit(run) for _ in range(threads)]
            parting.wait()
        except BaseException:
            parting.abort()
            raise
        finally:
            torch.set_num_threads(of_torch)
    for each in running:
        each.result()
