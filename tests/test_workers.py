"""Which GPU is whose: claims of made-up devices, by threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from nvfp4lab.sweeps import workers

UUIDS = ["aaaa", "bbbb", "cccc"]


def claimed_by_process(folder: str) -> tuple[int, bool]:
    held = workers.claim(UUIDS, folder)
    globals()["held"] = held  # until the process ends
    return held.index, held.lock is not None


def test_claims_take_what_is_free_then_share(tmp_path):
    held = [workers.claim(UUIDS, tmp_path) for _ in range(4)]
    assert [c.index for c in held[:3]] == [0, 1, 2] and all(c.lock for c in held[:3])
    assert held[3].lock is None and held[3].index in range(3)


def test_what_is_given_back_can_be_claimed(tmp_path):
    first, _ = workers.claim(UUIDS, tmp_path), workers.claim(UUIDS, tmp_path)
    assert first.lock is not None
    first.lock.release()
    assert workers.claim(UUIDS, tmp_path).index == 0


def test_threads_have_devices_of_their_own(tmp_path):
    together = Barrier(3)

    def work(_: int) -> int:
        held = workers.claim(UUIDS, tmp_path)
        together.wait(10)
        return held.index

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(work, range(3))) == [0, 1, 2]


def test_processes_have_devices_of_their_own_and_give_them_back_when_they_end(tmp_path):
    for _ in range(2):
        pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(2)]
        got = [pool.submit(claimed_by_process, str(tmp_path)).result(60) for pool in pools]
        for pool in pools:
            pool.shutdown()
        assert got == [(0, True), (1, True)]


def test_a_lock_that_cannot_be_opened_is_anothers(tmp_path):
    (tmp_path / "nvfp4lab-gpu-aaaa.lock").mkdir()
    assert workers.claim(UUIDS, tmp_path).index == 1


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """torch.cuda as a machine with two GPUs shows it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=UUIDS[i])
    )
    monkeypatch.setattr(workers.tempfile, "gettempdir", lambda: str(tmp_path))


def test_a_worker_keeps_the_device_that_it_claimed(two_gpus):
    first = workers.worker_device()
    assert first == workers.worker_device() == torch.device("cuda", 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(workers.worker_device).result() == torch.device("cuda", 1)
    workers._release_device()


def test_a_serial_run_gives_its_device_back(two_gpus, tmp_path):
    ((_, device),) = workers.outcomes(lambda _: workers.worker_device(), [0], None, 1)
    assert device == torch.device("cuda", 0)
    assert workers.claim(UUIDS, tmp_path).index == 0


def test_without_a_gpu_the_worker_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workers.worker_device() == torch.device("cpu")


def test_locks_lie_in_the_folder_given(tmp_path):
    workers.claim(UUIDS, tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["nvfp4lab-gpu-aaaa.lock"]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_workers_end_with_a_parent_that_was_killed():
    code = """if True:
    from nvfp4lab.sweeps import processes
    import os, time
    if __name__ == "__main__":
        pool = processes(1)
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # is there
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {worker} is still there")


def device_after_a_while(seconds: float) -> str:
    device = workers.worker_device()
    time.sleep(seconds)  # so that the other worker has to be there too
    return str(device)


def test_a_worker_is_on_the_gpu(gpu):
    with workers.processes(1) as pool:
        assert pool.submit(device_after_a_while, 0.0).result(120).startswith("cuda:")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_workers_are_on_two_gpus():
    with workers.processes(2) as pool:
        devices = [pool.submit(device_after_a_while, 5.0) for _ in range(2)]
        assert sorted(d.result(120) for d in devices) == ["cuda:0", "cuda:1"]
