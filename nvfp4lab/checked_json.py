"""JSON from a file, held to a shape before anything is made of it.

Every document that the package reads goes through `parse`: the metadata of records, capture.json,
the manifest, statistics, the state of a sweep, benchmark results. A shape is written as an example:

    {"rows": COUNT, "sites": {str: {"layer": COUNT}}, "files": [{"path": plain_name}]}

A type stands for its values (int and float without bool; a float may be written as an int), a range
for the ints in it, a set for one of its members, [A] for any number of A, (A, B) for just these,
{str: A} for any names, any other dict for keys that must be there beside others, `either(A, B)` for
both, and a function for what it is true of; its docstring says what that is. JSON Schema is not
used: under it 1.0 is an integer and NaN a number from 0 up, an alternative that does not fit is
shown as its whole schema, and jsonschema takes as long to import as torch where JupyterLab has
installed its formats. May be changed: another kind of shape is a case in `_mismatch`.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePath
from typing import Any

COUNT = range(2**63)  # what an int64 holds, from 0 up
LONGEST_QUOTE = 80  # characters of what was found, in a message

_NAMES = {str: "a string", float: "a number", int: "a whole number", bool: "true or false"}


class either:
    """One of several shapes."""

    def __init__(self, *shapes: Any):
        self.shapes = shapes


def plain_name(value: Any) -> bool:
    """the name of a file, without a folder"""
    own = isinstance(value, str) and "\0" not in value and value not in ("", ".", "..")
    return own and PurePath(value).name == value


def magnitude(value: Any) -> bool:
    """a finite number from 0 up"""
    return type(value) in (int, float) and 0 <= value < math.inf


def parse(text: str | bytes, where: object, shape: Any) -> Any:
    """The document. Raises: ValueError that names `where`, the place in it and what was expected,
    also for text that no encoding can write and for nesting beyond what Python follows."""
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate fails here, not later
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON; {error}") from error
    if wrong := _mismatch(document, shape):
        raise ValueError(f"{where}: {wrong}")
    return document


def quoted(value: object) -> str:
    """repr, cut where it is long: a message is read by a person."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}... "


def _mismatch(value: Any, shape: Any, at: str = "") -> str:
    """Where and how a value is not of the shape, or nothing."""
    match shape:
        case either():
            fits = any(not _mismatch(value, one, at) for one in shape.shapes)
        case dict() if str in shape:
            fits = isinstance(value, dict)
            parts = [(name, value[name], shape[str]) for name in value] if fits else []
        case dict():
            fits = isinstance(value, dict) and shape.keys() <= value.keys()
            parts = [(name, value[name], one) for name, one in shape.items()] if fits else []
        case list() | tuple():
            fits = isinstance(value, list) and (isinstance(shape, list) or len(value) == len(shape))
            shapes = shape * len(value) if isinstance(shape, list) and fits else shape
            parts = list(zip(range(len(shapes)), value, shapes, strict=True)) if fits else []
        case range():
            fits = type(value) is int and value in shape
        case set():
            fits = isinstance(value, str) and value in shape
        case type():
            fits = shape is object or type(value) in ((int, float) if shape is float else (shape,))
        case None:
            fits = value is None
        case _:
            fits = shape(value)
    if not fits:
        return f"expected {_said(shape)}{at and ' at '}{at}, found {quoted(value)}"
    if not isinstance(shape, (dict, list, tuple)):
        return ""
    wrongs = (_mismatch(part, one, f"{at}[{quoted(name)}]") for name, part, one in parts)
    return next((wrong for wrong in wrongs if wrong), "")


def _said(shape: Any) -> str:
    match shape:
        case either():
            return " or ".join(map(_said, shape.shapes))
        case dict() if str in shape:
            return "an object"
        case dict():
            return f"an object with {', '.join(shape)}"
        case list():
            return "a list"
        case tuple():
            return f"a list of {len(shape)}"
        case range():
            return f"a whole number from {shape.start} to {shape.stop - 1}"
        case set():
            return "one of " + ", ".join(sorted(shape))
        case type():
            return _NAMES.get(shape, shape.__name__)
        case None:
            return "null"
        case _:
            return str(shape.__doc__)
