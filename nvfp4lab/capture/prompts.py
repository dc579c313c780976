"""Prompts for a capture from the command line: a file in, padded batches of token ids out.

The batches depend on the file and the sizes alone, so that a capture that was killed finds its
place again by counting them. To read another kind of prompt file, change `read_prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nvfp4lab.checked_json import either, parse

PROMPT = either({"text": str}, {"messages": [{str: object}]})


def read_prompts(path: str | Path, tokenizer: Any) -> Iterator[str]:
    """The prompts of a file: of .jsonl each line's "text", or its "messages" by the tokenizer's
    chat template; of any other file each line that is not blank.

    Raises: ValueError with the line's number for a line that has neither.
    """
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8; {error}") from error
            if not text.strip():
                continue
            if path.suffix != ".jsonl":
                yield text.rstrip("\r\n")
                continue
            prompt = parse(text, where, PROMPT)
            if "messages" not in prompt:
                yield prompt["text"]
                continue
            try:
                yield tokenizer.apply_chat_template(prompt["messages"], tokenize=False)
            except Exception as error:  # whatever the model's own template says to them
                raise ValueError(
                    f"{where}: the chat template refuses its messages: {error}"
                ) from error


def batches(
    prompts: Iterator[str], tokenizer: Any, batch: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """input_ids and attention_mask, int64 [<= batch, <= max_length], padded on the right.

    A longer prompt goes on as the next sequence, so that no token of it is lost.
    """
    padding = next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    waiting: list[list[int]] = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        waiting += [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        while len(waiting) >= batch:
            yield _pad(waiting[:batch], padding)
            del waiting[:batch]
    if waiting:
        yield _pad(waiting, padding)


def _pad(sequences: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    length = max(map(len, sequences))
    ids = [ids + [padding] * (length - len(ids)) for ids in sequences]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences]
    return {
        "input_ids": torch.tensor(ids, device="cpu"),
        "attention_mask": torch.tensor(mask, device="cpu"),
    }
