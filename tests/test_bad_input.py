"""Whatever a public function is given, it works or says in an error what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import errors, formats, layouts

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
Q = nv.quantize(X)
TOP = (torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32))
ONES = torch.ones(4, 128)
WRONG: dict[str, Any] = {
    "None": None,
    "str": "nothing of that name",
    "list": [1.0] * 16,
    "numpy": ONES.numpy(),
    "type": int,
    "int32": ONES.int(),
    "bool": ONES.bool(),
    "complex": ONES.to(torch.complex64),
    "float64": ONES.double(),
    "meta": ONES.to("meta"),
    "meta bfloat16": X.to("meta"),
    "sparse": ONES.to_sparse(),
    "no dimension": torch.tensor(1.0),
    "empty": torch.empty(0),
    "odd": torch.ones(3, 7),
    "NaN": float("nan"),
}
CALLS: dict[str, Callable[[Any], object]] = {
    "quantize x": lambda v: nv.quantize(v),
    "quantize recipe": lambda v: nv.quantize(X, v),
    "quantize outer": lambda v: nv.quantize(X, "nvfp4-tensor", outer=v),
    "measure x": lambda v: nv.measure(v, "nvfp4"),
    "measure q": lambda v: nv.measure(X, v),
    "identify x": lambda v: nv.identify(v, Q.codes, Q.scales),
    "identify codes": lambda v: nv.identify(X, v, Q.scales),
    "identify scales": lambda v: nv.identify(X, Q.codes, v),
    "explain_block block": lambda v: nv.explain_block(v, "nvfp4"),
    "explain_block recipe": lambda v: nv.explain_block(X[0, :16], v),
    "explain_block outer": lambda v: nv.explain_block(X[0, :16], "nvfp4-tensor", v),
    "compare q": lambda v: nv.compare(v, Q, X),
    "compare x": lambda v: nv.compare(Q, Q, v),
    "predict x": lambda v: nv.predict(v, "nvfp4"),
    "expected_error law": lambda v: nv.expected_error(v, "nvfp4"),
    "recipe": lambda v: nv.recipe(v),
    "activations": lambda v: nv.activations(v),
    "expert_weights": lambda v: nv.expert_weights(v),
    "load_activations": lambda v: nv.load_activations(v),
    "control": lambda v: nv.control(v, "gauss"),
    "from_buffers codes": lambda v: nv.Quantized.from_buffers(v, Q.scales, recipe="nvfp4"),
    "from_buffers scales": lambda v: nv.Quantized.from_buffers(Q.codes, v, recipe="nvfp4"),
    "stage hidden": lambda v: nv.stage(v, *TOP),
    "stage weights": lambda v: nv.stage(X, v, TOP[1]),
    "stage ids": lambda v: nv.stage(X, TOP[0], v),
    "stage is_padding": lambda v: nv.stage(X, *TOP, is_padding=v),
    "sweep shards": lambda v: nv.sweep(v, "nvfp4", progress=False),
    "block_errors x": lambda v: errors.block_errors(v, "nvfp4"),
    "scale_histogram": lambda v: errors.scale_histogram(v),
    "sampled_nmse": lambda v: errors.sampled_nmse(v),
    "encode x": lambda v: formats.E2M1.encode(v),
    "encode rounding": lambda v: formats.E2M1.encode(ONES, v),
    "decode": lambda v: formats.E2M1.decode(v),
    "class_of": lambda v: formats.E4M3.class_of(v),
    "boundaries": lambda v: formats.E2M1.boundaries(v),
    "by_class": lambda v: formats.E4M3.by_class(v),
    "pack_nibbles": layouts.pack_nibbles,
    "unpack_nibbles": layouts.unpack_nibbles,
    "to_words": layouts.to_words,
    "from_words": layouts.from_words,
    "to_tiles": layouts.to_tiles,
    "from_tiles": lambda v: layouts.from_tiles(v, 4, 8),
    "to_mn_major": layouts.to_mn_major,
    "from_mn_major": lambda v: layouts.from_mn_major(v, 4),
    "to_gguf": lambda v: layouts.to_gguf(v, Q.scales),
    "from_gguf": lambda v: layouts.from_gguf(v, 4, 128),
}
# What is in the table and no error: where None, a number or nothing to do is a fair thing to give.
FAIR = {
    ("quantize x", "empty"),
    ("quantize outer", "None"),
    ("quantize outer", "no dimension"),
    ("measure x", "empty"),
    ("explain_block outer", "None"),
    ("explain_block outer", "no dimension"),
    ("stage is_padding", "None"),
    ("block_errors x", "empty"),
    ("encode x", "no dimension"),
    ("encode x", "empty"),
    ("encode x", "odd"),
    ("decode", "int32"),
    ("class_of", "int32"),
    ("pack_nibbles", "int32"),
    ("unpack_nibbles", "int32"),
    ("from_words", "int32"),
    ("from_mn_major", "int32"),
    ("explain_block outer", "NaN"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("call", CALLS)
def test_what_is_wrong_is_said(call):
    deep, fair = {}, set()
    for name, value in WRONG.items():
        try:
            CALLS[call](value)
            fair.add((call, name))
        except (TypeError, ValueError, FileNotFoundError):
            pass
        except Exception as error:
            deep[name] = f"{type(error).__name__}: {error}"
    assert not deep
    assert fair <= FAIR, "taken without a word"


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 128).expand(4, 128),
        torch.ones(4, 256)[:, ::2],
        torch.ones(128, 4).T,
        torch.nn.Parameter(torch.ones(4, 128)),
        torch.ones(4, 128, requires_grad=True),
    ],
    ids=["expanded", "strided", "transposed", "parameter", "requires_grad"],
)
def test_how_a_tensor_lies_changes_nothing(x):
    assert nv.quantize(x).codes.equal(nv.quantize(ONES).codes)
    assert nv.measure(x, "nvfp4") == nv.measure(ONES, "nvfp4")


@pytest.mark.parametrize("value", [np.ones((4, 128))[:, ::-1], np.float32(1), b"nvfp4"])
def test_numpy_and_bytes_are_no_tensor(value):
    with pytest.raises(TypeError, match=r"x is a torch\.Tensor, got "):
        nv.quantize(value)
