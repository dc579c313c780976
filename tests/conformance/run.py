"""Every recipe named after an installed peer beside the peer itself: recipe x case -> mismatches.

`make conformance` runs this in an environment of its own, whose folder it is given, and renews
data/conformance.json; it fails where a count differs from what KNOWN says. May be changed: KNOWN,
with the reason that was found.
"""

import importlib.metadata
import json
import os
import platform
import sys
import warnings
from pathlib import Path

import own_tests
import torch
from cases import CASES
from peers import PEERS, gguf_decode, gguf_scales

import nvfp4lab as nv

TARGET = Path(__file__).parents[2] / "data" / "conformance.json"
BY_SOURCE = "by source only"  # as the catalogue says of a recipe whose peer no CPU runs

# Where the emulation stops short: (recipe, case, dtype) -> (codes, scales that differ, why).
_SIGN = "the peer's 0x7F or 0xFF follows the sign that its vector code leaves on a NaN"
_CAST = "NaN cast to int8, which C leaves undefined: code 7 from bfloat16, 0 from the others"
_OWN = "the sign of the one NaN element: the peer's vector and scalar loops leave different ones"
_MX_INF = "the block of an Inf: the peer takes Inf for 2^128, byte 253; ours saturates at 254"
_MX_NAN = "a block under a NaN scale: the peer keeps zeros, we write 7; the format has no rule"
KNOWN = {
    **{
        (recipe, "Inf", dtype): (0, 1, _MX_INF)
        for recipe in ("mxfp4-floor", "mxfp4-even")
        for dtype in ("bfloat16", "float32")
    },
    **{
        (f"mxfp4-{mode}", case, dtype): (32, 0, _MX_NAN)
        for mode in ("floor", "ceil", "even")
        for case in ("NaN", "-NaN")
        for dtype in ("bfloat16", "float32")
    },
    ("torchao", "NaN", "bfloat16"): (1, 0, _OWN),
    ("torchao", "-NaN", "bfloat16"): (1, 0, _OWN),
    ("torchao", "-NaN", "float32"): (1, 0, _OWN),
    **{("compressed-tensors", c, "bfloat16"): (16, 0, _CAST) for c in ("Inf", "NaN", "-NaN")},
    **{
        (f"fouroversix{rule}", case, "float32"): (0, 512, _SIGN)
        for rule in ("", "-mae", "-max", "-static6")
        for case in ("NaN", "-NaN")
    },
}


def compare(peer, case, dtype) -> dict:
    x = CASES[case](dtype)
    q = nv.quantize(x, peer.recipe)
    codes, scales, outer = peer.quantize(x.clone())
    return {
        "elements": x.numel(),
        "codes": int((q.element_codes() != codes).sum()),
        "scales": int((q.scales != scales).sum()),
        "outer": 0 if outer is None else int(not _same_outer(peer, x, q, outer)),
    }


def _same_outer(peer, x, q, outer) -> bool:
    """Whether the peer's outer scale, in its own convention, is ours bit for bit."""
    own = nv.codec.find_outer(x, q.recipe)
    if peer.package in ("fouroversix", "mlx"):  # they store the tensor's amax
        own = own.amax
    else:
        own = own.encode if q.recipe.outer.encodes else own.decode
    return torch.equal(own.nan_to_num(-1.0), outer.float().nan_to_num(-1.0))


def gguf_counts() -> dict:
    """gguf's Python codec against `llama.cpp`: the scale of every BF16 amax, and decoded blocks."""
    bits = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16)
    amax = bits.view(torch.bfloat16).float()
    blocks = torch.zeros(len(amax), 16)
    blocks[:, 0] = amax
    scales = nv.quantize(blocks, "llama.cpp").scales.flatten()
    x = CASES["random bits, near"](torch.bfloat16)
    q = nv.quantize(x, "llama.cpp")
    decoded = gguf_decode(nv.layouts.to_gguf(q.codes, q.scales))
    return {
        "every BF16 amax": {"scales": int((scales != gguf_scales(amax)).sum()), "of": len(amax)},
        "decoded blocks": {
            "elements": int((decoded != q.dequantize()).sum()),
            "of": x.numel(),
        },
    }


def main(environment: Path) -> int:
    warnings.filterwarnings("ignore")
    os.environ["NVFP4LAB_GGML"] = str(environment / "libggml.so")
    table, problems = {}, []
    for peer in PEERS:
        rows = table.setdefault(peer.recipe, {"peer": version(peer.package), "cases": {}})["cases"]
        for case in CASES:
            for dtype in peer.dtypes:
                name = str(dtype).removeprefix("torch.")
                counts = compare(peer, case, dtype)
                known = KNOWN.get((peer.recipe, case, name), (0, 0, None))
                if (counts["codes"], counts["scales"], counts["outer"]) != (*known[:2], 0):
                    problems.append(f"{peer.recipe}, {case}, {name}: {counts}, known: {known}")
                if known[2]:
                    counts["why"] = known[2]
                rows.setdefault(case, {})[name] = counts
        differing = sum(c["codes"] for row in rows.values() for c in row.values())
        print(f"{peer.recipe:20} {len(rows)} cases x {len(peer.dtypes)} dtypes, {differing} differ")
    gguf = gguf_counts()
    if any(counts[k] for counts in gguf.values() for k in ("scales", "elements") if k in counts):
        problems.append(f"gguf: {gguf}")
    table["llama.cpp"]["gguf"] = {"peer": version("gguf"), **gguf}
    for name, outcome in own_tests.run(environment / "sources").items():
        table[name]["own tests"] = outcome
        print(f"{name:20} the peer's own tests: {outcome}")
        if own_tests.failed(outcome):
            problems.append(f"{name}: its peer's own tests: {outcome}")
    for name in nv.recipes():
        if BY_SOURCE in nv.recipe(name).source:
            table[name] = {"peer": BY_SOURCE, "tests": "tests/test_catalogue.py"}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"environment": versions, "recipes": table}
    TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(problems) or f"as known; written to {TARGET.name}")
    return 1 if problems else 0


def version(package: str) -> str:
    if package == "ggml":
        return "ggml-quants.c of llama-cpp-python 0.3.36"
    return f"{package} {importlib.metadata.version(package)}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
