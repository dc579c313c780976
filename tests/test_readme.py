"""The README holds: its examples print what it says, its picture is the notebook's."""

import contextlib
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest

import nvfp4lab as nv
from nvfp4lab import runs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n((?:(?!```).)*)```\n\n```\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=["ten lines", "theory"])
def test_an_example_prints_what_it_says(code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed


def test_every_recipe_is_in_the_table_with_its_summary():
    table = README.partition("## The recipes")[2].partition("## ")[0]
    rows = re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", table, re.MULTILINE)
    summaries = [(name, nv.recipe(name).summary.removesuffix(".")) for name in nv.recipes()]
    assert [(n, text.lower()) for n, text in rows] == [(n, text.lower()) for n, text in summaries]


PICTURES = re.findall(r"!\[[^]]*\]\(notebooks/images/(\w+)\.png\)", README)


def test_there_are_two_pictures():
    assert len(PICTURES) == 2


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_notebooks_first_figure(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    picture = (ROOT / "notebooks" / "images" / f"{name}.png").read_bytes()
    assert picture == runs.first_figure(notebook), "run: nvfp4lab study --in-place"


# Paragraphs that begin in bold and end with the notebook that they are from.
SAID = {
    name: text
    for text, name in re.findall(
        r"^(\*\*(?:(?!\n\n).)*)\(\[(\w+)\]\(notebooks/", README, re.MULTILINE | re.DOTALL
    )
}


def test_there_are_three_findings():
    assert len(SAID) == 3


@pytest.mark.parametrize("name", SAID)
def test_a_findings_numbers_are_those_of_its_notebooks_opening(name):
    """There tests/test_notebooks.py wants each of them asserted."""
    opening = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source
    numbers = re.findall(r"\d+\.\d+|\d+(?= (?:%|dB|to|of)\b)", SAID[name])
    assert len(numbers) >= 4
    assert [number for number in numbers if number not in opening] == []


def test_the_speeds_are_those_of_the_measured_file():
    import make_speed

    assert f"<!-- {make_speed.NAME} -->" in README
    assert make_speed.renewed(README) == README, "run: python data/make_speed.py"


def test_the_table_of_speeds_has_every_name_and_number_of_tokens():
    import make_speed

    from nvfp4lab.benchmarks import Result, Sample

    samples = [
        Sample("staging", "yardstick", 8192, 7168, (40.0,), role="yardstick"),
        Sample("staging", "nvfp4", 8192, 7168, (50.0,)),
        Sample("staging", "yardstick", 1, 7168, (2.5,), role="yardstick"),
        Sample("staging", "nvfp4", 1, 7168, (3.12,)),
        Sample("staging", "nvfp4", 1, 4096, (1.0,)),
    ]
    machine = {
        "gpu": {"name": "a card"},
        "versions": {"triton": "3.6.0", "torch": "2.11.0"},
        "date": "2026-11-25T23:11:51+00:00",
    }
    assert make_speed.speed(Result(machine, {}, tuple(samples))) == (
        "a card, Triton 3.6.0, torch 2.11.0, 2026-11-25; "
        "microseconds, and in brackets the share of the yardstick's speed:\n\n"
        "| tokens x 7168 | 1 | 8192 |\n| --- | --- | --- |\n"
        "| yardstick | 2.5 us | 40.0 us |\n| `nvfp4` | 3.1 us (0.80) | 50.0 us (0.80) |\n"
    )


def test_every_path_of_the_map_and_every_link_exists():
    paths = re.findall(r"^(nvfp4lab/\S+|notebooks/|tests/)", README, re.MULTILINE)
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(paths) >= 12 and links
    assert [p for p in [*paths, *links] if not (ROOT / p).exists()] == []
