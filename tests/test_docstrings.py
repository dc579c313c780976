"""The examples in the docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import nvfp4lab

PACKAGE = Path(nvfp4lab.__file__).parent
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
    for p in PACKAGE.rglob("[!_]*.py")
    if "kernels" not in p.parts  # which need Triton
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    assert doctest.testmod(importlib.import_module(f"nvfp4lab.{name}")).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"nvfp4lab.{name}") for name in MODULES]
    assert sum(len(test.examples) for m in modules for test in finder.find(m)) >= 5
