"""nvfp4lab.benchmarks without its clock: bytes, rotation, ratios, tables, files, the yardstick.

No test asks how fast anything is. Marked `gpu`, every part runs once on tiny cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nvfp4lab import benchmarks, cli, plots
from nvfp4lab.benchmarks import cpu, inputs, machine, running, timing
from nvfp4lab.benchmarks.results import Result, Sample
from nvfp4lab.benchmarks.steps import Measured, Step

SEED = 2306
TINY = inputs.Settings(
    tokens=(4,), widths=(256,), top_k=3, runs=2, sweep_runs=1, run_seconds=0.0,
    measured=(32, 256), on_cpu=(4, 128),
)  # fmt: skip


# ---- Inputs ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 128), 256 + 64 + 8),
        ((3, 128, 6), 3 * (256 + 64 + 8 + 6 * 20)),
        ((3, 128, 6, True), 3 * (256 + 64 + 8 + 6 * 20 + 4)),
        ((32768, 7168), 32768 * 7168 * 41 // 16),
    ],
)
def test_bytes_of_a_case(given, expected):
    assert inputs.staging_bytes(*given) == expected


def test_bytes_are_those_of_the_buffers():
    (one, *_) = inputs.staging_sets(5, 384, TINY, l2_bytes=1, device="cpu")
    held = sum(tensor.nbytes for tensor in vars(one).values())
    assert held == inputs.staging_bytes(5, 384, TINY.top_k, has_outer=True)


@pytest.mark.parametrize(
    ("bytes_of_a_set", "l2_bytes", "sets"),
    [(100, 1000, 30), (101, 1000, 30), (99, 1000, 31), (10**9, 1000, 2)],
)
def test_sets_hold_three_times_the_l2_and_are_two_at_least(bytes_of_a_set, l2_bytes, sets):
    assert inputs.sets_past_l2(bytes_of_a_set, l2_bytes) == sets


def test_no_two_buffers_share_memory_and_each_starts_as_an_allocation_would():
    sets = inputs.staging_sets(2, 256, TINY, l2_bytes=5000, device="cpu")
    assert len(sets) == math.ceil(15000 / inputs.staging_bytes(2, 256))
    tensors = [tensor for one in sets for tensor in vars(one).values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for name in vars(sets[0]):
        first = getattr(sets[0], name).data_ptr()
        assert all((getattr(s, name).data_ptr() - first) % inputs.APART == 0 for s in sets)


def test_inputs_are_seeded_and_of_every_size():
    x = inputs.random_activations(512, 256, SEED, "cpu")
    assert torch.equal(x, inputs.random_activations(512, 256, SEED, "cpu"))
    rms = x.float().square().mean(-1).sqrt()
    assert rms.max() > 20 * rms.min()
    assert x.isfinite().all()


def test_large_inputs_are_filled_to_the_end(monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_AT_ONCE", 7)
    x = torch.zeros(20, 128, dtype=torch.bfloat16)
    inputs.fill_with_activations(x, SEED)
    assert (x != 0).any(-1).all()


# ---- The yardstick ----


def moved_down(x: torch.Tensor, tile: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `launch_down` writes, by torch: tile after tile of so many code words, run by run."""
    codes, scales = [], []
    for words in x.flatten().split(4 * tile):
        runs = words.view(times, 4, -1)
        code = runs[:, 0] ^ runs[:, 1] ^ runs[:, 2] ^ runs[:, 3]
        codes.append(code.flatten())
        scales.append(code[-1, : code.numel() // 8])
    return torch.cat(codes).view(-1, 8), torch.cat(scales)


def moved_up(codes: torch.Tensor, scales: torch.Tensor, tile: int, times: int) -> torch.Tensor:
    """What `launch_up` writes, likewise."""
    words = []
    for code, scale in zip(codes.flatten().split(tile), scales.split(tile // 8), strict=True):
        runs = code.view(times, 1, -1).clone()
        runs[..., : len(scale)] ^= scale
        words.append((runs + torch.arange(4, dtype=torch.int32)[:, None]).flatten())
    return torch.cat(words).view(-1, 32)


def random_words(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


SHAPES = [(1, 1, 1), (4, 2, 2, True), (2, 4, 4), (1, 1, 8)]
triton_only = pytest.importorskip  # Triton is there on Linux only


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [16, 112, 272])
def test_the_yardstick_reads_and_writes_every_word(groups, shape, device):
    triton_only("triton")
    from nvfp4lab.kernels import yardstick

    shape = yardstick.Shape(*shape)
    tile = shape.elements // 8, shape.times
    x, stale = random_words(groups, 32), torch.full((groups, 8), 0x5A5A5A5A, dtype=torch.int32)
    codes, scales = stale.to(device), stale[:, 0].contiguous().to(device)
    yardstick.launch_down(x.to(device), codes, scales, shape)
    expected_codes, expected_scales = moved_down(x, *tile)
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(scales.cpu(), expected_scales)

    y = stale.repeat(1, 4).to(device)
    yardstick.launch_up(codes, scales, y, shape)
    assert torch.equal(y.cpu(), moved_up(expected_codes, expected_scales, *tile))


def test_every_byte_that_the_yardstick_reads_changes_what_it_writes():
    """By the models above, which the kernels equal."""
    x, tile = random_words(16, 32), (64, 2)
    codes, scales = moved_down(x, *tile)
    for byte in range(x.nbytes):
        other = x.clone()
        other.view(torch.uint8).view(-1)[byte] ^= 1
        assert not torch.equal(moved_down(other, *tile)[0], codes)
    y = moved_up(codes, scales, *tile)
    for read in (codes, scales):
        for byte in range(read.nbytes):
            other = read.clone()
            other.view(torch.uint8).view(-1)[byte] ^= 1
            given = (other, scales) if read is codes else (codes, other)
            assert not torch.equal(moved_up(*given, *tile), y)


def test_shapes_that_cannot_keep_a_gpu_busy_are_not_tried():
    triton_only("triton")
    from nvfp4lab.benchmarks.sweep import SHAPES, worth_trying

    few, many = worth_trying(7168, 132), worth_trying(32768 * 7168, 132)
    assert max(shape.elements for shape in few) == 2048
    assert min(shape.elements for shape in few) == 256
    assert min(shape.elements for shape in many) == 2048
    assert max(many, key=lambda s: s.elements) == max(SHAPES, key=lambda s: s.elements)


@pytest.mark.parametrize(
    ("sizes", "dtype", "why"),
    [
        (((24, 32), (24, 8), (24,)), torch.int32, "multiples of 16 groups of 64 elements, got 24"),
        (((16, 32), (16, 4), (16,)), torch.int32, r"contiguous int32 \(16, 8\)"),
        (((16, 32), (16, 8), (16,)), torch.int64, "got torch.int64"),
    ],
)
def test_the_yardstick_refuses_other_sizes(sizes, dtype, why):
    triton_only("triton")
    from nvfp4lab.kernels import yardstick

    x, codes, scales = (torch.zeros(size, dtype=dtype) for size in sizes)
    with pytest.raises(ValueError, match=why):
        yardstick.launch_down(x, codes, scales, yardstick.Shape(1, 1, 1))


# ---- What is timed is what it should be ----


def test_every_recipe_with_a_kernel_is_timed():
    triton_only("triton")
    from nvfp4lab.benchmarks.staging import SEED as SEED_RECIPE
    from nvfp4lab.benchmarks.staging import stageable
    from nvfp4lab.kernels.staging import DECISIONS

    assert stageable().keys() == {*DECISIONS, SEED_RECIPE}
    assert stageable()["nvfp4-token"] and not stageable()["nvfp4"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("recipe", ["nvfp4", "vllm-megamoe"])
def test_a_kernel_that_writes_something_else_is_not_measured(recipe, device):
    triton_only("triton")
    from nvfp4lab.benchmarks.staging import check_written, stage_set, stageable

    has_outer = stageable()[recipe]
    one = inputs.staging_sets(2, 128, TINY, l2_bytes=1, device=device)[0]
    stage_set(one, recipe, has_outer)
    check_written(one, recipe)
    for name in ("x_fp4", "x_sf", "topk_idx_out", "topk_weights_out"):
        kept = getattr(one, name).clone()
        getattr(one, name)[1, 0] += 1
        with pytest.raises(RuntimeError, match=f"{recipe} was timed, but wrote other {name}"):
            check_written(one, recipe)
        getattr(one, name).copy_(kept)
    if has_outer:
        one.x_scales[0] *= 2
        with pytest.raises(RuntimeError, match="wrote other x_scales"):
            check_written(one, recipe)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_a_decoder_that_gives_something_else_is_not_measured(recipe):
    triton_only("triton")
    from nvfp4lab.benchmarks.dequantize import check_decoded, random_sets

    one, other = random_sets(2, 3, 128, recipe, SEED, "cpu")
    assert not torch.equal(one.codes, other.codes)
    decoded = one.dequantize(torch.bfloat16)
    assert decoded.isfinite().all()
    check_decoded(one, decoded)
    decoded[2, 127] += 1
    with pytest.raises(RuntimeError, match="decoded other numbers"):
        check_decoded(one, decoded)


# ---- Timing ----


def test_rivals_take_turns_run_by_run():
    made: list[str] = []
    calls = [lambda name=name: made.append(name) for name in "ab"]
    times = timing.time_calls(calls, runs=3, run_seconds=0.0)
    assert "".join(made) == "aabb" + "ab" * 3  # each once to warm up and once to see how long
    assert [len(runs) for runs in times] == [3, 3]
    assert all(us > 0 for runs in times for us in runs)


def test_a_short_call_is_repeated_until_the_run_is_long_enough(monkeypatch):
    ticks = iter(range(1000))  # a clock that a look moves on by a second
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    made: list[int] = []
    (runs,) = timing.time_calls([lambda: made.append(1)], runs=2, run_seconds=3.5)
    assert len(made) == 1 + 1 + 2 * 4
    assert runs == (0.25e6, 0.25e6)


# ---- Results ----


def result(**changed) -> Result:
    samples = (
        Sample("staging", "yardstick", 16, 4096, (2.0, 1.0, 3.0), 1000, "yardstick", "best"),
        Sample("staging", "nvfp4", 16, 4096, (4.0, 2.5, 2.5), 1100),
        Sample("staging", "seed", 16, 4096, (40.0, 20.0, 30.0), 1100, "reference"),
        Sample("staging", "nvfp4", 1, 4096, (8.0,), 100),
        Sample("host", "empty launch", 1, 4096, (5.0,), role="yardstick"),
        Sample("host", "nvfp4", 1, 4096, (10.0,)),
    )
    sweep = ({"direction": "down", "tokens": 16, "width": 4096, "vector": 4, "us": 2.0},)
    made = Result(
        {"gpu": None, "commit": "abc"}, {"runs": 3}, samples, sweep, ("cpu: no",), ("host: why",)
    )
    return dataclasses.replace(made, **changed)


def test_a_sample_is_its_median_and_its_spread():
    sample = result().samples[0]
    assert (sample.us, sample.spread_us) == (2.0, 2.0)


def test_ratios_are_those_of_medians_of_the_same_case():
    frame = result().frame()
    assert frame["of_yardstick"].tolist()[:3] == [1.0, 0.8, 2.0 / 30.0]
    assert frame["of_reference"].tolist()[:3] == [15.0, 12.0, 1.0]
    assert frame.loc[3, ["of_yardstick", "of_reference"]].isna().all()
    assert frame["of_yardstick"].tolist()[4:] == [1.0, 0.5]
    assert frame["GB/s"].tolist()[:2] == [0.5, 0.44]
    assert frame["GB/s"].isna().tolist()[4:] == [True, True]


def test_the_fastest_of_a_role_counts():
    slower = dataclasses.replace(result().samples[0], runs_us=(9.0,))
    both = result(samples=(slower, *result().samples))
    assert both.ratio(both.samples[2], "yardstick") == 0.8


def test_only_samples_of_a_group_are_compared():
    samples = [
        Sample("measure", "slow", 1, 128, (50.0,), role="reference", group="slow"),
        Sample("measure", "fast", 1, 128, (5.0,), role="reference", group="fast"),
        Sample("measure", "slow", 1, 128, (2.0,), group="slow"),
        Sample("measure", "fast", 1, 128, (1.0,), group="fast"),
    ]
    both = result(samples=tuple(samples))
    assert both.frame()["of_reference"].tolist()[2:] == [25.0, 5.0]


def test_the_table_has_a_part_after_the_other():
    assert result().table() == (
        "staging\n"
        "name       tokens  width     us  spread_us  GB/s  of_yardstick  of_seed\n"
        "yardstick      16   4096   2.00       2.00     0         1.000    15.00\n"
        "nvfp4          16   4096   2.50       1.50     0         0.800    12.00\n"
        "seed           16   4096  30.00      20.00     0         0.067     1.00\n"
        "nvfp4           1   4096   8.00       0.00     0\n\n"
        "host\n"
        "name          tokens  width     us  spread_us  of_yardstick\n"
        "empty launch       1   4096   5.00       0.00         1.000\n"
        "nvfp4              1   4096  10.00       0.00         0.500\n\n"
        "left out: cpu: no\n\n"
        "failed: host: why"
    )


def test_a_file_gives_the_result_back(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(result().to_json(), encoding="utf-8")
    assert Result.load(file) == result()


def test_the_file_has_the_ratios_under_their_names():
    samples = json.loads(result().to_json())["samples"]
    assert (samples[1]["us"], samples[1]["of_yardstick"], samples[1]["of_seed"]) == (2.5, 0.8, 12.0)
    assert "of_yardstick" not in samples[3]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"samples": [{"part": "cpu"}]}'])
def test_another_file_is_no_result(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json is no benchmark result"):
        Result.load(file)


# ---- The machine ----


def test_the_commit_is_the_checkouts():
    done = subprocess.run(
        ["git", "-C", str(machine.CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("no git checkout")
    described = machine.describe()
    assert described["commit"] == done.stdout.strip()
    assert isinstance(described["dirty"], bool)


def test_a_package_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    described = machine.describe()
    assert (described["commit"], described["dirty"]) == (None, None)


def test_versions_and_threads_are_said():
    described = machine.describe()
    assert described["versions"]["torch"] == torch.__version__.split("+")[0] or (
        described["versions"]["torch"] == torch.__version__
    )
    assert described["cpu"]["threads"] == torch.get_num_threads()
    assert (described["gpu"] is None) == (not torch.cuda.is_available())


# ---- Running ----


def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_cpu_part_runs_and_the_others_are_named(monkeypatch):
    without_gpu(monkeypatch)
    found = benchmarks.run(settings=TINY, progress=False)
    parts = ("staging", "dequantize", "measure", "host")
    assert found.left_out[:4] == tuple(f"{part}: no CUDA device" for part in parts)
    assert found.failed == ()
    assert {sample.part for sample in found.samples} == {"cpu"}
    names = [sample.name for sample in found.samples]
    assert names[0] == "nvfp4" and names[-1] == "BF16 copy"
    absent = {text.split(":")[0] for text in found.left_out[4:]}
    assert absent == {f"cpu {name}" for name in cpu.PEERS} - {f"cpu {name}" for name in names}
    assert found.settings["only"] == list(running.PARTS)


def test_a_step_that_fails_is_named_and_the_others_go_on(monkeypatch):
    sample = Sample("cpu", "fine", 1, 128, (1.0,))

    def fails():
        raise RuntimeError("out of luck")

    steps = [Step("bad", fails), Step("good", lambda: Measured((sample,), left_out=("a peer",)))]
    fake = types.SimpleNamespace(steps=lambda settings: steps)
    monkeypatch.setattr(running.importlib, "import_module", lambda name: fake)
    found = benchmarks.run(["cpu"], TINY, progress=False)
    assert found.failed == ("bad: RuntimeError: out of luck",)
    assert (found.samples, found.left_out) == ((sample,), ("a peer",))


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"unknown parts \['gpu'\]; there are staging, dequantize"):
        benchmarks.run(["gpu"])


def test_the_command_offers_the_parts_that_there_are():
    assert cli.bench.PARTS == running.PARTS


def test_the_command_writes_and_prints(monkeypatch, tmp_path, capsys):
    without_gpu(monkeypatch)
    monkeypatch.setattr(benchmarks, "QUICK", TINY)
    out, plot = tmp_path / "cpu.json", tmp_path / "cpu.png"
    options = ["--only", "cpu", "host", "--quick", "--out", str(out), "--plot", str(plot)]
    assert cli.main(["bench", *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("cpu\nname")
    assert "left out: host: no CUDA device" in printed.out
    assert "nothing was staged" in printed.err and not plot.exists()
    assert printed.out == Result.load(out).table() + "\n"


def test_a_failed_step_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "run", lambda only, settings: result())
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == "nvfp4lab: failed: host: why\n"


def test_a_plot_is_drawn_of_what_was_staged(monkeypatch, tmp_path, capsys):
    done = result(machine={"gpu": {"name": "some GPU"}}, failed=())
    monkeypatch.setattr(benchmarks, "run", lambda only, settings: done)
    plot = tmp_path / "staging.png"
    assert cli.main(["bench", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("y", ["GB/s", "of_yardstick"])
def test_the_plot_has_a_line_a_name_with_the_numbers_of_the_frame(y):
    frame = result().frame().query("part == 'staging'")
    ax = plots.speed_over_tokens(frame, y, Figure().subplots())
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert list(drawn) == ["yardstick", "nvfp4", "seed"]
    for name, line in drawn.items():
        rows = frame.query(f"name == {name!r}").sort_values("tokens")
        assert np.array_equal(np.asarray(line.get_xdata(), float), rows["tokens"])
        assert np.array_equal(np.asarray(line.get_ydata(), float), rows[y], equal_nan=True)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "16"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens", plots.LABELS[y])


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(option, tmp_path, capsys):
    assert cli.main(["bench", option, str(tmp_path / "none" / "file")]) == 2
    assert "cannot be written: there is no folder" in capsys.readouterr().err


def test_every_part_runs_on_a_gpu(gpu):
    found = benchmarks.run(settings=TINY, progress=False)
    assert found.failed == ()
    assert {sample.part for sample in found.samples} == set(running.PARTS)
    assert all(us > 0 for sample in found.samples for us in sample.runs_us)
    assert {row["direction"] for row in found.sweep} == {
        "2 bytes in, 9/16 out",
        "9/16 bytes in, 2 out",
    }
