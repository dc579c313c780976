"""nvfp4lab study: the notebooks, run on the shipped activations, as HTML pages.

How a notebook is run is `runs`', how a page is made `publish`'s; here is the order, and which files
are written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvfp4lab import files
from nvfp4lab.cli.command import CommandError, check_writable, say
from nvfp4lab.cli.progress import Progress

REPORT = "report"  # the one notebook that has no number, and no finding of its own


def add(commands: argparse._SubParsersAction) -> None:
    text = "Run the notebooks on the shipped activations and write them as HTML pages."
    command = commands.add_parser("study", help=text, description=text)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("build/study"),
        metavar="DIR",
        help="folder of the pages (default: %(default)s)",
    )
    command.add_argument(
        "--only", nargs="+", metavar="NAME", help="run these only: 01_staging, or just 01"
    )
    command.add_argument(
        "--in-place",
        action="store_true",
        help="also save the new outputs in the notebook files, and their first figures",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Every notebook to its page, and index.html; one that fails does not stop the others."""
    notebooks = _find_notebooks()
    chosen = _choose(notebooks, args.only)

    import nbformat

    from nvfp4lab import publish, runs

    args.out.mkdir(parents=True, exist_ok=True)
    check_writable("--out", args.out / "index.html")
    problems: dict[Path, str] = {}
    for path in chosen:
        progress = Progress(path.stem, width=max(len(p.stem) for p in chosen))
        page, failed_page = args.out / f"{path.stem}.html", args.out / f"{path.stem}.failed.html"
        for older in (page, failed_page):  # it would pass for this run's
            older.unlink(missing_ok=True)
        try:
            try:
                notebook = runs.execute(path, on_cell=progress.show)
            except runs.NotebookError as error:
                problems[path] = str(error)
                notebook, page = error.partial, failed_page
            html = publish.to_html(
                notebook, folder=path.parent, out=args.out, contents="index.html"
            )
            with files.replacing(page) as partial:
                partial.write_text(html, encoding="utf-8")
        except ValueError as error:  # not a notebook, or a page that would fetch something
            problems[path] = f"{path.name}: {error}"
        if path in problems:
            progress.end("FAILED")
            say(problems[path], sys.stderr)
        else:
            if args.in_place:
                text = nbformat.writes(runs.normalise(notebook)) + "\n"
                with files.replacing(path) as partial:
                    partial.write_text(text, encoding="utf-8", newline="\n")
                if path.stem != REPORT and (figure := runs.first_figure(notebook)):
                    images = path.parent / "images"
                    images.mkdir(exist_ok=True)
                    with files.replacing(images / f"{path.stem}.png") as partial:
                        partial.write_bytes(figure)
            progress.end("ok")

    entries = []
    for path in notebooks:  # also those that an earlier run made
        problem = problems[path].splitlines()[0] if path in problems else None
        href = f"{path.stem}.failed.html" if problem else f"{path.stem}.html"
        if (args.out / href).exists():
            notebook = nbformat.read(path, as_version=4)
            figure = runs.first_figure(notebook)  # as committed
            entries.append(publish.Entry(href, *publish.describe(notebook), problem, figure))
    index = args.out / "index.html"
    with files.replacing(index) as partial:
        contents = publish.contents_html("nvfp4lab: the study", entries)
        partial.write_text(contents, encoding="utf-8")
    if problems:
        failed = ", ".join(path.stem for path in problems)
        say(
            f"nvfp4lab: {len(problems)} of {len(chosen)} notebooks failed: {failed}",
            sys.stderr,
        )
        return 1
    say(f"Open {index}")
    return 0


def _find_notebooks() -> list[Path]:
    """NN_*.ipynb of the repository, in ./notebooks or in the one beside the package, and the
    report's, which then is on the shipped activations."""
    folders = [Path.cwd() / "notebooks", Path(__file__).resolve().parents[2] / "notebooks"]
    for folder in folders:
        if found := sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            return [*found, *folder.glob(f"{REPORT}.ipynb")]
    raise CommandError(
        "found no notebooks/NN_*.ipynb in "
        + " or ".join(str(folder.parent) for folder in dict.fromkeys(folders))
        + "; run this in a checkout of nvfp4lab"
    )


def _choose(notebooks: list[Path], only: Sequence[str] | None) -> list[Path]:
    if only is None:
        return notebooks
    names = [Path(name).name.removesuffix(".ipynb") for name in only]
    known = {path.stem for path in notebooks} | {path.stem[:2] for path in notebooks}
    if unknown := [name for name in names if name not in known]:
        have = ", ".join(path.stem for path in notebooks)
        raise CommandError(f"no notebook {', '.join(unknown)}; there are {have}")
    return [path for path in notebooks if path.stem in names or path.stem[:2] in names]
