"""nvfp4lab.runs: notebooks are run by this interpreter, and made fit to commit."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import v4
from PIL import Image
from tiny_notebooks import TABLE, example, write

from nvfp4lab import runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> nbformat.NotebookNode:
    return example(tmp_path_factory.mktemp("with space"))


def stdout_of(cell: nbformat.NotebookNode) -> list[str]:
    texts: list[str] = [o.text for o in cell.outputs if o.output_type == "stream"]
    return "\n".join(texts).splitlines()


def test_the_kernel_is_this_interpreter_in_the_notebooks_folder_with_this_package(ran):
    interpreter, folder, package = stdout_of(ran.cells[1])
    assert Path(interpreter) == Path(sys.executable)
    assert Path(folder).name.startswith("with space")
    assert Path(package).parent == Path(runs.__file__).parent


def test_the_file_is_left_alone(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(1)")
    before = path.read_bytes()
    runs.execute(path)
    assert path.read_bytes() == before


def test_progress_counts_code_cells(tmp_path):
    path = write(tmp_path / "a.ipynb", v4.new_markdown_cell("# a"), "1", "", "2")
    seen = []
    runs.execute(path, on_cell=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_output_written_over_with_carriage_returns_keeps_its_last_state(tmp_path):
    source = "for i in range(3): print(f'\\r{i} of 2', end='', flush=True)"
    notebook = runs.execute(write(tmp_path / "a.ipynb", source))
    assert [o.text for o in notebook.cells[0].outputs] == ["2 of 2"]


def test_a_failing_cell_is_named_with_its_traceback(tmp_path):
    path = write(tmp_path / "04_bad.ipynb", v4.new_markdown_cell("# a"), "x = 0", "y = 1 / x", "z")
    with pytest.raises(runs.NotebookError) as caught:
        runs.execute(path)
    message = str(caught.value)
    assert message.startswith("04_bad.ipynb, cell 3 of 4: ZeroDivisionError: division by zero\n")
    assert "y = 1 / x" in message
    assert "\x1b" not in message
    assert caught.value.cell == 3


def test_a_kernel_that_dies_is_reported_with_its_cell(tmp_path):
    path = write(tmp_path / "a.ipynb", "1", "import os; os._exit(1)")
    message = r"(?s)a\.ipynb, cell 2 of 2: the kernel died.*os\._exit"
    with pytest.raises(runs.NotebookError, match=message):
        runs.execute(path)


def test_a_cell_that_takes_too_long_is_reported(tmp_path):
    path = write(tmp_path / "a.ipynb", "import time; time.sleep(60)")
    with pytest.raises(runs.NotebookError, match=r"cell 1 of 1: not done after 1 s"):
        runs.execute(path, timeout=1)


def parameterised(path: Path) -> Path:
    cell = v4.new_code_cell("layers, recipe = [0], 'nvfp4'", metadata={"tags": ["parameters"]})
    return write(path, cell, "print(layers, recipe)")


def test_parameters_replace_what_the_tagged_cell_assigns(tmp_path):
    notebook = runs.execute(parameterised(tmp_path / "a.ipynb"), {"layers": [0, 5]})
    assert stdout_of(notebook.cells[-1]) == ["[0, 5] nvfp4"]


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"layer": 0}, ValueError, r"no parameter \['layer'\]; it has \['layers', 'recipe'\]"),
        ({"recipe": Path("x")}, TypeError, "recipe must be a Python literal, given"),
        ({"recipe": float("nan")}, TypeError, "recipe must be a Python literal, given float"),
    ],
)
def test_parameters_that_cannot_be_set_are_refused(tmp_path, parameters, error, message):
    with pytest.raises(error, match=message):
        runs.execute(parameterised(tmp_path / "a.ipynb"), parameters)


def test_parameters_without_a_tagged_cell_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.ipynb has 0 cells tagged 'parameters'"):
        runs.execute(write(tmp_path / "a.ipynb", "x = 1"), {"x": 2})


def test_two_runs_are_the_same_once_normalised(tmp_path):
    source = "import warnings; warnings.warn('careful'); object()"
    path = write(tmp_path / "a.ipynb", "", source, TABLE)
    first, second = (nbformat.writes(runs.normalise(runs.execute(path))) for _ in range(2))
    assert first == second


def test_the_style_of_a_normalised_table_is_still_its_own():
    markup = (
        "<style>#T_0a1b2 th.col0 { } #T_0a1b2_row0_col0, #T_0a1b2_row1_col0 { }</style>"
        '<table id="T_0a1b2"><td id="T_0a1b2_row0_col0">'
    )
    shown = v4.new_output("display_data", {"text/html": markup})
    (cell,) = runs.normalise(v4.new_notebook(cells=[v4.new_code_cell("1", outputs=[shown])])).cells
    assert cell.outputs[0].data["text/html"] == markup.replace("0a1b2", "1-0")


def test_normalising_keeps_tags_and_folding_only():
    kept = {"tags": ["parameters"], "jupyter": {"source_hidden": True}}
    noise = {"execution": {"iopub.execute_input": "2026-01-01"}, "vscode": {"languageId": "python"}}
    cell = v4.new_code_cell("1", metadata=kept | noise, execution_count=41)
    notebook = runs.normalise(v4.new_notebook(cells=[cell], metadata={"widgets": {}}))
    assert notebook.cells[0].metadata == kept
    assert notebook.cells[0].execution_count == 1
    assert set(notebook.metadata) == {"kernelspec", "language_info", "nvfp4lab"}


def test_outputs_older_than_their_cells_are_told_by_the_digest():
    notebook = runs.normalise(v4.new_notebook(cells=[v4.new_code_cell("x = 1")]))
    assert notebook.metadata["nvfp4lab"] == {"outputs_of": runs.digest(notebook)}
    notebook.cells[0].source = "x = 2"
    assert notebook.metadata["nvfp4lab"] != {"outputs_of": runs.digest(notebook)}
    notebook.cells.append(v4.new_markdown_cell("words"))
    before = runs.digest(notebook)
    notebook.cells[1].source = "other words"
    assert runs.digest(notebook) == before


def test_pictures_keep_their_look_in_256_colours():
    rng = np.random.default_rng(0)
    shades = rng.integers(0, 256, 600)
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[..., 1] = shades[rng.integers(0, 600, (40, 60))]
    pixels[..., 3] = 255
    pixels[:5, :, 3] = 0  # transparent: the page's white
    before = io.BytesIO()
    Image.fromarray(pixels).save(before, "PNG")
    data = {"image/png": base64.b64encode(before.getvalue()).decode()}
    cell = v4.new_code_cell("1", outputs=[v4.new_output("display_data", data=data)])
    notebook = runs.normalise(v4.new_notebook(cells=[cell]))
    once = notebook.cells[0].outputs[0].data["image/png"]
    image = Image.open(io.BytesIO(base64.b64decode(once)))
    assert image.mode == "P" and image.size == (60, 40)
    after = np.asarray(image.convert("RGB")).astype(int)
    assert (after[:5] == 255).all()
    assert np.abs(after[5:] - pixels[5:, :, :3]).max() <= 4
    assert runs.normalise(notebook).cells[0].outputs[0].data["image/png"] == once
