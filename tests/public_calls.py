"""Every public function once, on small inputs: what it gives must not depend on what goes on
around it. Used by test_concurrency.py, here and in processes of its own.

CALLS holds functions without arguments by name; `digest` tells their results apart to the bit.
May be changed: a new public function gets a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import nvfp4lab as nv

SEED = 5
CALLS: dict[str, Callable[[], Any]] = {}
# These take a tenth of a second and more.
HEAVY = ("identify", "identify_a_rule_without_a_name", "control", "predict", "expected_error")


def digest(result: Any) -> str:
    """Sixteen hexadecimal digits of everything in a result; tensors with dtype and shape."""
    sha = hashlib.sha256()
    _feed(sha, result)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    sha.update(type(value).__name__.encode())
    match value:
        case torch.Tensor():
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        case pd.DataFrame():
            sha.update(str(value.to_json(double_precision=15, orient="split")).encode())
        case np.ndarray():
            sha.update(f"{value.dtype}{value.shape}".encode())
            sha.update(repr(value.tolist()).encode() if value.dtype == object else value.tobytes())
        case str() | int() | float() | None | Path():
            sha.update(repr(value).encode())
        case Mapping():
            for key in sorted(value.keys() - {"source"}, key=repr):  # a path
                _feed(sha, key)
                _feed(sha, value[key])
        case list() | tuple():
            for part in value:
                _feed(sha, part)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                _feed(sha, getattr(value, field.name))
        case _:
            sha.update(repr(value).encode())


def bits(rows: int, width: int) -> torch.Tensor:
    """Any BF16 bit patterns, NaN, Inf and subnormals among them."""
    numbers = np.random.default_rng(SEED).integers(0, 1 << 16, (rows, width), dtype=np.uint16)
    return torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16)


def values(rows: int, width: int) -> torch.Tensor:
    """BF16 numbers of an ordinary size."""
    numbers = np.random.default_rng(SEED).standard_normal((rows, width), dtype=np.float32)
    return torch.from_numpy(numbers).to(torch.bfloat16)


def generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(SEED)


def call(function: Callable[[], Any]) -> Callable[[], Any]:
    CALLS[function.__name__] = function
    return function


def quantized_by(recipe: str) -> list[torch.Tensor | None]:
    drawn: dict[str, Any] = {"generator": generator()} if recipe == "nvfp4-stochastic" else {}
    q = nv.quantize(bits(3, 256), recipe, **drawn)
    return [q.codes, q.scales, q.outer, q.dequantize(), q.dequantize(torch.bfloat16)]


def measured_by(recipe: str) -> nv.Statistics:
    drawn: dict[str, Any] = {"generator": generator()} if recipe == "nvfp4-stochastic" else {}
    return nv.measure(values(4, 128), recipe, **drawn)


def staged_by(recipe: str) -> list[torch.Tensor | None]:
    x = values(3, 256)
    top_k = torch.ones(3, 2, dtype=torch.float32, device="cpu")
    ids = torch.arange(6, dtype=torch.int32, device="cpu").view(3, 2)
    staged = nv.stage(x, top_k, ids, recipe, torch.tensor([True, False, True], device="cpu"))
    return [staged.x_fp4, staged.x_sf, staged.x_scales, staged.topk_idx, staged.topk_weights]


for _recipe in nv.recipes():
    CALLS[f"quantize {_recipe}"] = functools.partial(quantized_by, _recipe)
    CALLS[f"measure {_recipe}"] = functools.partial(measured_by, _recipe)
for _recipe in ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed"):
    CALLS[f"stage {_recipe}"] = functools.partial(staged_by, _recipe)


@call
def quantize_by_every_choice() -> list[nv.Quantized]:
    """Of every part of a recipe, also those that no recipe with a name has."""
    made, base, x = [], nv.recipe("fouroversix"), bits(2, 64)
    for part in ("scale", "elements", "outer", "specials", "search"):
        own = getattr(base, part)
        for decision, choices in own.choices().items():
            for choice in choices:
                with contextlib.suppress(ValueError):  # two that do not go together
                    changed = dataclasses.replace(own, **{decision: choice})
                    recipe = dataclasses.replace(base, name="x", **{part: changed})
                    made.append(nv.quantize(x, recipe))
    return made


@call
def quantize_by_a_table() -> nv.Quantized:
    return nv.quantize(bits(300, 1024))


@call
def quantize_strided() -> nv.Quantized:
    return nv.quantize(bits(64, 48).t().float(), "nvfp4-token")


@call
def from_buffers() -> list[nv.Quantized]:
    q = nv.quantize(values(32, 256))
    layouts = nv.layouts
    as_written = {
        "mega_moe": layouts.to_words(q.scales),
        "linear": q.scales,
        "128x4": layouts.to_tiles(q.scales),
        "mn_major": layouts.to_mn_major(q.scales),
    }
    read = nv.Quantized.from_buffers
    return [read(q.codes, s, recipe="nvfp4", layout=name) for name, s in as_written.items()]


@call
def measure_pair() -> nv.Statistics:
    x = values(16, 256)
    return nv.measure(x, nv.quantize(x, "vllm-reference")) + nv.measure(x[:4], "vllm-reference")


@call
def frames() -> list[pd.DataFrame]:
    x = bits(4, 64)
    by = (nv.errors.element_errors, nv.errors.block_errors, nv.errors.token_errors)
    made = [one(x, "nvfp4-token") for one in by]
    return [*made, nv.errors.scale_histogram(nv.quantize(x)), nv.measure(x, "nvfp4").to_frame()]


@call
def views_of_statistics() -> list[Any]:
    s = nv.measure(values(16, 128), "nvfp4")
    return [s.by_channel(), s.to_frame(), s.qsnr_db, s.gain, s.qsnr_quantile("token", 0.1)]


@call
def explain_block() -> list[Any]:
    of = nv.explain_block(values(1, 16)[0], "nvfp4")
    return [of.elements, repr(of)]


@call
def compare() -> list[Any]:
    x = values(8, 64)
    of = nv.compare(nv.quantize(x), nv.quantize(x, "cublas"), x)
    return [repr(of)]


@call
def probe() -> torch.Tensor:
    return nv.probe()


@call
def identify() -> str:
    x = nv.probe()
    q = nv.quantize(x, "torchao")
    return str(nv.identify(x, q.codes, q.scales, q.outer))


@call
def identify_a_rule_without_a_name() -> str:
    x = nv.probe()[:128]
    named = nv.recipe("nvfp4")
    changed = dataclasses.replace(named.elements, rounding="ties-away")
    q = nv.quantize(x, dataclasses.replace(named, name="x", elements=changed))
    return str(nv.identify(x, q.codes, q.scales))


@call
def activations() -> list[torch.Tensor]:
    return [record.hidden[:2] for record in nv.activations("smollm2")]


@call
def control() -> nv.Activations:
    return nv.control(nv.activations("v4-mini")[0], "student-t")


@call
def through_experts() -> list[Any]:
    weights = nv.expert_weights("v4-mini")
    site = next(s for s in nv.activations("v4-mini") if s.layer == weights.layer)
    assert site.topk_ids is not None and site.topk_weights is not None
    few = dataclasses.replace(
        site,
        hidden=site.hidden[:8],
        positions=site.positions[:8],
        topk_ids=site.topk_ids[:8],
        topk_weights=site.topk_weights[:8],
    )
    exact = nv.experts.through_experts(few, weights)
    passed = nv.experts.through_experts(few, weights, nv.experts.Precision("nvfp4", "nvfp4"))
    return [passed, nv.experts.stage_errors(exact, passed)]


@call
def expected_error() -> list[Any]:
    return [nv.expected_error("gauss", "nvfp4"), nv.expected_error(("t", 5), "mxfp4-floor")]


@call
def predict() -> pd.DataFrame:
    return nv.predict(values(16, 256), "nvfp4").to_frame()


@call
def save_and_load() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        x = values(40, 64)
        positions = torch.arange(40, device="cpu")
        record = nv.Activations(x, positions, 0, "mlp_input", {"is": "a test"})
        sha256 = nv.records.save_activations(path, record)
        (read,) = nv.load_activations(path)
        swept = nv.sweep_statistics(path, ["nvfp4", "nvfp4-tensor"], progress=False)
        judged = nv.sweep_statistics(
            path, ["seed", "nvfp4-exact-scale"], state=Path(folder, "s"), progress=False
        )
        statistics = Path(folder, "s.npz")
        swept.statistics[0, "mlp_input", "nvfp4"].save(statistics)
        loaded = nv.Statistics.load(statistics)
        verdicts = nv.report.verdicts(judged)
        return [
            sha256,
            read.hidden,
            loaded,
            nv.sweep(path, "nvfp4", progress=False),
            list(swept.statistics.values()),
            verdicts,
            nv.report.summary(verdicts),
            nv.report.channels(judged, "seed")[["channel", "xx_share"]],
        ]


def digests(names: Iterable[str] = CALLS) -> dict[str, str]:
    """The digest of each call's result, or the error that it raised."""
    found = {}
    for name in names:
        try:
            found[name] = digest(CALLS[name]())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
