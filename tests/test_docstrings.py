"""Every public name has a docstring, those of the package say what is promised, examples hold.

Public is what has no underscore in the modules that `nvfp4lab` offers, and in theirs. May be
changed: more may be asked of a docstring.
"""

import doctest
import importlib
import importlib.util
import inspect
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvfp4lab as nv

PACKAGE = Path(nv.__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
    for p in PACKAGE.rglob("[!_]*.py")
    if HAS_TRITON or "kernels" not in p.parts
)
OFFERED = [name for name in MODULES if name.partition(".")[0] in nv._MODULES]
CALLABLE = [name for name in nv.__all__ if callable(getattr(nv, name))]

SHAPE = re.compile(r"[(\[](?:\.\.\.|[A-Z]|\d+)(?:, ?[\w./ ]+)*,?[)\]]")  # (..., K), [T, D], (B,)

REFUSES = re.compile(r"^ +raise (?:ValueError|TypeError|NoTheory)\(", re.MULTILINE)


def public_of(module) -> Iterator[tuple[str, object]]:
    """The functions, classes, methods and properties that the module defines, by their names."""
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isroutine(found) or inspect.isclass(found):
            yield name, found
        if inspect.isclass(found):
            for member, value in inspect.getmembers(found):
                if member in vars(found) and not member.startswith("_") and is_method(value):
                    yield f"{name}.{member}", getattr(found, member)


def source_of(found) -> str:
    """Of a function or method; nothing of anything else."""
    found = inspect.unwrap(found)
    has_source = inspect.isfunction(found) or inspect.ismethod(found)
    return inspect.getsource(found) if has_source else ""


def doc_of(name: str) -> str:
    return inspect.getdoc(getattr(nv, name)) or ""


def is_method(value: object) -> bool:
    return inspect.isroutine(value) or inspect.isdatadescriptor(value) or hasattr(value, "func")


@pytest.mark.parametrize("name", OFFERED)
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(f"nvfp4lab.{name}")
    assert module.__doc__
    assert [found for found, value in public_of(module) if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", OFFERED)
def test_what_refuses_its_input_says_so(name):
    found = dict(public_of(importlib.import_module(f"nvfp4lab.{name}")))
    refuse = [n for n, f in found.items() if REFUSES.search(source_of(f))]
    assert [n for n in refuse if "aises" not in (inspect.getdoc(found[n]) or "")] == []


@pytest.mark.parametrize("name", [n for n in CALLABLE if inspect.isroutine(getattr(nv, n))])
def test_what_takes_something_says_what_it_raises(name):
    found = getattr(nv, name)
    if inspect.signature(found).parameters:
        assert "\n\nRaises: " in doc_of(name)


@pytest.mark.parametrize("name", CALLABLE)
def test_what_takes_or_gives_tensors_says_their_shapes(name):
    found = getattr(nv, name)
    if "Tensor" in str(inspect.signature(found)):
        assert SHAPE.search(doc_of(name).partition(">>>")[0])


@pytest.mark.parametrize("name", CALLABLE)
def test_it_has_an_example(name):
    assert ">>> " in doc_of(name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    assert doctest.testmod(importlib.import_module(f"nvfp4lab.{name}")).failed == 0


def test_help_lists_every_public_name_and_module():
    text = pydoc.plain(pydoc.render_doc(nv))
    listed = set(re.findall(r"^ {4}(?:class )?(\w+)", text, re.MULTILINE))
    assert {*CALLABLE, *nv._MODULES} - listed == set()
