"""The recorder and its folder: every row that was recorded is there once, whatever happens.

A pass here is random hidden states at two sites; engines are stood in for by calling the recorder.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nvfp4lab as nv
from nvfp4lab.capture import Recorder, folder, seal

ABOUT = {"is": "random numbers", "date": "2026-01-01"}
WIDTHS = {0: 32, 3: 64}  # of the two layers
TOP_K = 2
ROW_BYTES = sum(2 * width + 8 + TOP_K * (8 + 4) for width in WIDTHS.values())


def a_pass(number: int, tokens: int = 10) -> dict[int, tuple[torch.Tensor, ...]]:
    """layer -> hidden float32 [T, D], ids int64 [T, k], weights float16 [T, k]."""
    generator = torch.Generator().manual_seed(number)
    return {
        layer: (
            torch.randn(tokens, width, generator=generator),
            torch.randint(0, 9, (tokens, TOP_K), generator=generator),
            torch.rand(tokens, TOP_K, generator=generator).half(),
        )
        for layer, width in WIDTHS.items()
    }


def record(recorder: Recorder, number: int, tokens: int = 10, valid=None) -> None:
    recorder.begin(torch.arange(tokens) + 100 * number, valid)
    for layer, columns in a_pass(number, tokens).items():
        recorder.take(layer, *columns)
    recorder.end()


def read(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """site -> its columns, the shards joined."""
    sites: dict[str, list[nv.Activations]] = {}
    for shard in nv.load_activations(path, sha256=True):
        sites.setdefault(shard.label, []).append(shard)
    names = ("hidden", "positions", "topk_ids", "topk_weights")
    return {
        label: {name: torch.cat([getattr(s, name) for s in shards]) for name in names}
        for label, shards in sites.items()
    }


def require_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for label, columns in want.items():
        for name, tensor in columns.items():
            assert got[label][name].dtype == tensor.dtype
            assert got[label][name].equal(tensor), f"{label} {name}"


def expected(passes: range, tokens: int = 10) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"layer{layer:02d}.expert_input": {
            "hidden": torch.cat([a_pass(i, tokens)[layer][0] for i in passes]).bfloat16(),
            "positions": torch.cat([torch.arange(tokens) + 100 * i for i in passes]),
            "topk_ids": torch.cat([a_pass(i, tokens)[layer][1] for i in passes]),
            "topk_weights": torch.cat([a_pass(i, tokens)[layer][2] for i in passes]).float(),
        }
        for layer in WIDTHS
    }


def routing(site: nv.Activations) -> tuple[torch.Tensor, torch.Tensor]:
    assert site.topk_ids is not None and site.topk_weights is not None
    return site.topk_ids, site.topk_weights


# what is recorded -------------------------------------------------------------------------------


def test_every_row_is_there_in_order_as_bf16_and_float32(tmp_path):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        for number in range(4):
            record(recorder, number)
    require_same(read(tmp_path / "c"), expected(range(4)))


def test_int32_ids_stay_int32_and_narrower_ones_become_int64(tmp_path):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        recorder.begin(torch.arange(2))
        for layer, dtype in enumerate((torch.int32, torch.int16)):
            recorder.take(layer, torch.ones(2, 16), torch.ones(2, 1, dtype=dtype), torch.ones(2, 1))
        recorder.end()
    dtypes = [routing(site)[0].dtype for site in nv.load_activations(tmp_path / "c")]
    assert dtypes == [torch.int32, torch.int64]


def test_padding_is_dropped(tmp_path):
    valid = torch.tensor([True, False] * 5)
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        record(recorder, 0, valid=valid)
    want = {
        label: {name: tensor[valid] for name, tensor in columns.items()}
        for label, columns in expected(range(1)).items()
    }
    require_same(read(tmp_path / "c"), want)


def test_only_the_chosen_layers_are_recorded(tmp_path):
    with Recorder(tmp_path / "c", ABOUT, layers=[3]) as recorder:
        record(recorder, 0)
    assert list(read(tmp_path / "c")) == ["layer03.expert_input"]


def test_a_dense_site_has_no_ids(tmp_path):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        recorder.begin(torch.arange(2))
        recorder.take(0, torch.ones(2, 16), site="mlp_input")
        recorder.end()
    (site,) = nv.load_activations(tmp_path / "c")
    assert (site.label, site.topk_ids) == ("layer00.mlp_input", None)


def test_which_tokens_are_kept_does_not_depend_on_the_passes(tmp_path):
    """120 tokens in passes of 10, and the same with the stream cut at other places."""
    for name, tokens in (("a", 10), ("b", 24)):
        with Recorder(tmp_path / name, ABOUT, keep=0.3, seed=5) as recorder:
            for start in range(0, 120, tokens):
                recorder.begin(torch.arange(start, start + tokens))
                recorder.take(
                    0, torch.arange(start, start + tokens)[:, None].expand(-1, 16).float()
                )
                recorder.end()
    (a,) = nv.load_activations(tmp_path / "a")
    (b,) = nv.load_activations(tmp_path / "b")
    assert a.positions.equal(b.positions) and a.hidden.equal(b.hidden)
    assert 0 < len(a) < 120


def test_the_share_kept_is_the_one_asked_for_and_the_seed_chooses(tmp_path):
    kept = {}
    for seed in (0, 1):
        with Recorder(tmp_path / str(seed), ABOUT, keep=0.25, seed=seed) as recorder:
            recorder.begin(torch.arange(20_000))
            recorder.take(0, torch.zeros(20_000, 1))
            recorder.end()
        kept[seed] = set(nv.load_activations(tmp_path / str(seed))[0].positions.tolist())
        assert abs(len(kept[seed]) - 5000) < 5 * 61.2  # five standard deviations
    expected_common = 20_000 / 16
    assert abs(len(kept[0] & kept[1]) - expected_common) < 5 * 34.3


def test_the_token_budget_is_met_and_then_nothing_is_recorded(tmp_path):
    with Recorder(tmp_path / "c", ABOUT, tokens=25) as recorder:
        for number in range(5):
            record(recorder, number)
        assert (recorder.full, recorder.rows, recorder.passes) == (True, 25, 3)
    want = {
        label: {name: tensor[:25] for name, tensor in columns.items()}
        for label, columns in expected(range(5)).items()
    }
    require_same(read(tmp_path / "c"), want)


@pytest.mark.parametrize("rows", [0.5, 1, 10, 14.5])
def test_the_byte_budget_is_used_and_not_exceeded(tmp_path, rows):
    budget = int(rows * ROW_BYTES)
    with Recorder(tmp_path / "c", ABOUT, max_bytes=budget) as recorder:
        for number in range(3):
            record(recorder, number)
        assert recorder.full
        assert recorder.bytes == int(rows) * ROW_BYTES


def test_a_budget_can_be_raised_later(tmp_path):
    for tokens in (20, 40):
        with Recorder(tmp_path / "c", ABOUT, tokens=tokens) as recorder:
            for number in range(recorder.passes, 9):
                record(recorder, number)
    require_same(read(tmp_path / "c"), expected(range(4)))


def test_shards_are_no_larger_than_asked_and_lose_nothing(tmp_path):
    limit = 25 * (2 * WIDTHS[3] + 8 + TOP_K * 12)  # 25 rows of the wider site
    with Recorder(tmp_path / "c", ABOUT, shard_bytes=limit) as recorder:
        for number in range(7):
            record(recorder, number)
    names = sorted(p.name for p in (tmp_path / "c").glob("*.safetensors"))
    shards = [f"{site}.{i:05d}.safetensors" for site in expected(range(1)) for i in range(4)]
    assert names == sorted(shards)
    assert {len(s) for s in nv.load_activations(tmp_path / "c")} == {20, 10}
    require_same(read(tmp_path / "c"), expected(range(7)))


def test_a_pass_that_did_not_end_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), Recorder(tmp_path / "c", ABOUT) as recorder:
        record(recorder, 0)
        recorder.begin(torch.arange(10))
        recorder.take(0, *a_pass(1)[0])
        raise KeyError
    require_same(read(tmp_path / "c"), expected(range(1)))


# wrong use --------------------------------------------------------------------------------------


def begun(tmp_path, **options) -> Recorder:
    recorder = Recorder(tmp_path / "c", ABOUT, **options)
    recorder.begin(torch.arange(4))
    return recorder


WRONG_TAKES = {
    "rows": ((torch.ones(5, 16),), ValueError, r"layer 1: expected 4 rows each, .*\(5, 16\)"),
    "one dimension": ((torch.ones(4),), ValueError, r"expected 4 rows each"),
    "ids alone": (
        (torch.ones(4, 16), torch.ones(4, 2, dtype=torch.int64)),
        ValueError,
        "expected topk ids and weights, or neither",
    ),
    "weights before ids": (
        (torch.ones(4, 16), torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64)),
        ValueError,
        "expected integer topk ids, got torch.float32",
    ),
    "ids below -1": (
        (torch.ones(4, 16), torch.full((4, 2), -2), torch.ones(4, 2)),
        ValueError,
        "expected topk ids of -1 or more, got -2",
    ),
}


@pytest.mark.parametrize("case", WRONG_TAKES)
def test_what_is_no_record_is_not_taken(tmp_path, case):
    arguments, error, message = WRONG_TAKES[case]
    with pytest.raises(error, match=message):
        begun(tmp_path).take(1, *arguments)


def test_a_layer_comes_once_in_a_pass(tmp_path):
    recorder = begun(tmp_path)
    recorder.take(1, torch.ones(4, 16))
    with pytest.raises(RuntimeError, match="layer 1, expert_input came twice"):
        recorder.take(1, torch.ones(4, 16))


def test_outside_a_pass_nothing_can_be_taken(tmp_path):
    recorder = Recorder(tmp_path / "c", ABOUT)
    with pytest.raises(RuntimeError, match="layer 0 came outside a pass"):
        recorder.take(0, torch.ones(4, 16))


def test_every_pass_has_the_same_sites(tmp_path):
    recorder = begun(tmp_path)
    recorder.take(1, torch.ones(4, 16))
    recorder.end()
    recorder.begin(torch.arange(4))
    recorder.take(2, torch.ones(4, 16))
    with pytest.raises(ValueError, match=r"this pass gave layer.*expected the sites"):
        recorder.end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"tokens": 0}, "tokens of 1 or more, got 0"),
        ({"max_bytes": -1}, "max_bytes of 1 or more, got -1"),
        ({"shard_bytes": 0}, "shard_bytes of 1 or more, got 0"),
        ({"layers": []}, r"layers of 0 or more, got \[\]"),
        ({"layers": [-1]}, r"layers of 0 or more, got \[-1\]"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Recorder(tmp_path / "c", ABOUT, **options)
    assert not (tmp_path / "c").exists()


# whose folder it is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "options", "message"),
    [
        ({"is": "others"}, {}, r"another is \('others', there 'random numbers'\)"),
        (ABOUT, {"seed": 1}, r"another seed \(1, there 0\)"),
        (ABOUT, {"layers": [3]}, r"another layers \(\[3\], there None\)"),
    ],
)
def test_another_capture_is_not_mixed_in(tmp_path, about, options, message):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        record(recorder, 0)
    with pytest.raises(ValueError, match=message):
        Recorder(tmp_path / "c", about, **options)
    require_same(read(tmp_path / "c"), expected(range(1)))


def test_a_later_date_is_the_same_capture(tmp_path):
    for number, date in enumerate(("2026-01-01", "2026-01-02")):
        with Recorder(tmp_path / "c", ABOUT | {"date": date}) as recorder:
            record(recorder, number)
    require_same(read(tmp_path / "c"), expected(range(2)))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no capture.json"):
        Recorder(tmp_path, ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_two_writers_do_not_share_a_folder(tmp_path):
    first = Recorder(tmp_path / "c", ABOUT)
    with pytest.raises(RuntimeError, match="is being written by another process"):
        Recorder(tmp_path / "c", ABOUT)
    record(first, 0)
    first.finish()
    require_same(read(tmp_path / "c"), expected(range(1)))


# interruptions ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


STEPS = {  # what changes a file for good; to flush takes long, and an end like this needs none
    "replace": os.replace,
    "truncate": os.truncate,
    "fsync": lambda file: None,
}


def capture_until(path: Path, step: int | None, monkeypatch) -> bool:
    """Go on with a capture of six passes in small shards, and die at the given step if it is
    reached. True if all six are there.
    """
    count = itertools.count()
    with monkeypatch.context() as patch:
        for name, real in STEPS.items():

            def dying(*arguments, real=real):
                if next(count) == step:
                    raise Killed
                return real(*arguments)

            patch.setattr(os, name, dying)
        try:
            recorder = Recorder(path, ABOUT, shard_bytes=25 * 160)
            for number in range(recorder.passes, 6):
                record(recorder, number)
            recorder.finish()
            return True
        except Killed:
            return False  # the recorder, and with it the lock, goes as in a process that dies


def test_dying_at_any_step_loses_and_doubles_nothing(tmp_path, monkeypatch):
    for step in itertools.count():
        path = tmp_path / str(step)
        done = capture_until(path, step, monkeypatch)
        if not done:
            assert capture_until(path, None, monkeypatch)
        require_same(read(path), expected(range(6)))
        if done:
            break
    assert step > 50  # the steps were there to die at


def test_dying_again_and_again_loses_and_doubles_nothing(tmp_path, monkeypatch):
    for life in range(400):
        if capture_until(tmp_path / "c", 12 + life % 9, monkeypatch):
            break
    else:
        pytest.fail("never done")
    assert life > 3
    require_same(read(tmp_path / "c"), expected(range(6)))


CHILD = """
import sys
sys.path.insert(0, "tests")
from test_capture import ABOUT, Recorder, record
recorder = Recorder(sys.argv[1], ABOUT, shard_bytes=25 * 160)
for number in range(recorder.passes, 40):
    record(recorder, number)
    print(number, flush=True)
recorder.finish()
"""


def test_a_killed_process_loses_and_doubles_nothing(tmp_path):
    """SIGKILL while it writes, at three places, and once more to the end."""
    root = Path(__file__).resolve().parent.parent
    for stop in (3, 17, 30, None):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "c")],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for line in child.stdout:
            if stop is not None and int(line) >= stop:
                time.sleep(0.003)  # into the next pass
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.close()
        assert child.wait() == (0 if stop is None else -signal.SIGKILL)
    require_same(read(tmp_path / "c"), expected(range(40)))


def interrupted(path: Path) -> None:
    recorder = Recorder(path, ABOUT)
    record(recorder, 0)
    record(recorder, 1)
    recorder._folder.abandon()


def test_an_interrupted_capture_is_not_read_as_if_it_were_whole(tmp_path):
    interrupted(tmp_path / "c")
    with pytest.raises(ValueError, match="was interrupted: 20 rows are in no shard yet"):
        nv.load_activations(tmp_path / "c")


def test_an_interrupted_capture_can_be_sealed(tmp_path):
    interrupted(tmp_path / "c")
    seal(tmp_path / "c")
    require_same(read(tmp_path / "c"), expected(range(2)))


def test_what_is_no_capture_cannot_be_sealed(tmp_path):
    with pytest.raises(ValueError, match=r"is no capture: expected a capture.json"):
        seal(tmp_path)


def test_lost_rows_are_noticed(tmp_path):
    interrupted(tmp_path / "c")
    file = tmp_path / "c" / folder.ROWS / "layer03.expert_input.hidden"
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=r"hidden holds 100 bytes, expected the 2560 that were"):
        Recorder(tmp_path / "c", ABOUT)


def test_a_shard_that_capture_json_does_not_name_does_not_count(tmp_path):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        record(recorder, 0)
    source = tmp_path / "c" / "layer00.expert_input.00000.safetensors"
    (tmp_path / "c" / "layer00.expert_input.00001.safetensors").write_bytes(source.read_bytes())
    require_same(read(tmp_path / "c"), expected(range(1)))


def test_capture_json_cannot_lead_out_of_its_folder(tmp_path):
    with Recorder(tmp_path / "c", ABOUT) as recorder:
        record(recorder, 0)
    file = tmp_path / "c" / "capture.json"
    state = json.loads(file.read_text())
    state["files"][0]["path"] = "../secret.safetensors"
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"the name of a file, without .*, found '\.\./secret"):
        nv.load_activations(tmp_path / "c")
