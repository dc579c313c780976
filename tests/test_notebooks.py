"""The notebooks as they are committed: form, size, outputs, and that every number is asserted.

That they run, and that what they assert holds, is `make study`'s.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from nvfp4lab import publish, runs

FOLDER = Path(__file__).parents[1] / "notebooks"
STUDIES = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
each_study = pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
each = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
LARGEST = 600_000  # bytes

# What prose measures: 22.6, 1,737, 1.6 %, 22 dB, 16 times, 3 octaves. Not formats, layers,
# counts of what there is, or powers of two.
UNITS = r"%|(?:dB|times|percent|octaves?|binades?|us|µs|ms|[GT]B/s)\b"
MEASURED = re.compile(
    rf"(?<![\w.^⁻])(\d[\d,]*\.\d+|\d{{1,3}}(?:,\d{{3}})+|\d[\d,]*(?=\s?(?:{UNITS})))(?![\w.]*\w)"
)
NUMBER = re.compile(r"(?<![\w.^])\d[\d,]*(?:\.\d+)?(?!\w|\.\w)")  # not of `nvfp4`, .1f or layer05


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose_of(notebook: nbformat.NotebookNode) -> str:
    """All Markdown, less what is no statement: code, links' targets, arXiv numbers."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return re.sub(r"(arXiv|version)[ :]*[\d.]+|\b\d{4}\.\d{5}\b", " ", text)


def compared_in(node: ast.AST) -> list[str]:
    """The numbers that an expression compares: of its literals, less keys, arguments and formats.

    `at["layer05", 3]`, `theory(recipe, -9)` and `f"{x:.2f}"` name places and digits, not what was
    found.
    """
    if isinstance(node, ast.Constant):
        known = isinstance(node.value, str | int | float) and not isinstance(node.value, bool)
        return NUMBER.findall(str(node.value)) if known else []
    if isinstance(node, ast.Subscript | ast.FormattedValue):
        return compared_in(node.value)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in ("abs", "all", "any"):
        return compared_in(node.func)
    return [number for child in ast.iter_child_nodes(node) for number in compared_in(child)]


def asserts_that_run(statements: list[ast.stmt]) -> Iterator[ast.Assert]:
    """Those of a cell that cannot be passed over: not in functions or under `if`."""
    for statement in statements:
        if isinstance(statement, ast.Assert):
            yield statement
        elif isinstance(statement, ast.For | ast.With):
            yield from asserts_that_run(statement.body)


def asserted_by(notebook: nbformat.NotebookNode) -> set[str]:
    """Every number that an assert statement compares; its message is no part of it."""
    cells = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    asserts = [found for cell in cells for found in asserts_that_run(cell.body)]
    return {number for found in asserts for number in compared_in(found.test)}


def not_asserted(notebook: nbformat.NotebookNode) -> list[str]:
    """The measured numbers of the prose that stand in no assert statement."""
    known = {number.replace(",", "") for number in asserted_by(notebook)}
    numbers = MEASURED.findall(prose_of(notebook))
    return [n for n in dict.fromkeys(numbers) if n.replace(",", "") not in known]


@each_study
def test_it_opens_with_its_number_its_finding_and_what_the_activations_are(path):
    first = read(path).cells[0]
    title, summary = publish.describe(read(path))
    assert first.cell_type == "markdown"
    assert title.startswith(f"{path.stem[:2]} · ")
    assert len(re.findall(r"[.!?](?:\s|$)", summary)) == 2
    assert "DeepSeek V4" in first.source  # and that these are not of it


@each
def test_it_has_one_cell_of_parameters_and_it_comes_first(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert ["parameters" in cell.metadata.get("tags", []) for cell in code].index(True) == 0
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@each_study
def test_its_first_output_is_a_figure(path):
    outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
    assert "image/png" in outputs[0].get("data", {})


@each_study
def test_every_number_of_its_prose_is_asserted(path):
    assert not_asserted(read(path)) == []


@each
def test_its_outputs_are_those_of_its_cells_and_no_error(path):
    notebook = read(path)
    assert notebook.metadata.get("nvfp4lab") == {"outputs_of": runs.digest(notebook)}, (
        "run: nvfp4lab study --in-place"
    )
    kinds = {o.output_type for cell in notebook.cells for o in cell.get("outputs", [])}
    assert kinds <= {"stream", "display_data", "execute_result"}
    streams = {o.get("name") for cell in notebook.cells for o in cell.get("outputs", [])}
    assert "stderr" not in streams


@each_study
def test_its_picture_is_its_first_figure(path):
    picture = FOLDER / "images" / f"{path.stem}.png"
    assert picture.read_bytes() == runs.first_figure(read(path)), "run: nvfp4lab study --in-place"


@each
def test_every_cell_that_runs_has_been_run_in_order(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each
def test_it_is_small(path):
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize(
    ("prose", "code", "missing"),
    [
        ("It is 22.6 % of 16.", "assert f'{x:.1%}' == '22.6%'", []),
        ("It is 22.6 % of 16.", "y = 22.6", ["22.6"]),
        ("Of 1,024.5 and 3 dB", "assert x == 1024.5", ["3"]),
        ("`nvfp4` at 2⁻⁹, layer 5, E4M3, `3.5`", "pass", []),
        ("[a](b_1.5.png), arXiv 2601.19026, 8 times", "assert round(x) == 8", []),
        ("1,737 octaves", "assert f'{x:,.0f}' == '1,737'", []),
        ("A ratio of 1,737, in 3 octaves", "pass", ["1,737", "3"]),
        # What an assert mentions, but does not compare:
        ("It is 1 %", "assert f'{x:.1%}' == f'{y:.1%}'", ["1"]),
        ("It is 4 dB", "assert x['nvfp4', 4] == at(4)", ["4"]),
        ("It is 4 dB", "assert x == 'nvfp4 in layer04'", ["4"]),
        ("It is 4 dB", "assert all(abs(x - 4) < 1 for x in xs)", []),
        ("It is 4 dB", "assert x > 0, '4 dB'", ["4"]),
        # What an assert compares, but may never come to:
        ("It is 4 dB", "def check():\n    assert x == 4", ["4"]),
        ("It is 4 dB", "if y:\n    assert x == 4", ["4"]),
        ("It is 4 dB", "for x in xs:\n    assert x == 4", []),
    ],
)
def test_numbers_are_found_in_prose_and_asserts(prose, code, missing):
    cells = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(code)]
    assert not_asserted(nbformat.v4.new_notebook(cells=cells)) == missing
