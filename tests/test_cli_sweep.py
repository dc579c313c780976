"""nvfp4lab sweep: what it writes, prints and returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from sweep_runs import capture

import nvfp4lab as nv
from nvfp4lab import cli
from nvfp4lab.cli import shards


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return capture(tmp_path / "capture")


def test_a_sweep_writes_every_row_and_prints_the_most_telling(folder, capsys):
    assert cli.main(["sweep", "capture", "--recipes", "nvfp4", "seed", "--out", "o.csv"]) == 0
    frame = pd.read_csv("o.csv")
    want = nv.sweep(folder, ["nvfp4", "seed"], progress=False)
    pd.testing.assert_frame_equal(frame, want, check_dtype=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:5] == ["layer", "site", "recipe", "tokens", "qsnr_db"]
    assert len(printed) == 6 and printed[-1].startswith("4 rows in o.csv, the full statistics in")


def test_the_full_statistics_stay_beside_it(folder):
    cli.main(["sweep", "capture", "--recipes", "nvfp4", "--out", "o.csv"])
    kept = nv.Statistics.load("o.csv.statistics/layer01.mlp_input.nvfp4.npz")
    assert kept.tokens == 520 and kept.by_channel().shape[0] == 64


def test_workers_are_processes_that_give_the_same(folder):
    arguments = ["sweep", "capture", "--recipes", "nvfp4-tensor"]
    assert cli.main([*arguments, "--out", "a.csv"]) == 0
    assert cli.main([*arguments, "--out", "b.csv", "--workers", "2"]) == 0
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


def test_a_dask_scheduler_gives_the_same(folder):
    from distributed import LocalCluster

    arguments = ["sweep", "capture", "--recipes", "nvfp4-tensor"]
    assert cli.main([*arguments, "--out", "a.csv"]) == 0
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        dask = ["--dask", cluster.scheduler_address]  # type: ignore[attr-defined]
        assert cli.main([*arguments, "--out", "b.csv", *dask]) == 0
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


def test_a_bad_shard_is_named_and_the_rest_written(folder, capsys):
    (folder / "layer00.b.safetensors").write_bytes(b"cut")
    assert cli.main(["sweep", "capture", "--recipes", "nvfp4", "--out", "o.csv"]) == 1
    printed = capsys.readouterr().err
    assert "nvfp4lab: not counted: " in printed and "layer00.b.safetensors" in printed
    assert pd.read_csv("o.csv").tokens.tolist() == [700, 520]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capture", "--recipes", "nvfp5"], "unknown recipe 'nvfp5'; did you mean nvfp4"),
        (["nowhere"], "no shard can be read"),
        (["capture", "--out", "no/o.csv"], "--out no/o.csv cannot be written: there is no folder "),
        (["capture", "--dask", "tcp://127.0.0.1:1"], "no dask scheduler at tcp://127.0.0.1:1"),
    ],
)
def test_what_cannot_start_exits_2_and_writes_nothing(folder, capsys, arguments, message):
    assert cli.main(["sweep", "--out", "o.csv", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["capture"]


@pytest.mark.parametrize("command", ["sweep", "report"])
@pytest.mark.parametrize("given", ["capture", "a link", "the shard"])
def test_no_shard_is_replaced_by_the_out_file(folder, capsys, command, given):
    shard = sorted(folder.glob("*.safetensors"))[0]
    Path("link").symlink_to(folder)
    what, out = {
        "capture": ("capture", shard),
        "a link": ("link", shard),
        "the shard": (shard, Path("link") / shard.name),
    }[given]
    before = shard.read_bytes()
    assert cli.main([command, str(what), "--recipes", "nvfp4", "--out", str(out)]) == 2
    assert "is a file of the capture" in capsys.readouterr().err
    assert shard.read_bytes() == before and not list(folder.glob("*.statistics"))


def test_an_out_that_cannot_be_written_is_found_before_the_work(folder, capsys):
    arguments = ["sweep", "capture", "--recipes", "nvfp4", "--state", "kept"]
    assert cli.main([*arguments, "--out", "/proc/o.csv"]) == 2
    assert "--out /proc/o.csv cannot be written" in capsys.readouterr().err
    assert not Path("kept").exists()


def test_workers_are_a_number(folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "capture", "--out", "o.csv", "--workers", "0"])
    assert exit_.value.code == 2 and "1 or more, got '0'" in capsys.readouterr().err


def test_every_default_recipe_is_there():
    assert set(shards.DEFAULT) <= set(nv.recipes())


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["serial", "workers"])
def test_an_interrupted_sweep_exits_130_and_goes_on(folder, workers):
    recipes = [name for name in nv.recipes() if name != "nvfp4-search"]
    command = ["sweep", "capture", "--recipes", *recipes, "nvfp4-search", "--out", "o.csv"]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command, *workers],
        env=os.environ | {"PYTHONPATH": str(Path(nv.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len(list(Path("o.csv.statistics").glob("*.npz"))) < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, printed = running.communicate(timeout=60)
    assert running.returncode == 130 and printed.endswith("nvfp4lab: interrupted\n")
    assert "Traceback" not in printed and not Path("o.csv").exists()
    before = {path.name for path in Path("o.csv.statistics").glob("*.npz")}
    assert cli.main(command) == 0
    assert len(before) < len(list(Path("o.csv.statistics").glob("*.npz"))) == 2 * len(nv.recipes())


# Saves at once, and takes its time between two tasks.
SLOW = """if True:
    import sys, time
    from nvfp4lab import cli
    from nvfp4lab.sweeps import state
    state.SAVE_EVERY = 0
    changed = state.State.changed
    state.State.changed = lambda self, entry: (changed(self, entry), time.sleep(0.2))
    if __name__ == "__main__":
        sys.exit(cli.main(sys.argv[1:]))
"""
