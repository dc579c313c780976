"""Rewrites the table of speeds in the project's README.md from benchmarks/h100.json.

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


def measured_on(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    return (
        f"{machine['gpu']['name']}, Triton {versions['triton']}, torch {versions['torch']}, "
        f"{machine['date'][:10]}; microseconds, and in brackets the share of the yardstick's speed:"
    )


def renewed(text: str) -> str:
    """The README with the table as the file has it; without a table where there is no file."""
    table = speed(Result.load(MEASURED)) if MEASURED.exists() else ""
    return TABLE.sub(lambda m: m["start"] + table + m["end"] if m["name"] == NAME else m[0], text)


def main() -> None:
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
