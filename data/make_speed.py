"""Rewrites the speeds in the project's README.md from benchmarks/h100.json and h100_vllm.json.

    python data/make_speed.py

A test compares, so that the README cannot drift from what was measured. May be changed: what the
table shows.
"""

from pathlib import Path
from typing import Any

from make_card import TABLE, as_markdown

from nvfp4lab.benchmarks import Result

HERE = Path(__file__).parent
MEASURED = HERE / "benchmarks" / "h100.json"
BESIDE_VLLM = HERE / "benchmarks" / "h100_vllm.json"  # tests/conformance/race.py wrote it
README = HERE.parent / "README.md"
NAME, WIDTH = "speed", 7168


def speed(result: Result) -> str:
    """Staging at WIDTH: a row a name, a column a number of tokens, microseconds and the share of
    the yardstick's speed; above it, what it was measured on."""
    staged = [s for s in result.samples if (s.part, s.width) == ("staging", WIDTH)]
    rows = []
    for name in dict.fromkeys(sample.name for sample in staged):
        row = {f"tokens x {WIDTH}": name if name == "yardstick" else f"`{name}`"}
        for sample in sorted((s for s in staged if s.name == name), key=lambda s: s.tokens):
            share = f" ({result.ratio(sample, 'yardstick'):.2f})" if name != "yardstick" else ""
            row[str(sample.tokens)] = f"{sample.us:.1f} us{share}"
        rows.append(row)
    return f"{measured_on(result.machine)}\n\n" + as_markdown(rows)


def in_words(result: Result) -> str:
    """The ratios that the table does not have."""
    at = {(s.part, s.name): s for s in result.samples if s.width == WIDTH and s.tokens in (1, 8192)}
    seed = at["staging", "seed"].us
    measured, launched = at["measure", "nvfp4"], at["host", "nvfp4"]
    return (
        f"At 8192 tokens `nvfp4` is {seed / at['staging', 'nvfp4'].us:.1f} times as fast as the "
        f"user's kernel, the yardstick {seed / at['staging', 'yardstick'].us:.1f} times. "
        f'`nv.measure(x, "nvfp4")` of as much takes {measured.us / 1000:.1f} ms, '
        f"{result.ratio(measured, 'reference'):.0f} times less than in torch eager; a call of "
        f"`stage_mega_moe_inputs` takes the host {launched.us:.0f} us, an empty Triton launch "
        f"{at['host', 'empty launch'].us:.0f}.\n"
    )


def beside_vllm(result: Result) -> str:
    """How many times as long vLLM's own kernels take for the same bytes."""
    at = {(s.name, s.tokens): s.us for s in result.samples if s.width == WIDTH}
    said = []
    for recipe in ("vllm-muse", "vllm-megamoe"):
        few, many = (at[f"vLLM's own {recipe}", t] / at[recipe, t] for t in (1, 8192))
        said.append(f"`{recipe}` {few:.1f} times as long at one token and {many:.1f} at 8192")
    return (
        "vLLM 0.33.0's own kernels, in one run with these and writing the same bytes, take for "
        f"{', for '.join(said)} ([h100_vllm.json](data/benchmarks/h100_vllm.json)).\n"
    )


def measured_on(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    return (
        f"{machine['gpu']['name']}, Triton {versions['triton']}, torch {versions['torch']}, "
        f"{machine['date'][:10]}; microseconds, and in brackets the share of the yardstick's speed:"
    )


def renewed(text: str) -> str:
    """The README with the table and the ratios as the files have them."""
    result = Result.load(MEASURED)
    beside = beside_vllm(Result.load(BESIDE_VLLM))
    table = f"{speed(result)}\n{in_words(result)}\n{beside}"
    return TABLE.sub(lambda m: m["start"] + table + m["end"] if m["name"] == NAME else m[0], text)


def main() -> None:
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
