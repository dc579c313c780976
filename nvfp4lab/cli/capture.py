"""nvfp4lab capture: what enters the experts of a Hugging Face model, into a capture folder.

What is recorded is `capture`'s; here a model is loaded and fed with prompts. To feed it otherwise,
change `run`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from nvfp4lab.cli.command import CommandError, check_writable, count, say


def add(commands: argparse._SubParsersAction) -> None:
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
    command.add_argument("--tokens", type=count, metavar="N", help="stop after N recorded tokens")
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
    command.add_argument("--batch", type=count, default=1, help="prompts a pass (default: 1)")
    command.add_argument(
        "--max-length",
        type=count,
        default=2048,
        help="tokens a prompt, then it is cut (default: 2048)",
    )
    command.add_argument("--revision", help="of the model")
    command.add_argument(
        "--dtype", default="auto", help="of the weights (default: the model's own)"
    )
    command.add_argument("--source", metavar="TEXT", help="where the prompts come from")
    command.add_argument("--licence", metavar="TEXT", help="licence of the prompts")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pass by pass into the folder; a pass counts when it is there as a whole."""
    if not args.prompts.is_file():
        raise CommandError(f"no prompts at {args.prompts}")

    from nvfp4lab import records

    there = next(folder for folder in [args.out, *args.out.absolute().parents] if folder.exists())
    first = there / records.CAPTURE_FILE
    check_writable("--out", args.out, first)  # before a model is loaded for minutes
    try:
        import transformers
    except ImportError:
        raise CommandError("capture needs transformers: pip install 'nvfp4lab[capture]'") from None

    import torch
    from tqdm import tqdm

    from nvfp4lab import capture
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
        for batch in itertools.islice(_readable(passes), done, None):
            if recorder.full:
                break
            model(**{name: ids.to(model.device) for name, ids in batch.items()}, use_cache=False)
            bar.update(recorder.rows - bar.n)
    say(f"{recorder.rows} tokens, {recorder.bytes / 1e9:.3f} GB in {args.out}")
    if args.tokens is not None and recorder.rows < args.tokens:
        why = "the byte budget is used up" if recorder.full else "the prompts have no more"
        say(f"fewer than the {args.tokens} asked for: {why}")
    return 0


def _readable(passes: Iterator[dict]) -> Iterator[dict]:
    """The same, with a line of the prompts that cannot be read as the user's error."""
    try:
        yield from passes
    except ValueError as error:
        raise CommandError(str(error)) from error


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
