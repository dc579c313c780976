"""Whatever a file holds, reading it ends in a value or a ValueError that names it, and in no more.

No hang, no other exception, no write outside a folder, no code run.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile_files
import numpy as np
import pytest
import torch
from sweep_runs import hidden, save

import nvfp4lab as nv
from nvfp4lab import cli
from nvfp4lab.benchmarks.results import Result
from nvfp4lab.capture.folder import CaptureFolder, seal
from nvfp4lab.capture.prompts import read_prompts
from nvfp4lab.checked_json import parse
from nvfp4lab.records import record_files
from nvfp4lab.statistics import Statistics

PACKAGE = Path(nv.__file__).parent


def wrong(read: Callable[[], object], path: Path) -> str:
    """What is wrong with how it is read: nothing for a value, or for a ValueError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except (ValueError, OSError) as error:
        said = str(error)
        return "" if str(path) in said and len(said) < 2000 else f"{type(error).__name__}: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_no_file_that_is_not_a_record_is_loaded(tmp_path):
    path = tmp_path / "x y.safetensors"
    path.write_bytes(hostile_files.packed(*hostile_files.record()))
    assert len(nv.load_activations(path)) == 1
    bad = {}
    for name, content in hostile_files.safetensors_files():
        path.write_bytes(content)
        loaded = []
        how = wrong(lambda got=loaded: got.extend(nv.load_activations(path)), path)
        if how or loaded:
            bad[name] = how or "loaded"
    assert not bad


def test_a_turned_bit_of_a_record_gives_a_record_or_a_value_error(tmp_path):
    path = tmp_path / "a.safetensors"
    good = hostile_files.packed(*hostile_files.record())
    bad = {}
    for name, content in hostile_files.flipped(good, 1500):
        path.write_bytes(content)
        if how := wrong(lambda: repr(nv.load_activations(path)), path):
            bad[name] = how
    assert not bad


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("made", ["pipe", "device", "folder", "loop"])
def test_what_is_no_regular_file_is_named_as_failed_and_the_rest_counted(tmp_path, made):
    odd = tmp_path / "a.safetensors"
    {
        "pipe": lambda: os.mkfifo(odd),
        "device": lambda: odd.symlink_to("/dev/zero"),
        "folder": lambda: odd.mkdir(),
        "loop": lambda: odd.symlink_to(odd),
    }[made]()
    save(tmp_path / "b.safetensors", hidden(8, 0))
    assert len(record_files(tmp_path)) == 2
    swept = nv.sweep_statistics(tmp_path, "nvfp4", progress=False)
    assert [failure.path for failure in swept.failed] == [str(odd)]
    assert [one.tokens for one in swept.statistics.values()] == [8]


def test_deep_metadata_fails_one_shard_of_a_sweep(tmp_path):
    deep = hostile_files.ABOUTS["deep provenance"]
    (tmp_path / "a.safetensors").write_bytes(hostile_files.packed(*hostile_files.record(deep)))
    save(tmp_path / "b.safetensors", hidden(8, 0))
    swept = nv.sweep_statistics(tmp_path, "nvfp4", progress=False)
    assert len(swept.failed) == 1 and [one.tokens for one in swept.statistics.values()] == [8]


# JSON --------------------------------------------------------------------------------------------


def columns(rows: int) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    own = {"hidden": torch.ones(rows, 32).bfloat16(), "positions": torch.arange(rows)}
    return {(3, "expert_input"): own}


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A capture with a shard, and rows in none yet."""
    folder = tmp_path / "whole"
    for rows, last in ((4, False), (3, True)):
        capture = CaptureFolder(folder, {"is": "x"}, {"a": 1}, 1 << 20)
        capture.commit(columns(rows), rows)
        capture.abandon() if last else capture.finish()
    return folder


def outside(root: Path, folder: Path) -> set[tuple[Path, int]]:
    found = (p for p in root.rglob("*") if p != folder and folder not in p.parents)
    return {(p, p.stat().st_size) for p in found}


def test_no_capture_json_writes_outside_its_folder_or_fails_unnamed(tmp_path, interrupted):
    document = json.loads((interrupted / "capture.json").read_text())
    folder, bad = tmp_path / "in" / "copy", {}
    for name, text in hostile_files.mutants(document):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(interrupted, folder)
        (folder / "capture.json").write_bytes(text)
        before = outside(tmp_path, folder)
        how = wrong(lambda: (seal(folder), nv.load_activations(folder)), folder)
        if how or outside(tmp_path, folder) != before or list(Path("/etc").glob("x.*")):
            bad[name] = how or "wrote outside"
    assert not bad


def test_no_site_of_a_capture_leads_out_of_its_folder(tmp_path, interrupted):
    """The label, which names files, made to agree with it, as no single change of a part does."""
    document = json.loads((interrupted / "capture.json").read_text())
    before = outside(tmp_path, interrupted)
    (about,) = document["sites"].values()
    for site in ("/../../../out", "/../../out", "a/b", "\0"):
        sites = {f"layer03.{site}": {**about, "site": site}}
        (interrupted / "capture.json").write_text(json.dumps({**document, "sites": sites}))
        with pytest.raises(ValueError, match="expected the label of layer 3"):
            seal(interrupted)
    assert outside(tmp_path, interrupted) == before


@pytest.mark.parametrize("where", ["rows", "file"])
def test_a_link_among_the_rows_is_not_followed(tmp_path, interrupted, where):
    precious = tmp_path / "precious"
    rows = interrupted / "rows"
    if where == "rows":
        shutil.rmtree(rows)
        precious.mkdir()
        (precious / "kept").write_text("kept")
        rows.symlink_to(precious)
    else:
        precious.write_text("kept" * 1000)
        (rows / "layer03.expert_input.hidden").unlink()
        (rows / "layer03.expert_input.hidden").symlink_to(precious)
    with pytest.raises(ValueError, match="is a link or no file"):
        seal(interrupted)
    file = precious / "kept" if where == "rows" else precious
    assert file.read_text().startswith("kept") and file.stat().st_size in (4, 4000)


@pytest.mark.parametrize("which", ["note", "largest.json"])
def test_no_state_of_a_sweep_is_counted_wrong_or_fails_unnamed(tmp_path, which):
    shard, state = save(tmp_path / "a.safetensors", hidden(300, 0)), tmp_path / "state"
    recipes = ["nvfp4-tensor"]
    want = nv.sweep_statistics(shard, recipes, state=state, progress=False).statistics
    npz = next(state.glob("*.npz"))
    statistics, note = Statistics.load_with_note(npz)
    file = npz if which == "note" else state / which
    document = json.loads(note if which == "note" else file.read_text())
    good, bad = npz.read_bytes(), {}

    def sweep() -> None:
        got = nv.sweep_statistics(shard, recipes, state=state, progress=False)
        assert which != "note" or got.statistics == want, "counted wrong"

    for name, text in hostile_files.mutants(document):
        npz.write_bytes(good)
        if which == "note":
            statistics.save(npz, text.decode("utf-8"))
        else:
            file.write_bytes(text)
        if how := wrong(sweep, state):
            bad[name] = how
    assert not bad


def test_no_benchmark_result_fails_unnamed(tmp_path):
    sample = {"part": "staging", "name": "nvfp4", "tokens": 1, "width": 128, "bytes": 1}
    sample |= {"runs_us": [1.0], "role": "measured", "note": "", "group": ""}
    document = {"machine": {}, "settings": {}, "samples": [sample], "sweep": [{}]}
    document |= {"left_out": ["a"], "failed": ["b"]}
    path, bad = tmp_path / "r.json", {}
    path.write_text(json.dumps(document))
    Result.load(path)
    for name, text in hostile_files.mutants(document):
        path.write_bytes(text)
        if how := wrong(lambda: (lambda r: (r.table(), r.to_json()))(Result.load(path)), path):
            bad[name] = how
    assert not bad


@pytest.mark.parametrize("document", [{"text": "a"}, {"messages": [{"content": "a"}]}])
def test_no_line_of_prompts_fails_unnamed(tmp_path, document):
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize):
            return "".join(message["content"] for message in messages)

    path, bad = tmp_path / "p.jsonl", {}
    for name, text in [*hostile_files.mutants(document), ("not UTF-8", b"\xff\xfe")]:
        path.write_bytes(text + b"\n")
        if how := wrong(lambda: list(read_prompts(path, Tokenizer())), path):
            bad[name] = how
    assert not bad


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        ({"a": int}, '{"a": true}', r"expected a whole number at \['a'\], found True"),
        ({"a": range(3)}, '{"a": 3}', "expected a whole number from 0 to 2 .*, found 3"),
        ({"a": range(3)}, '{"a": true}', "expected a whole number from 0 to 2 .*, found True"),
        ({"a": range(3)}, '{"a": 1.0}', r"expected a whole number from 0 to 2 .*, found 1\.0"),
        ([(int, str)], '[[1, "a"], [2]]', r"expected a list of 2 at \[1\], found \[2\]"),
        ({str: {"x", "y"}}, '{"k": "z"}', r"expected one of x, y at \['k'\], found 'z'"),
        (float, '"1"', "expected a number, found '1'"),
        (object, '"\\ud800"', "expected JSON; .*surrogates not allowed"),
    ],
)
def test_a_document_of_another_shape_is_refused_with_its_place(shape, text, message):
    with pytest.raises(ValueError, match=f"f.json: {message}"):
        parse(text, "f.json", shape)


# statistics --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "s.npz"
    nv.measure(hidden(8, 0, width=32), "nvfp4").save(path, "note")
    return path


def test_a_turned_bit_of_statistics_changes_nothing_or_is_a_value_error(saved):
    want, good, bad = Statistics.load(saved), saved.read_bytes(), {}

    def load() -> None:
        assert Statistics.load(saved) == want, "altered"

    for name, content in [
        *hostile_files.flipped(good, 1000),
        *((f"cut {n}", good[:n]) for n in (0, 9, 99, 2000)),
    ]:
        saved.write_bytes(content)
        if how := wrong(load, saved):
            bad[name] = how
    assert not bad


def test_arrays_of_another_kind_are_no_statistics(saved):
    with np.load(saved) as file:
        arrays = {name: file[name] for name in file.files}
    accepted = []
    for name, array in arrays.items():
        if array.ndim == 0:
            continue
        others = {
            "pickled": np.array([{}], dtype=object),
            "longer": np.concatenate([array, array]),
            "two-dimensional": array[None],
            "complex": np.zeros(array.shape, complex),
            "dates": np.zeros(array.shape, "M8[s]"),
        }
        for what, other in others.items():
            np.savez_compressed(saved, **arrays | {name: other})
            with pytest.raises(ValueError, match="is no whole file of statistics"):
                accepted.append((name, what, Statistics.load(saved)))
    assert not accepted


@pytest.mark.parametrize("name", ["element_codes", "amax_xx", "channel_ee", "block_qsnr"])
def test_counts_and_squares_below_zero_are_no_statistics(saved, name):
    with np.load(saved) as file:
        arrays = {n: file[n] for n in file.files}
    np.savez_compressed(saved, **arrays | {name: -1 - arrays[name]})
    with pytest.raises(ValueError, match=f"{name} is never below 0"):
        Statistics.load(saved)


# memory ------------------------------------------------------------------------------------------

PEAKS = """
import json, sys
import nvfp4lab as nv
from nvfp4lab import cli
from nvfp4lab.statistics import Statistics

def peak():
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024

nv.load_activations, nv.identify, Statistics.load  # imported before anything is measured
for path in sys.argv[1:]:
    before, said = peak(), 'read'
    try:
        Statistics.load(path) if path.endswith('.npz') else nv.load_activations(path)
    except ValueError as error:
        said = str(error)
    print(json.dumps([path, peak() - before, said]))
"""


def unpacks_to(path: Path, size: int, member: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Make one array of statistics zeros of so many bytes, which take a thousandth of them."""
    with np.load(path) as file, zipfile.ZipFile(path) as whole:
        others = {name: whole.read(f"{name}.npy") for name in file.files if name != member}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for name, content in others.items():
            zipped.writestr(f"{name}.npy", content)
        with zipped.open(f"{member}.npy", "w") as file:
            about = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))


BOMB = 300 << 20  # bytes unpacked
BOMBS = {  # file: an array of statistics, its dtype and shape
    "counts.npz": ("element_codes", "<i8", (BOMB // 8,)),
    "note.npz": ("note", f"<U{BOMB // 4}", ()),
    "unknown.npz": ("evil", "<f8", (BOMB // 8,)),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_no_file_takes_much_more_memory_than_its_bytes(tmp_path, saved):
    most = {}  # file -> MB
    for name, (member, dtype, shape) in BOMBS.items():
        shutil.copy(saved, tmp_path / name)
        unpacks_to(tmp_path / name, BOMB, member, dtype, shape)
        most[name] = 50
    text = {**hostile_files.ABOUT, "provenance": {"is": "y" * 50_000_000}}
    (tmp_path / "text").write_bytes(hostile_files.packed(*hostile_files.record(json.dumps(text))))
    most["text"] = 500
    header, body = hostile_files.record()
    end = {"dtype": "U8", "shape": [0], "data_offsets": [len(body), len(body)]}
    many = {**header, **{f"t{i}": end for i in range(10**6)}}
    (tmp_path / "tensors").write_bytes(hostile_files.packed(many, body))
    most["tensors"] = 1500
    paths = [str(tmp_path / name) for name in most]
    done = subprocess.run([sys.executable, "-c", PEAKS, *paths], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = {Path(path).name: rest for path, *rest in map(json.loads, done.stdout.splitlines())}
    assert not {name: grown for name, (grown, _) in found.items() if grown > most[name]}
    said = {name: text for name, (_, text) in found.items()}
    assert said.pop("text") == "read"
    assert not {name: text for name, text in said.items() if name not in text or len(text) > 2000}


# what is run, and what a terminal gets ----------------------------------------------------------

RUNS_CODE = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "yaml", "dill"}
OF_TORCH = {"load"}  # torch.load unpickles
# file -> why it may: it runs what is in the package, never what a file holds
EXCEPTIONS: dict[tuple[str, str], str] = {}


def calls_that_run_code(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {name.split(".")[0] for name in names} & (RUNS_CODE - {"compile"})
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & RUNS_CODE
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            if owner == "torch" and node.func.attr in OF_TORCH:
                found.add("torch.load")
            if owner == "np" and node.func.attr == "load":
                pickles = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                if not (pickles and getattr(pickles[0], "value", True) is False):
                    found.add("np.load")
    return found


def test_nothing_in_the_package_runs_what_a_file_holds():
    found = {
        (path.relative_to(PACKAGE).as_posix(), call)
        for path in PACKAGE.rglob("*.py")
        for call in calls_that_run_code(path)
    }
    assert found == set(EXCEPTIONS)


def test_no_escape_sequence_of_a_file_reaches_the_terminal(tmp_path, capsys):
    save(tmp_path / "a.safetensors", hidden(8, 0), site="\x1b]0;owned\x07\x9b31m")
    (tmp_path / "b\x1b[31m.safetensors").write_bytes(b"no record")
    state = ["--recipes", "nvfp4", "--out", str(tmp_path / "o.csv")]
    assert cli.main(["sweep", str(tmp_path), *state]) == 1
    printed = capsys.readouterr()
    assert "\\x1b]0;owned\\x07\\x9b31m" in printed.out and "\\x1b[31m" in printed.err
    assert not {"\x1b]", "\x07", "\x9b"} & set(printed.out)
    assert "\x1b[31m" not in printed.out + printed.err and "\x1b]" not in printed.out
