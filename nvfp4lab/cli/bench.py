"""nvfp4lab bench: how fast staging, dequantizing, measuring and quantizing are on this machine.

What is timed, and how, is `benchmarks`'; here are the options and the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nvfp4lab import files
from nvfp4lab.cli.command import CommandError, check_writable, say

PARTS = ("staging", "dequantize", "measure", "host", "cpu")
PICTURES = (".png", ".pdf", ".svg")


def add(commands: argparse._SubParsersAction) -> None:
    text = "Time the kernels beside the copy that moves the same bytes, and `quantize` on the CPU."
    command = commands.add_parser(
        "bench",
        help=text,
        description=text + " A few minutes on a GPU, which should have nothing else to do; without "
        "one only the CPU part runs. Exits 1 if a step failed; the others are printed and written.",
    )
    command.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"of {' '.join(PARTS)} (default: all)",
    )  # fmt: skip
    command.add_argument("--quick", action="store_true", help="fewer cases and shorter runs")
    command.add_argument("--out", type=Path, metavar="JSON", help="write every run and the sweep")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw staging over the tokens")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the parts, print their tables, write what was asked for."""
    for option in ("out", "plot"):
        path = getattr(args, option)
        if path is not None:
            check_writable(f"--{option}", path)
    if args.plot is not None and args.plot.suffix.lower() not in PICTURES:
        raise CommandError(f"--plot ends in {', '.join(PICTURES)}, got {args.plot}")
    from nvfp4lab import benchmarks

    settings = benchmarks.QUICK if args.quick else benchmarks.Settings()
    result = benchmarks.run(args.only, settings)
    say(result.table())  # first, lest it be lost with a full disk
    if args.out is not None:
        with files.replacing(args.out) as partial:
            partial.write_text(result.to_json(), encoding="utf-8")
    if args.plot is not None:
        _draw(result, args.plot)
    for failure in result.failed:
        say(f"nvfp4lab: failed: {failure}", sys.stderr)
    return 1 if result.failed else 0


def _draw(result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from nvfp4lab import plots

    frame = result.frame()
    frame = frame[frame["part"] == "staging"]
    if frame.empty:
        say(f"nvfp4lab: nothing was staged, so there is no {path}", sys.stderr)
        return
    widths, shown = sorted(frame["width"].unique()), ("GB/s", "of_yardstick")
    figure = Figure(figsize=(5.6 * len(widths) + 1.6, 7.2), layout="constrained")
    grid = figure.subplots(len(shown), len(widths), sharex=True, sharey="row", squeeze=False)
    for row, y in zip(grid, shown, strict=True):
        for ax, width in zip(row, widths, strict=True):
            plots.speed_over_tokens(frame[frame["width"] == width], y, ax)
            ax.set_title(f"staging, {width} wide, {result.machine['gpu']['name']}")
            ax.label_outer()
            if ax is not grid[0][-1]:
                ax.get_legend().remove()
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=144)
