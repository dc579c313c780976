"""nvfp4lab.cli: what `nvfp4lab study` writes, prints and returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from nvfp4lab import cli


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with three notebooks, the second of which fails, as the current directory."""
    (tmp_path / "notebooks").mkdir()
    for name, source in [("01_good", "2 + 2"), ("02_bad", "1 / 0"), ("03_fine", "print(3)")]:
        cells = [v4.new_markdown_cell(f"# About {name}\n\nIt runs."), v4.new_code_cell(source)]
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_failure_fails_the_study_and_the_others_still_run(checkout, capsys):
    assert cli.main(["study"]) == 1
    printed = capsys.readouterr()
    assert "02_bad.ipynb, cell 2 of 2: ZeroDivisionError" in printed.err
    assert printed.err.endswith("1 of 3 notebooks failed: 02_bad\n")
    pages = {path.name for path in (checkout / "build/study").iterdir()}
    assert pages == {"index.html", "01_good.html", "02_bad.failed.html", "03_fine.html"}
    index = (checkout / "build/study/index.html").read_text(encoding="utf-8")
    assert "Did not run to its end: 02_bad.ipynb, cell 2 of 2" in index


def test_progress_is_a_line_a_notebook(checkout, capsys):
    assert cli.main(["study", "--only", "01", "03_fine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [
        ["01_good", "1/1", "cells"],
        ["03_fine", "1/1", "cells"],
    ]


def test_only_runs_the_named_and_keeps_earlier_pages_in_the_contents(checkout):
    out = checkout / "pages"
    assert cli.main(["study", "--out", str(out), "--only", "01"]) == 0
    assert cli.main(["study", "--out", str(out), "--only", "03_fine.ipynb"]) == 0
    index = (out / "index.html").read_text(encoding="utf-8")
    assert [name in index for name in ("01_good", "02_bad", "03_fine")] == [True, False, True]


def test_in_place_saves_outputs_of_the_notebooks_that_ran(checkout):
    bad = (checkout / "notebooks/02_bad.ipynb").read_bytes()
    assert cli.main(["study", "--in-place"]) == 1
    good = nbformat.read(checkout / "notebooks/01_good.ipynb", as_version=4)
    assert good.cells[1].outputs[0].data["text/plain"] == "4"
    assert (checkout / "notebooks/02_bad.ipynb").read_bytes() == bad
    assert not list((checkout / "notebooks").glob(".*"))


def test_without_in_place_the_notebooks_are_left_alone(checkout):
    before = (checkout / "notebooks/01_good.ipynb").read_bytes()
    assert cli.main(["study", "--only", "01"]) == 0
    assert (checkout / "notebooks/01_good.ipynb").read_bytes() == before


def test_a_file_that_is_no_notebook_fails_by_name(checkout, capsys):
    (checkout / "notebooks/04_cut.ipynb").write_text('{"cells": [', encoding="utf-8")
    assert cli.main(["study", "--only", "04"]) == 1
    assert "04_cut.ipynb: " in capsys.readouterr().err


def test_an_unknown_name_is_refused_with_those_there_are(checkout, capsys):
    assert cli.main(["study", "--only", "1_good"]) == 2
    expected = "nvfp4lab: no notebook 1_good; there are 01_good, 02_bad, 03_fine\n"
    assert capsys.readouterr().err == expected


def test_a_folder_without_notebooks_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.study, "__file__", str(tmp_path / "site/nvfp4lab/cli/study.py"))
    assert cli.main(["study"]) == 2
    assert "run this in a checkout of nvfp4lab" in capsys.readouterr().err


def test_a_missing_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_the_study_quietly(checkout, number, code, said):
    sleeps = v4.new_code_cell("open('started', 'w').close()\nimport time\ntime.sleep(60)")
    nbformat.write(v4.new_notebook(cells=[sleeps]), checkout / "notebooks/01_good.ipynb")
    study = subprocess.Popen(
        [sys.executable, "-m", "nvfp4lab.cli", "study"],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (checkout / "notebooks/started").exists():
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    study.send_signal(number)
    _, printed = study.communicate(timeout=30)
    assert (study.returncode, printed) == (code, f"\nnvfp4lab: {said}\n")
