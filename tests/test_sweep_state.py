"""What a sweep leaves behind when it is interrupted or killed, and what goes on from it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_runs import RECIPES, alike, capture, fail_on_rows, hidden, same, save, swept

import nvfp4lab as nv
from nvfp4lab.sweeps import state, tasks


@pytest.fixture
def folder(tmp_path) -> Path:
    return capture(tmp_path / "capture")


def interrupted(folder: Path, kept: Path, after: int) -> None:
    """A sweep with a state that ends with KeyboardInterrupt at its task number `after`."""
    counter = itertools.count()
    measured = tasks.measured

    def stopping(task):
        if next(counter) == after:
            raise KeyboardInterrupt
        return measured(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvfp4lab.sweeps.sweeping.measured", stopping)
        with pytest.raises(KeyboardInterrupt):
            swept(folder, RECIPES, rows=256, state=kept)


def counting(monkeypatch) -> list[tasks.Task]:
    """The tasks that are measured from now on."""
    done, measured = [], tasks.measured

    def noted(task):
        done.append(task)
        return measured(task)

    monkeypatch.setattr("nvfp4lab.sweeps.sweeping.measured", noted)
    return done


@pytest.mark.parametrize("after", [0, 1, 7, 26])
def test_an_interrupted_sweep_goes_on_where_it_was(folder, tmp_path, after, monkeypatch):
    undisturbed = swept(folder, RECIPES, rows=256)
    interrupted(folder, tmp_path / "state", after)
    done = counting(monkeypatch)
    got = swept(folder, RECIPES, rows=256, state=tmp_path / "state")
    assert alike(got, undisturbed)
    assert len(done) == 40 - after  # 8 runs of rows under 5 recipes


def test_a_finished_sweep_computes_nothing_again(folder, tmp_path, monkeypatch):
    first = swept(folder, RECIPES, state=tmp_path / "state")
    done = counting(monkeypatch)
    monkeypatch.setattr("nvfp4lab.sweeps.sweeping.find_largest", None)  # an error if called
    assert swept(folder, RECIPES, state=tmp_path / "state").statistics == first.statistics
    assert done == []


def test_an_added_recipe_and_shard_alone_are_computed(folder, tmp_path, monkeypatch):
    swept(folder, "nvfp4", state=tmp_path / "state")
    done = counting(monkeypatch)
    save(folder / "layer02.a.safetensors", hidden(40, 5), layer=2)
    got = swept(folder, ["nvfp4", "seed"], state=tmp_path / "state")
    assert {(task.label[:7], task.recipe and task.recipe.name) for task in done} == {
        ("layer00", "seed"),
        ("layer01", "seed"),
        ("layer02", "seed"),
        ("layer02", "nvfp4"),
    }
    assert len(got.to_frame()) == 6


def test_an_added_shard_with_a_larger_amax_counts_its_site_again(folder, tmp_path):
    swept(folder, "nvfp4-tensor", state=tmp_path / "state")
    save(folder / "layer00.c.safetensors", hidden(40, 5, scale=1000.0))
    got = swept(folder, "nvfp4-tensor", state=tmp_path / "state")
    assert alike(got, swept(folder, "nvfp4-tensor"))


def test_other_cuts_go_on_from_the_same_state(folder, tmp_path):
    interrupted(folder, tmp_path / "state", 9)
    got = swept(folder, RECIPES, rows=512, state=tmp_path / "state")
    undisturbed = swept(folder, RECIPES)
    assert all(same(got.statistics[key], undisturbed.statistics[key]) for key in got.statistics)


def test_failed_rows_are_tried_again(folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        fail_on_rows(patch, 256)
        assert swept(folder, "nvfp4", rows=256, state=tmp_path / "state").failed
    got = swept(folder, "nvfp4", rows=256, state=tmp_path / "state")
    assert not got.failed and got.to_frame().tokens.tolist() == [1000, 520]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", "is of another nvfp4 than this sweep's: the recipe has changed"),
        ("shard", r"counts rows of .*layer00.a.safetensors, which has changed since"),
        ("shards", r"counts rows of .*, which is not among this sweep's shards; use another"),
        ("file", "is no whole file of statistics"),
    ],
)
def test_a_state_of_something_else_is_refused(folder, tmp_path, change, message):
    kept, recipe, shards = tmp_path / "state", nv.recipe("nvfp4"), [folder]
    swept(folder, recipe, state=kept)
    match change:
        case "recipe":
            recipe = recipe.changed({"elements.rounding": "ties-away"}, recipe.name)
        case "shard":
            save(folder / "layer00.a.safetensors", hidden(701, 0))
        case "shards":
            shards = [folder / "layer00.a.safetensors"]
        case "file":
            (kept / "layer00.mlp_input.nvfp4.npz").write_bytes(b"PK")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(ValueError, match=message):
        swept(shards, recipe, state=kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_what_was_counted_of_a_shard_that_is_lost_since_stays_counted(folder, tmp_path, how):
    lost, kept = folder / "layer00.b.safetensors", tmp_path / "state"
    whole = swept(folder, "nvfp4", state=kept)
    if how == "gone":
        shards = sorted(folder.iterdir())
        lost.unlink()
    else:
        shards = [folder]
        lost.write_bytes(lost.read_bytes()[:500])
    for recipes, tokens in (("nvfp4", [1000, 520]), (["nvfp4", "seed"], [1000, 700, 520, 520])):
        again = swept(shards, recipes, state=kept)
        assert [Path(failure.path).name for failure in again.failed] == [lost.name]
        assert again.to_frame().tokens.tolist() == tokens
    assert again.to_frame().tokens_failed.tolist() == [0, 300, 0, 0]
    key = (0, "mlp_input", "nvfp4")
    assert again.statistics[key] == whole.statistics[key]


def test_a_site_whose_only_shard_is_lost_keeps_its_row(folder, tmp_path):
    shards, kept = sorted(folder.iterdir()), tmp_path / "state"
    whole = swept(shards, "nvfp4", state=kept)
    (folder / "layer01.a.safetensors").unlink()
    again = swept(shards, "nvfp4", state=kept)
    assert again.statistics == whole.statistics
    assert [Path(failure.path).name for failure in again.failed] == ["layer01.a.safetensors"]


def test_a_state_in_use_is_refused(folder, tmp_path):
    with state.State(tmp_path / "state", []):
        done = subprocess.run(
            [sys.executable, "-m", "nvfp4lab.cli", "sweep", str(folder), "--recipes", "nvfp4",
             "--out", "o.csv", "--state", str(tmp_path / "state")],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(nv.__file__).parents[1])},
            capture_output=True,
            text=True,
        )  # fmt: skip
    assert done.returncode == 2 and "is in use by another sweep" in done.stderr


def test_what_is_kept_are_statistics(folder, tmp_path):
    got = swept(folder, ["nvfp4", "seed"], state=tmp_path / "state")
    kept = nv.Statistics.load(tmp_path / "state" / "layer01.mlp_input.seed.npz")
    assert kept == got.statistics[1, "mlp_input", "seed"]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_killed_sweep_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    undisturbed = swept(folder, RECIPES, rows=256)
    kept = tmp_path / "state"
    code = f"""if True:
    import time
    import nvfp4lab as nv
    from nvfp4lab.sweeps import state, sweeping, tasks
    state.SAVE_EVERY = 0
    measured = tasks.measured
    def slow(task):
        time.sleep(0.05)
        return measured(task)
    sweeping.measured = slow
    nv.sweep({str(folder)!r}, {RECIPES!r}, rows=256, state={str(kept)!r}, progress=False)
    """
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(nv.__file__).parents[1])},
    )
    deadline = time.monotonic() + 60
    while len(list(kept.glob("*.npz"))) < len(RECIPES):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = counting(monkeypatch)
    got = swept(folder, RECIPES, rows=256, state=kept)
    assert 0 < len(done) < 40
    assert alike(got, undisturbed)


def test_sites_with_names_too_long_for_a_file_are_kept_apart(tmp_path, monkeypatch):
    for file, site in (("a", "y" * 399 + "a"), ("b", "y" * 399 + "b")):
        save(tmp_path / f"{file}.safetensors", hidden(10, 0, scale=ord(file)), site=site)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first = swept(paths, "nvfp4", state=tmp_path / "state")
    done = counting(monkeypatch)
    assert alike(swept(paths, "nvfp4", state=tmp_path / "state"), first) and not done
    assert len(list((tmp_path / "state").glob("*.npz"))) == 2
