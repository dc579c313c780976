"""Sweeps against nvfp4lab.measure, over executors, cuts and failures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep_runs import (
    QUIET,
    RECIPES,
    WIDTH,
    alike,
    capture,
    die_on_layer01,
    double,
    fail_on_rows,
    fragile,
    hidden,
    same,
    save,
    swept,
)

import nvfp4lab as nv
from nvfp4lab import records, sweeps
from nvfp4lab.sweeps import tasks, workers


@pytest.fixture
def folder(tmp_path) -> Path:
    return capture(tmp_path / "capture")


def site(folder: Path, layer: int) -> torch.Tensor:
    files = sorted(folder.glob(f"layer{layer:02d}*"))
    return torch.cat([nv.load_activations(file)[0].hidden for file in files])


@pytest.mark.parametrize("name", [n for n in nv.recipes() if n != "nvfp4-stochastic"])
def test_a_site_measures_as_its_rows_together(folder, name):
    got = swept(folder, name, rows=256).statistics
    for layer in (0, 1):
        want = nv.measure(site(folder, layer), name)
        found = got[layer, "mlp_input", name]
        assert same(replace(found, worst=want.worst), want)
        for column in ("lost", "ee", "scale_code", "x"):
            np.testing.assert_array_equal(found.worst[column], want.worst[column])


def test_one_shard_measures_as_measure_to_the_bit(folder):
    got = swept(folder / "layer01.a.safetensors", "nvfp4-tensor").statistics
    found, want = got[1, "mlp_input", "nvfp4-tensor"], nv.measure(site(folder, 1), "nvfp4-tensor")
    unnamed = {**found.worst, "source": want.worst["source"]}  # measure knows of no file
    found = replace(found, worst=unnamed)
    assert same(found, want) if torch.cuda.is_available() else found == want


@pytest.mark.parametrize("name", RECIPES)
def test_the_cut_into_tasks_changes_nothing(folder, name):
    whole, cut = swept(folder, name), swept(folder, name, rows=256)
    for key in whole.statistics:
        assert same(whole.statistics[key], cut.statistics[key])


def test_worst_blocks_are_found_again_in_their_file(folder):
    row = swept(folder, "nvfp4").statistics[0, "mlp_input", "nvfp4"].worst_blocks().iloc[0]
    (record,) = nv.load_activations(row.source)
    block = record.hidden[row.token, 16 * row.block : 16 * row.block + 16]
    np.testing.assert_array_equal(row.x, block.float())


def test_stochastic_rounding_repeats_and_differs_by_rows(folder):
    assert alike(*(swept(folder, "nvfp4-stochastic") for _ in range(2)))
    x = torch.full((512, WIDTH), 0.3)
    path = save(folder.parent / "alike.safetensors", x.bfloat16())
    one = tasks.Task(str(path), "layer00.mlp_input", 0, 256, WIDTH, nv.recipe("nvfp4-stochastic"))
    other = replace(one, start=256, stop=512)
    assert tasks.measured(one).sum_e != tasks.measured(other).sum_e


@pytest.mark.parametrize("has", [(), (math.nan,), (math.inf,), (math.nan, math.inf)])
@pytest.mark.parametrize(
    "name", [n for n in nv.recipes() if (o := nv.recipe(n).outer) and o.per == "tensor"]
)
def test_the_outer_scale_of_a_site_is_that_of_its_tensor(name, has, tmp_path):
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    for row, value in enumerate(has):
        x[row, 3] = value
    path = save(tmp_path / "a.safetensors", x)
    found = tasks.find_largest(tasks.Task(str(path), "", 0, 40, WIDTH)).outer(nv.recipe(name))
    want = nv.codec.find_outer(x, nv.recipe(name))
    for part in ("decode", "encode", "amax"):
        np.testing.assert_array_equal(getattr(found, part), getattr(want, part))


@pytest.fixture(params=["threads", "spawned processes", "processes()"])
def executor(request):
    match request.param:
        case "threads":
            made = ThreadPoolExecutor(2)
        case "spawned processes":
            made = ProcessPoolExecutor(2, get_context("spawn"))
        case _:
            made = sweeps.processes(2)
    with made:
        yield made


def test_executors_give_the_same_to_the_bit(folder, executor):
    serial = swept(folder, RECIPES, rows=256)
    assert alike(swept(folder, RECIPES, executor, rows=256, in_flight=3), serial)


def test_a_dask_cluster_of_processes_gives_the_same_to_the_bit(folder):
    from distributed import Client, LocalCluster

    serial = swept(folder, RECIPES, rows=256)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        got = swept(folder, RECIPES, client.get_executor(), rows=256)
        with pytest.raises(TypeError, match=r"distributed.Client: pass client.get_executor\(\)"):
            nv.sweep(folder, "nvfp4", client)  # type: ignore[arg-type]
    assert alike(got, serial) and not got.failed


def test_a_frame_has_a_row_a_site_and_recipe(folder):
    frame = nv.sweep(folder, ["nvfp4", "seed"], **QUIET)
    assert list(frame.columns[:5]) == ["layer", "site", "recipe", "tokens", "tokens_failed"]
    keys = list(zip(frame.layer, frame.site, frame.recipe, strict=True))
    assert keys == [(n, "mlp_input", r) for n in (0, 1) for r in ("nvfp4", "seed")]
    assert frame.tokens.tolist() == [1000, 1000, 520, 520] and not frame.tokens_failed.any()
    assert frame.attrs["failed"] == []
    measured = nv.measure(site(folder, 0), "nvfp4").qsnr_db
    assert frame.qsnr_db[0] == pytest.approx(measured, rel=1e-12)


def test_the_bar_counts_elements_times_recipes(folder, capsys):
    nv.sweep(folder, ["nvfp4", "seed"])
    printed = capsys.readouterr()
    assert printed.out == "" and f"{2 * 1520 * WIDTH / 1000:.0f}k" in printed.err


def test_a_capture_json_says_which_files_count(folder):
    listed = {"path": "layer00.b.safetensors", "sha256": ""}
    (folder / "capture.json").write_text(json.dumps({"waiting": 0, "files": [listed]}))
    assert nv.sweep(folder, "nvfp4", **QUIET).tokens.tolist() == [300]


X = torch.ones(2, 16)
TWICE = "the folder, twice"
RECORD = nv.Activations(X.bfloat16(), torch.arange(2), 0, "a", {})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((RECORD, "nvfp4"), {}, TypeError, "reads files, got Activations: pass paths of record"),
        (([RECORD], "nvfp4"), {}, TypeError, "reads files, got Activations"),
        ((X, "nvfp4"), {}, TypeError, "reads files, got Tensor"),
        ((None, "nvfp4"), {}, TypeError, "reads files, got NoneType"),
        (([], "nvfp4"), {}, ValueError, "no shards"),
        (("nowhere", "nvfp4"), {}, ValueError, "no shard can be read: .*nowhere"),
        (("{folder}", "nvfp5"), {}, ValueError, "unknown recipe 'nvfp5'; did you mean nvfp4"),
        (("{folder}", []), {}, ValueError, "expected one recipe or more"),
        (("{folder}", ["seed", "seed"]), {}, ValueError, "each of another name"),
        (("{folder}", "nvfp4"), {"rows": 100}, ValueError, "rows is a positive multiple of 256"),
        (("{folder}", "nvfp4"), {"in_flight": 0}, ValueError, "in_flight is a positive"),
        (("{folder}", "nvfp4"), {"executor": "dask"}, TypeError, "Executor or None, got a b"),
        ((TWICE, "nvfp4"), {}, ValueError, "given twice, .*layer00.a"),
    ],
)
def test_sweep_refuses_before_anything_is_written(
    folder, tmp_path, arguments, options, error, message
):
    shards, recipes = arguments
    if isinstance(shards, str):
        shards = [folder, folder] if shards == TWICE else shards.format(folder=folder)
    with pytest.raises(error, match=message):
        nv.sweep(shards, recipes, **(QUIET | options), state=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_width_that_does_not_fit_is_refused_at_once(folder, tmp_path):
    save(folder / "odd.safetensors", torch.ones(4, 48).bfloat16(), layer=2)
    with pytest.raises(ValueError, match=r"layer02.mlp_input has rows of 48 .* block of 32"):
        nv.sweep(folder, "mxfp4-floor", **QUIET)


def test_an_interrupted_capture_is_refused(folder):
    (folder / "capture.json").write_text(json.dumps({"waiting": 3, "files": []}))
    with pytest.raises(ValueError, match="a capture that was interrupted: 3 rows"):
        nv.sweep(folder, "nvfp4", **QUIET)


def damage(folder: Path, how: str) -> str:
    """Spoils a shard of layer 0; what the failure says of it."""
    file = folder / "layer00.b.safetensors"
    match how:
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
            return "no whole safetensors file"
        case "missing":
            names = sorted(path.name for path in folder.iterdir())
            files = [{"path": name, "sha256": ""} for name in names]
            (folder / "capture.json").write_text(json.dumps({"waiting": 0, "files": files}))
            file.unlink()
            return "no activations at"
        case "dtype":
            from safetensors.torch import save_file

            about = json.dumps({"layer": 0, "site": "mlp_input", "provenance": {}})
            tensors = {"hidden": torch.ones(3, WIDTH), "positions": torch.arange(3)}
            save_file(tensors, file, metadata={records.METADATA_KEY: about})
            return "hidden of dtype torch.bfloat16"
        case _:
            save(file, hidden(300, 1, width=32))
            return "its rows have 32 elements"


@pytest.mark.parametrize("how", ["cut", "missing", "dtype", "width"])
def test_a_bad_shard_is_named_and_the_rest_counted(folder, how):
    expected = damage(folder, how)
    with pytest.warns(UserWarning, match="1 parts could not be counted.*layer00.b"):
        frame = nv.sweep(folder, "nvfp4", **QUIET)
    (failed,) = frame.attrs["failed"]
    assert failed["path"] == str(folder / "layer00.b.safetensors") and expected in failed["error"]
    assert frame.tokens.tolist() == [700, 520]
    assert frame.qsnr_db[1] == nv.measure(site(folder, 1), "nvfp4").qsnr_db


def test_expert_weights_among_the_records_are_passed_over():
    """As the shipped sets have them."""
    got = swept(nv.records.data_folder() / "smollm2", "nvfp4-exact-scale")
    assert not got.failed
    assert len(got.statistics) == len(nv.activations("smollm2"))


def test_a_link_to_a_shard_is_the_shard(folder):
    (folder / "layer00.c.safetensors").symlink_to(folder / "layer00.a.safetensors")
    with pytest.raises(ValueError, match="given twice, so its rows would count twice"):
        swept(folder, "nvfp4")


def test_a_missing_file_among_others_is_named(folder):
    got = swept([folder / "layer01.a.safetensors", folder / "layer07.safetensors"], "nvfp4")
    assert [Path(failure.path).name for failure in got.failed] == ["layer07.safetensors"]
    assert got.to_frame().tokens.tolist() == [520]


def test_rows_that_fail_are_named_and_missed(folder, monkeypatch):
    fail_on_rows(monkeypatch, 512)
    got = swept(folder, "nvfp4", rows=256)
    (failed,) = got.failed
    assert (failed.start, failed.stop, failed.recipe) == (512, 700, "nvfp4")
    assert failed.error == "MemoryError: none left"
    assert got.to_frame().tokens.tolist() == [812, 520]
    assert got.to_frame().tokens_failed.tolist() == [188, 0]


@pytest.mark.parametrize("start", [0, 512])
def test_a_shard_whose_largest_magnitude_is_unknown_fails_under_that_recipe(
    folder, monkeypatch, start
):
    fail_on_rows(monkeypatch, start)
    got = swept(folder, ["nvfp4", "nvfp4-tensor"], rows=256)
    by_recipe = {(f.recipe, f.start, f.stop) for f in got.failed}
    assert by_recipe == {("nvfp4-tensor", 0, 700), ("nvfp4", start, min(start + 256, 700))}
    assert got.statistics[0, "mlp_input", "nvfp4-tensor"].tokens == 300


def test_rows_whose_worker_died_are_counted_after_all(folder):
    serial = swept(folder, "nvfp4", rows=256)
    pool = ProcessPoolExecutor(2, get_context("spawn"), initializer=die_on_layer01)
    with pool:
        got = swept(folder, "nvfp4", pool, rows=256)
    assert alike(got, serial) and not got.failed


def test_outcomes_come_in_order_and_a_deadly_task_fails_alone():
    numbers = [1, -1, 2, -3, 3, -2, 4, 5]
    with sweeps.processes(2) as pool:
        got = list(workers.outcomes(fragile, numbers, pool, in_flight=3))
    assert [number for number, _ in got] == numbers
    results = dict(got)
    assert [results[n] for n in (1, 2, 3, 4, 5)] == [2, 4, 6, 8, 10]
    assert isinstance(results[-1], ValueError)
    assert all("its worker process died" in str(results[n]) for n in (-2, -3))


def test_no_more_tasks_are_in_flight_than_asked_for():
    given = []

    def numbers():
        for number in range(20):
            given.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        for done, _ in workers.outcomes(double, numbers(), pool, in_flight=4):
            assert len(given) - done <= 5


def test_an_error_in_between_cancels_what_waits():
    with ThreadPoolExecutor(1) as pool:
        running = workers.outcomes(time.sleep, [0.2] * 50, pool, in_flight=50)
        next(running)
        began = time.monotonic()
        running.close()
    assert time.monotonic() - began < 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own memory is larger than that")
def test_memory_does_not_grow_with_the_capture(tmp_path):
    """A site of 10 shards of 17 MB, hard links of one."""
    (tmp_path / "c").mkdir()
    first = save(tmp_path / "c" / "00.safetensors", hidden(2048, 0, width=4096))
    for number in range(1, 10):
        os.link(first, tmp_path / "c" / f"{number:02d}.safetensors")
    code = f"""if True:
    import nvfp4lab as nv, torch
    torch.set_num_threads(1)
    def peak():
        return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
    nv.sweep([{str(first)!r}], 'nvfp4-tensor', progress=False)
    before = peak()
    frame = nv.sweep({str(tmp_path / "c")!r}, 'nvfp4-tensor', progress=False)
    assert frame.tokens.tolist() == [10 * 2048]
    print(before, peak())
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(nv.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after < before + 40 and after < 1000  # MB
