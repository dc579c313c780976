"""Files as an attacker, a bad disk or a careless script leaves them, each with a name.

`safetensors_files` gives bytes, `mutants` documents with one part replaced. May be changed: a way
to be wrong is a row.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

ABOUT: dict[str, Any] = {"layer": 1, "site": "a", "provenance": {"is": "a test"}}
DEEP = "[" * 100_000 + "]" * 100_000


def packed(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file of any header: an object, or bytes that are none."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def record(about: Any = ABOUT) -> tuple[dict[str, Any], bytes]:
    """Header and body of a good one: 4 rows of 32, top 2; about: its metadata, or its text."""
    said = about if isinstance(about, str) else json.dumps(about)
    header: dict[str, Any] = {"__metadata__": {"nvfp4lab": said}}
    body = b""
    for name, dtype, shape, raw in (
        ("hidden", "BF16", [4, 32], b"\x80\x3f" * 128),
        ("positions", "I64", [4], np.arange(4).tobytes()),
        ("topk_ids", "I64", [4, 2], bytes(64)),
        ("topk_weights", "F32", [4, 2], bytes(32)),
    ):
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += raw
    return header, body


OF_HIDDEN: dict[str, dict[str, Any]] = {
    "offset below 0": {"data_offsets": [-1, 255]},
    "offsets beyond the end": {"data_offsets": [0, 1 << 40]},
    "offsets that overlap": {"data_offsets": [8, 264]},
    "offsets the wrong way": {"data_offsets": [256, 0]},
    "offsets of floats": {"data_offsets": [0.0, 256.0]},
    "offsets past 64 bits": {"data_offsets": [2**64, 2**65]},
    "one offset": {"data_offsets": [0]},
    "size below 0": {"shape": [-4, -32]},
    "sizes whose product overflows": {"shape": [2**33, 2**33]},
    "size past 64 bits": {"shape": [2**64, 1]},
    "sizes of floats": {"shape": [4.0, 32]},
    "shape of text": {"shape": "4,32"},
    "no shape": {"shape": None},
    "another shape": {"shape": [8, 32]},
    "one dimension": {"shape": [128]},
    "three dimensions": {"shape": [4, 4, 8]},
    "70 dimensions": {"shape": [1] * 70 + [4, 32]},
    "10000 dimensions": {"shape": [1] * 10_000 + [4, 32]},
    "unknown dtype": {"dtype": "BF17"},
    "dtype that is a number": {"dtype": 3},
    "FP4": {"dtype": "F4"},
    "FP6": {"dtype": "F6_E2M3"},
    "FP16": {"dtype": "F16"},
    "complex": {"dtype": "C64", "shape": [4, 8]},
}
HEADERS = {
    "no JSON": b"hello",
    "a list": b"[]",
    "deep": DEEP.encode(),
    "deep metadata": b'{"__metadata__":' + DEEP.encode() + b"}",
    "NaN": b'{"a":NaN}',
    "not UTF-8": b'{"\xff\xfe":1}',
    "no header": b"",
    "no tensors": b"{}",
    "byte order mark": b"\xef\xbb\xbf{}",
}
ABOUTS = {
    "a number": "1",
    "no layer": "{}",
    "layer below 0": json.dumps({**ABOUT, "layer": -1}),
    "layer of 30 digits": json.dumps({**ABOUT, "layer": 10**30}),
    "layer of 5000 digits": json.dumps(ABOUT).replace(" 1", " 1" + "0" * 5000),
    "layer that is true": json.dumps({**ABOUT, "layer": True}),
    "layer that is NaN": json.dumps({**ABOUT, "layer": float("nan")}),
    "site that is a number": json.dumps({**ABOUT, "site": 3}),
    "site with a lone surrogate": json.dumps({**ABOUT, "site": "\ud800"}),
    "provenance with a lone surrogate": json.dumps({**ABOUT, "provenance": {"is": "\udfff"}}),
    "deep provenance": json.dumps(ABOUT).replace('"a test"', DEEP),
}


def safetensors_files() -> Iterator[tuple[str, bytes]]:
    """(what is wrong with it, the file): none of them is a record."""
    header, body = record()
    good = packed(header, body)
    text = json.dumps(header).encode()
    yield from ((f"cut to {n} bytes", good[:n]) for n in range(len(good)))
    for length in (0, 7, 2**31, 2**63 - 1, 2**64 - 1, len(good), 100_000_001):
        yield f"header of {length} bytes", struct.pack("<Q", length) + good[8:]
    yield from ((name, packed(raw)) for name, raw in HEADERS.items())
    twice = b', "hidden": {"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]}}'
    yield "hidden twice", packed(text[:-1] + twice, body)
    yield "bytes after the last", packed(text, body + b"x")
    yield "text after the header", packed(text + b"}}", body)
    for name, change in OF_HIDDEN.items():
        yield name, packed({**header, "hidden": header["hidden"] | change}, body)
    yield from ((name, packed(*record(about))) for name, about in ABOUTS.items())
    end = {"dtype": "U8", "shape": [0], "data_offsets": [len(body), len(body)]}
    yield "tensor named by an escape", packed({**header, "\x1b[31m": end}, body)
    yield "5000 more tensors", packed({**header, **{f"t{i}": end for i in range(5000)}}, body)


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(where, the content with one bit turned), `count` of them at random."""
    for bit in np.random.default_rng(seed).choice(8 * len(content), count, replace=False):
        hurt = bytearray(content)
        hurt[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(hurt)


VALUES: list[Any] = [
    *(None, True, -1, 1.5, 10**30, float("inf"), float("nan")),
    *("..", "../../x", "/etc/x", "a\0b", "\ud800", [], {}, [[]], [None], {"a": 1}),
    *(["dict", 3], ["__doc__", 3], ["float32", -1], ["float32", 10**30], [[0, -5]]),
]
NAMES = ("..", "../../x", "/etc/x", "", "a\0b", "\ud800")
TEXTS = ("", "{", "[]", "null", "NaN", DEEP, '{"a":' * 20_000, "1" * 5000)


def mutants(document: Any) -> Iterator[tuple[str, bytes]]:
    """(what was changed, the JSON): each part left out, renamed or replaced by each of VALUES."""

    def places(node: Any, at: tuple = ()) -> Iterator[tuple]:
        inside = node.items() if isinstance(node, dict) else []
        for key, part in enumerate(node) if isinstance(node, list) else inside:
            yield (*at, key)
            yield from places(part, (*at, key))

    def changed(at: tuple, how: str, value: Any) -> tuple[str, bytes]:
        whole = node = copy.deepcopy(document)
        for key in at[:-1]:
            node = node[key]
        if how == "replaced":
            node[at[-1]] = value
        else:
            part = node.pop(at[-1])
            if how == "renamed":
                node[value] = part
        return f"{'/'.join(map(str, at))} {how} {value!r:.30}", json.dumps(whole).encode()

    for at in places(document):
        yield changed(at, "left out", "")
        yield from (changed(at, "replaced", value) for value in VALUES)
        if isinstance(at[-1], str):
            yield from (changed(at, "renamed", name) for name in NAMES)
    yield from ((f"text {text[:10]!r}", text.encode()) for text in TEXTS)
