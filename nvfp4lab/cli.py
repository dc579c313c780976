"""The command line: `nvfp4lab COMMAND`. Each command is one `add_*` that describes its arguments
and one function that runs it; to add a command, write the two and name the first in COMMANDS.

What a command needs is imported inside the function that runs it, so that `--help` is quick.
Exit codes: 0 done, 1 the work failed, 2 it could not be started as asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class CommandError(Exception):
    """A request that cannot be carried out; the message goes to the user, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="nvfp4lab", description="What it costs to stage MoE activations in NVFP4."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"nvfp4lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnvfp4lab: interrupted", file=sys.stderr)
        return 130


# identify ---------------------------------------------------------------------------------------


def add_identify(commands: argparse._SubParsersAction) -> None:
    text = "Name the rounding, floors and layout of the kernel that wrote a tensor's FP4 bytes."
    command = commands.add_parser(
        "identify",
        help=text,
        description=text
        + " Exits 0 if one set of decisions, named or not, explains every byte, 1 if none does.",
    )
    command.add_argument(
        "input", type=Path, metavar="X.safetensors", help="the kernel's input, key `hidden`"
    )
    command.add_argument(
        "output",
        type=Path,
        metavar="Q.safetensors",
        help="what it wrote: keys `codes`, `scales` and, if it has one, `outer`",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(run=run_identify)


def run_identify(args: argparse.Namespace) -> int:
    """Print the verdict on one kernel's output."""
    from safetensors import SafetensorError, safe_open

    from nvfp4lab import diagnose

    def read(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict:
        try:
            with safe_open(path, "pt") as file:
                if missing := [key for key in required if key not in file.keys()]:  # noqa: SIM118
                    there = ", ".join(file.keys())
                    raise CommandError(f"{path} has no {' and no '.join(missing)}; it has {there}")
                there = [*required, *(key for key in optional if key in file.keys())]  # noqa: SIM118
                return {key: file.get_tensor(key) for key in there}
        except (OSError, SafetensorError) as error:
            raise CommandError(f"{path}: {error}") from error

    hidden = read(args.input, ("hidden",))["hidden"]
    written = read(args.output, ("codes", "scales"), ("outer",))
    try:
        found = diagnose.identify(hidden, **written)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(found.to_json() if args.json else found)
    return 0 if found.explained else 1


# study ------------------------------------------------------------------------------------------


def add_study(commands: argparse._SubParsersAction) -> None:
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
    command.set_defaults(run=run_study)


def run_study(args: argparse.Namespace) -> int:
    """Every notebook to its page, and index.html; one that fails does not stop the others."""
    notebooks = _find_notebooks()
    chosen = _choose(notebooks, args.only)

    import nbformat

    from nvfp4lab import publish, runs

    args.out.mkdir(parents=True, exist_ok=True)
    problems: dict[Path, str] = {}
    for path in chosen:
        progress = _Progress(path.stem, width=max(len(p.stem) for p in chosen))
        page, failed_page = args.out / f"{path.stem}.html", args.out / f"{path.stem}.failed.html"
        for older in (page, failed_page):  # it would pass for this run's
            older.unlink(missing_ok=True)
        try:
            try:
                notebook = runs.execute(path, on_cell=progress.show)
            except runs.NotebookError as error:
                problems[path] = str(error)
                notebook, page = error.partial, failed_page
            html = publish.to_html(notebook, folder=path.parent, contents="index.html")
            page.write_text(html, encoding="utf-8")
        except ValueError as error:  # not a notebook, or a page that would fetch something
            problems[path] = f"{path.name}: {error}"
        if path in problems:
            progress.end("FAILED")
            print(problems[path], file=sys.stderr)
        else:
            if args.in_place:
                text = nbformat.writes(runs.normalise(notebook)) + "\n"
                _replace(path, text.encode("utf-8"))
                if figure := runs.first_figure(notebook):
                    images = path.parent / "images"
                    images.mkdir(exist_ok=True)
                    _replace(images / f"{path.stem}.png", figure)
            progress.end("ok")

    entries = []
    for path in notebooks:  # also those that an earlier run made
        problem = problems[path].splitlines()[0] if path in problems else None
        href = f"{path.stem}.failed.html" if problem else f"{path.stem}.html"
        if (args.out / href).exists():
            about = publish.describe(nbformat.read(path, as_version=4))
            entries.append(publish.Entry(href, *about, problem=problem))
    index = args.out / "index.html"
    index.write_text(publish.contents_html("nvfp4lab: the study", entries), encoding="utf-8")
    if problems:
        failed = ", ".join(path.stem for path in problems)
        print(
            f"nvfp4lab: {len(problems)} of {len(chosen)} notebooks failed: {failed}",
            file=sys.stderr,
        )
        return 1
    print(f"Open {index}")
    return 0


def _find_notebooks() -> list[Path]:
    """NN_*.ipynb of the repository: in ./notebooks, or in the one beside the package."""
    folders = [Path.cwd() / "notebooks", Path(__file__).resolve().parent.parent / "notebooks"]
    for folder in folders:
        if found := sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            return found
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


def _replace(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


class _Progress:
    """One line for a notebook, rewritten on a terminal; a log gets its end, and a sign of life."""

    def __init__(self, name: str, width: int):
        self.name, self.started = name.ljust(width), time.monotonic()
        self.printed = self.started
        self.done, self.total = 0, 0

    def show(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if sys.stdout.isatty():
            print(f"\r{self._line()}", end="", flush=True)
        elif time.monotonic() - self.printed > 20:
            print(self._line(), flush=True)
            self.printed = time.monotonic()

    def end(self, outcome: str) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{self._line()}  {outcome}", flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        width = len(str(self.total))
        return f"{self.name}  {self.done:{width}}/{self.total} cells  {seconds:6.1f} s"


# capture ----------------------------------------------------------------------------------------


def add_capture(commands: argparse._SubParsersAction) -> None:
    text = (
        "Run a Hugging Face model over prompts and record what enters its experts. The same "
        "command goes on after an interruption. For servers there are nvfp4lab.capture.vllm_worker "
        "and sglang_wrapper, both untested on the engine."
    )
    command = commands.add_parser("capture", help=text.split(".")[0] + ".", description=text)
    command.add_argument("model", metavar="MODEL", help="folder or name of a transformers model")
    command.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='.jsonl with "text" or "messages" in each line, or text with a prompt in each line',
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="capture folder")
    command.add_argument("--tokens", type=_count, metavar="N", help="stop after N recorded tokens")
    command.add_argument(
        "--layers", type=_layer_numbers, metavar="LIST", help="only these: 0,3,10-20 (default: all)"
    )
    command.add_argument(
        "--keep",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="share of tokens kept (default: 1)",
    )
    command.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    command.add_argument(
        "--max-gb", type=_positive, metavar="GB", help="byte budget of the records"
    )
    command.add_argument("--batch", type=_count, default=1, help="prompts a pass (default: 1)")
    command.add_argument(
        "--max-length",
        type=_count,
        default=2048,
        help="tokens a prompt, then it is cut (default: 2048)",
    )
    command.add_argument("--revision", help="of the model")
    command.add_argument(
        "--dtype", default="auto", help="of the weights (default: the model's own)"
    )
    command.add_argument("--source", metavar="TEXT", help="where the prompts come from")
    command.add_argument("--licence", metavar="TEXT", help="licence of the prompts")
    command.set_defaults(run=run_capture)


def run_capture(args: argparse.Namespace) -> int:
    """Pass by pass into the folder; a pass counts when it is there as a whole."""
    if not args.prompts.is_file():
        raise CommandError(f"no prompts at {args.prompts}")
    try:
        import transformers
    except ImportError:
        raise CommandError("capture needs transformers: pip install 'nvfp4lab[capture]'") from None

    import torch
    from tqdm import tqdm

    from nvfp4lab import capture, records
    from nvfp4lab.capture import prompts

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            device_map="auto" if torch.cuda.is_available() else None,
        ).eval()
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{args.model} cannot be loaded, expected the folder or the name of a transformers "
            f"model: {error}"
        ) from error
    provenance = {
        "text": args.source or args.prompts.name,
        "text_licence": args.licence,
        "text_sha256": records.file_sha256(args.prompts),
        "batch": args.batch,
        "max_length": args.max_length,
    }
    with contextlib.ExitStack() as stack:
        try:
            recorder = stack.enter_context(
                capture.huggingface(
                    model,
                    args.out,
                    provenance=provenance,
                    layers=args.layers,
                    tokens=args.tokens,
                    keep=args.keep,
                    seed=args.seed,
                    max_bytes=None if args.max_gb is None else int(args.max_gb * 1e9),
                )
            )
        except (ValueError, RuntimeError) as error:  # what was asked for cannot be
            raise CommandError(str(error)) from error
        stack.enter_context(torch.inference_mode())
        bar = stack.enter_context(
            tqdm(total=args.tokens, initial=recorder.rows, unit=" tokens", dynamic_ncols=True)
        )
        done = recorder.passes
        texts = prompts.read_prompts(args.prompts, tokenizer)
        passes = prompts.batches(texts, tokenizer, args.batch, args.max_length)
        for batch in itertools.islice(passes, done, None):
            if recorder.full:
                break
            model(**{name: ids.to(model.device) for name, ids in batch.items()}, use_cache=False)
            bar.update(recorder.rows - bar.n)
    print(f"{recorder.rows} tokens, {recorder.bytes / 1e9:.3f} GB in {args.out}")
    if args.tokens is not None and recorder.rows < args.tokens:
        why = "the byte budget is used up" if recorder.full else "the prompts have no more"
        print(f"fewer than the {args.tokens} asked for: {why}")
    return 0


def _layer_numbers(text: str) -> list[int]:
    """0,3,10-12 -> 0, 3, 10, 11, 12."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        found = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not found:
            raise argparse.ArgumentTypeError(f"expected layers such as 0,3,10-20, got {text!r}")
        numbers += found
    return numbers


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a share in (0, 1], got {text!r}")


COMMANDS = (add_study, add_capture, add_identify)


if __name__ == "__main__":
    sys.exit(main())
