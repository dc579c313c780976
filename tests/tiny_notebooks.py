"""Small notebooks for the tests of `runs` and `publish`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import v4

from nvfp4lab import runs

FIGURE = """
import sys, os, nvfp4lab
import matplotlib.pyplot as plt
plt.plot([1, 4, 9])
plt.show()
print(sys.executable, os.getcwd(), nvfp4lab.__file__, sep="\\n")
"""
TABLE = "import pandas as pd\npd.DataFrame({'layer': [0, 5], 'qsnr_db': [20.5, 21.25]}).style"
TEXT = """# The error of *two* layers
Layer 5 has the smaller error. It is 21.25 dB. Nothing else was measured.

See [rounding](02_rounding.ipynb#ties), [scales](03_scales.ipynb) and
[the source](https://example.org/notes.ipynb).
"""


def write(path: Path, *cells: str | nbformat.NotebookNode) -> Path:
    """A notebook file; a str is a code cell."""
    made = [v4.new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    nbformat.write(v4.new_notebook(cells=made), path)
    return path


def example(folder: Path) -> nbformat.NotebookNode:
    """A notebook of text, a figure and a table, executed."""
    return runs.execute(write(folder / "01_x.ipynb", v4.new_markdown_cell(TEXT), FIGURE, TABLE))
