"""The text and code that v4-mini is trained on, as token ids: the first stage of make_v4_mini.py.

Twelve source distributions from PyPI, pinned and held by their sha256, under free licences.
Every document in them (.rst, .txt, .md) is taken, and Python files in a seeded order, until there
are TRAIN_TOKENS; each file is a text of its own, and one in a hundred is held out. The tokenizer is
a byte-level BPE trained on the same texts. To train on other text, change SOURCES.
"""

import hashlib
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, END_OF_TEXT = 16384, 0
TRAIN_TOKENS = 17_400_000  # 34.8 MB as uint16
HELD_OUT = 100  # one text in so many
SMALLEST = 200  # bytes; shorter files are empty __init__.py and the like

# name==version: licence, sha256 of the source distribution
SOURCES = {
    "celery==5.5.3": (
        "BSD-3-Clause",
        "6c972ae7968c2b5281227f01c3a3f984037d21c5129d07bf3550cc2afc6b10a5",
    ),
    "dask==2025.10.0": (
        "BSD-3-Clause",
        "fd3159c319c27cea39b891c0f22d60056a33575fb4906618eab0aeeb5dcd0cbc",
    ),
    "django==5.2.8": (
        "BSD-3-Clause",
        "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    ),
    "ipython==9.6.0": (
        "BSD-3-Clause",
        "5603d6d5d356378be5043e69441a072b50a5b33b4503428c77b04cb8ce7bc731",
    ),
    "mypy==1.18.2": (
        "MIT; its typeshed Apache-2.0",
        "06a398102a5f203d7477b2923dda3634c36727fa5c237d8f859ef90c42a9924b",
    ),
    "networkx==3.5": (
        "BSD-3-Clause",
        "d4c6f9cf81f52d69230866796b82afbccdec3db7ae4fbd1b65ea750feed50037",
    ),
    "pytest==8.4.2": (
        "MIT",
        "86c0d0b93306b961d58d62a4db4879f27fe25513d4b969df351abdddb3c30e01",
    ),
    "scrapy==2.13.3": (
        "BSD-3-Clause",
        "bf17588c10e46a9d70c49a05380b749e3c7fba58204a367a5747ce6da2bd204d",
    ),
    "setuptools==80.9.0": (
        "MIT",
        "f36b47402ecde768dbfafc46e8e4207b4360c654f1f3bb84475f0a28628fb19c",
    ),
    "sphinx==8.2.3": (
        "BSD-2-Clause",
        "398ad29dee7f63a75888314e9424d40f52ce5a6a87ae88e7071e80af296ec348",
    ),
    "sympy==1.14.0": (
        "BSD-3-Clause",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    ),
    "twisted==25.5.0": (
        "MIT",
        "1deb272358cb6be1e3e8fc6f9c8b36f78eb0fa7c2233d2dbe11ec6fee04ea316",
    ),
}


def build(work: Path) -> None:
    """Write tokenizer.json, train.npy and held_out.npy (uint16 token ids) and corpus.json."""
    archives = [download(name, sha256, work) for name, (_, sha256) in SOURCES.items()]
    texts = [text for archive in archives for text in read(archive)]
    documents = [text for name, text in texts if not name.endswith(".py")]
    code = [text for name, text in texts if name.endswith(".py")]
    random.Random(0).shuffle(code)
    tokenizer = train_tokenizer(documents + code)
    tokenizer.save(str(work / "tokenizer.json"))

    chosen: list[np.ndarray] = []
    total = taken = 0
    for text in documents + code:
        ids = np.array([END_OF_TEXT, *tokenizer.encode(text).ids], dtype=np.uint16)
        chosen.append(ids)
        total, taken = total + len(ids), taken + len(text.encode())
        if total > TRAIN_TOKENS * HELD_OUT / (HELD_OUT - 1):
            break
    random.Random(1).shuffle(chosen)
    held_out, train = chosen[: len(chosen) // HELD_OUT], chosen[len(chosen) // HELD_OUT :]
    np.save(work / "held_out.npy", np.concatenate(held_out))
    np.save(work / "train.npy", np.concatenate(train)[:TRAIN_TOKENS])
    about = {
        "sources": {name: licence for name, (licence, _) in SOURCES.items()},
        "texts": len(chosen),
        "documents": min(len(documents), len(chosen)),
        "bytes": taken,
        "train_tokens": int(min(TRAIN_TOKENS, sum(map(len, train)))),
        "held_out_tokens": int(sum(map(len, held_out))),
        "tokenizer": f"byte-level BPE, {VOCABULARY} tokens, trained on the same texts",
        "train_sha256": hashlib.sha256((work / "train.npy").read_bytes()).hexdigest(),
    }
    (work / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")


def download(name: str, sha256: str, work: Path) -> Path:
    """The source distribution `name`, by pip, checked."""
    stem = name.replace("==", "-")
    folder = work / "sources"
    if not (archive := folder / f"{stem}.tar.gz").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", str(folder), name], check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{archive}: expected sha256 {sha256}, found {found}")
    return archive


def read(archive: Path) -> list[tuple[str, str]]:
    """(name, text) of the documents and Python files of an archive, in the order of their names."""
    texts = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            wanted = member.name.endswith((".rst", ".txt", ".md", ".py"))
            if member.isfile() and wanted and member.size >= SMALLEST:
                content = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                try:
                    texts.append((member.name, content.decode("utf-8")))
                except UnicodeDecodeError:  # a test's own binary: no text
                    continue
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],  # id END_OF_TEXT
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
