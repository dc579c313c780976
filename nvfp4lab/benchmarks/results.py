"""Sample and Result: what a benchmark measured, as rows, a printed table and a JSON file.

A sample is one case: microseconds of each run, of which the median counts. Ratios are never stored
apart from the samples that they are made of: `Result.frame` works them out. May be changed: fields
may be added; those there are keep their meaning, for `data/benchmarks/*.json` holds them.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from nvfp4lab.checked_json import COUNT, magnitude, parse

# What the second ratio of each part is called; it is against the fastest sample whose role is
# "reference": the user's kernel, the same in torch eager, the fastest installed package.
OF_REFERENCE = {"staging": "of_seed", "measure": "of_eager", "cpu": "of_peer"}
DIGITS = {"GB/s": 0, "of_yardstick": 3}
SHOWN = ["name", "tokens", "width", "us", "spread_us", "GB/s", "of_yardstick"]
FILE = {
    "machine": {str: object},
    "settings": {str: object},
    "samples": [
        {
            **dict.fromkeys(("part", "name", "note", "group"), str),
            **dict.fromkeys(("tokens", "width", "bytes"), COUNT),
            "runs_us": [magnitude],
            "role": {"yardstick", "reference", "measured"},
        }
    ],
    "sweep": [{str: object}],
    "left_out": [str],
    "failed": [str],
}
KEYS = ("part", "name", "tokens", "width", "runs_us", "bytes", "role", "note", "group")


@dataclass(frozen=True)
class Sample:
    """One case, timed several times.

    part: of the benchmark. name: a recipe, or what stands beside the recipes. tokens, width: of the
    activations. runs_us: microseconds of one call, a number a run. bytes: that one call has to
    read and write; 0 where that is not what bounds it. role: "yardstick" for the copy beside it,
    "reference" for what is there to be beaten. note: how it was done, where that is not plain.
    group: only samples of one group are compared with each other.
    """

    part: str
    name: str
    tokens: int
    width: int
    runs_us: tuple[float, ...]
    bytes: int = 0
    role: Literal["yardstick", "reference", "measured"] = "measured"
    note: str = ""
    group: str = ""

    @property
    def case(self) -> tuple[str, str, int, int]:
        """What samples share that are compared with each other."""
        return self.part, self.group, self.tokens, self.width

    @property
    def us(self) -> float:
        """The median run."""
        return statistics.median(self.runs_us)

    @property
    def spread_us(self) -> float:
        """The slowest run less the fastest."""
        return max(self.runs_us) - min(self.runs_us)


@dataclass(frozen=True)
class Result:
    """Samples, the machine that they hold for, what was left out and what failed.

    machine: as `machine.describe` gives it. settings: of the run. sweep: a row for each shape of
    the yardstick that was tried: direction, tokens, width, vector, warps, times, streaming,
    elements, us.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    samples: tuple[Sample, ...]
    sweep: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def ratio(self, sample: Sample, role: str) -> float:
        """The time of the fastest of that role and the sample's case over the sample's own: 1 is as
        fast, 10 ten times as fast; NaN where there is none."""
        rivals = (s.us for s in self.samples if s.role == role and s.case == sample.case)
        return min(rivals, default=math.nan) / sample.us

    def frame(self) -> pd.DataFrame:
        """A row a sample, columns part, name, tokens, width, bytes, role, note, group, us,
        spread_us, GB/s, of_yardstick and of_reference: its `ratio` to each."""
        return pd.DataFrame([self._row(sample) for sample in self.samples])

    def _row(self, sample: Sample) -> dict[str, Any]:
        return {key: getattr(sample, key) for key in KEYS if key != "runs_us"} | {
            "us": sample.us,
            "spread_us": sample.spread_us,
            "GB/s": sample.bytes / sample.us / 1e3 if sample.bytes else math.nan,
            "of_yardstick": self.ratio(sample, "yardstick"),
            "of_reference": self.ratio(sample, "reference"),
        }

    def table(self) -> str:
        """The samples as text, a table a part, then what was left out or failed."""
        texts = []
        for part in dict.fromkeys(s.part for s in self.samples):
            rows = [self._row(sample) for sample in self.samples if sample.part == part]
            header = [*SHOWN, OF_REFERENCE.get(part, "of_reference")]
            lines = [[_cell(row, column) for column in [*SHOWN, "of_reference"]] for row in rows]
            texts.append(f"{part}\n{aligned([header, *lines])}")
        texts += [f"left out: {text}" for text in self.left_out]
        texts += [f"failed: {text}" for text in self.failed]
        return "\n\n".join(texts)

    def to_json(self) -> str:
        """JSON, a line a sample and a line a shape of the sweep, ratios included."""
        samples = []
        for sample in self.samples:
            entry = {key: getattr(sample, key) for key in KEYS}
            entry |= {"us": sample.us, "spread_us": round(sample.spread_us, 4)}
            ratios = {
                "of_yardstick": self.ratio(sample, "yardstick"),
                OF_REFERENCE.get(sample.part, "of_reference"): self.ratio(sample, "reference"),
            }
            entry |= {name: round(v, 4) for name, v in ratios.items() if not math.isnan(v)}
            samples.append(entry)
        lines = ["{"]
        for name in ("machine", "settings", "left_out", "failed"):
            lines.append(f'"{name}": {json.dumps(getattr(self, name), indent=1)},')
        for name, rows, end in (("samples", samples, ","), ("sweep", self.sweep, "")):
            body = ",\n".join(json.dumps(row) for row in rows)
            lines.append(f'"{name}": [\n{body}\n]{end}' if body else f'"{name}": []{end}')
        return "\n".join([*lines, "}"]) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """What `to_json` wrote. Raises: ValueError if a file is none."""
        where = f"{path} is no benchmark result"
        given = parse(Path(path).read_bytes(), where, FILE)
        samples: list[dict[str, Any]] = [
            {key: entry[key] for key in KEYS} | {"runs_us": tuple(entry["runs_us"])}
            for entry in given["samples"]
        ]
        if not all(entry["runs_us"] and min(entry["runs_us"]) > 0 for entry in samples):
            raise ValueError(f"{where}: a sample has one run or more, each above 0 us")
        return cls(
            given["machine"],
            given["settings"],
            tuple(Sample(**entry) for entry in samples),
            tuple(given["sweep"]),
            tuple(given["left_out"]),
            tuple(given["failed"]),
        )


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.{DIGITS.get(column, 2)}f}"


def aligned(rows: list[list[str]]) -> str:
    """Columns two spaces apart, right-aligned but the first; those without a cell are left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    pads = [f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])]
    lines = ("  ".join(pads).format(*row) for row in zip(*kept, strict=True))
    return "\n".join(line.rstrip() for line in lines)
