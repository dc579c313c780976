"""The notebooks as they are committed: form, size, outputs, and that every number is asserted.

That they run, and that what they assert holds, is `make study`'s.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

from nvfp4lab import publish, runs

FOLDER = Path(__file__).parents[1] / "notebooks"
STUDIES = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
each_study = pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
each = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
LARGEST = 600_000  # bytes

# What prose measures: 22.6, 1.6 %, 22 dB, 16 times. Not formats, layers, counts or powers of two.
MEASURED = re.compile(
    r"(?<![\w.^⁻])(\d[\d,]*\.\d+|\d[\d,]*(?=\s?(?:%|dB\b|times\b|percent\b)))(?![\w.]*\w)"
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose_of(notebook: nbformat.NotebookNode) -> str:
    """All Markdown, less what is no statement: code, links' targets, arXiv numbers."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return re.sub(r"(arXiv|version)[ :]*[\d.]+|\b\d{4}\.\d{5}\b", " ", text)


def asserted_by(notebook: nbformat.NotebookNode) -> str:
    """Every literal in an assert statement, as text."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Assert):
                    found += [str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return " ".join(found)


def not_asserted(notebook: nbformat.NotebookNode) -> list[str]:
    """The measured numbers of the prose that stand in no assert statement."""
    asserted = re.findall(r"\d[\d,]*(?:\.\d+)?", asserted_by(notebook))
    known = {number.replace(",", "") for number in asserted}
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
    ],
)
def test_numbers_are_found_in_prose_and_asserts(prose, code, missing):
    cells = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(code)]
    assert not_asserted(nbformat.v4.new_notebook(cells=cells)) == missing
