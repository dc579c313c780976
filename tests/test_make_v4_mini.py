"""data/make_v4_mini.py from text to shipped files, at a size that a CPU trains in seconds."""

import hashlib
import json
import math
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_capture import routing
from test_capture_huggingface import DEEPSEEK_V4

import nvfp4lab as nv
from nvfp4lab.records import data_folder

sys.path.insert(0, str(data_folder()))
make_corpus = pytest.importorskip("make_v4_mini_corpus", reason="an installed wheel has no makers")
import make_manifest  # noqa: E402
import make_v4_mini  # noqa: E402

VOCABULARY = 512
PLAN = replace(
    make_v4_mini.PLAN,
    architecture=DEEPSEEK_V4 | {"vocab_size": VOCABULARY},
    steps=12,
    batch=2,
    sequence=64,
    warm_up=3,
    held_out=2,
    capture_tokens=48,
    weights_layer=2,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A work folder with a corpus: this repository's own tests as the only source."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "sources").mkdir()
    archive = folder / "sources" / "own-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in [*Path(__file__).parent.glob("*.py"), data_folder() / "README.md"]:
            tar.add(path, f"own-1/{path.name}")
        (folder / "binary.py").write_bytes(b"\xff" * 999)
        tar.add(folder / "binary.py", "own-1/binary.py")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_corpus, "SOURCES", {"own==1": ("Apache-2.0", sha256)})
        patch.setattr(make_corpus, "VOCABULARY", VOCABULARY)
        patch.setattr(make_corpus, "TRAIN_TOKENS", 100_000)
        patch.setattr(make_corpus, "HELD_OUT", 5)
        make_corpus.build(folder)
    return folder


@pytest.fixture(scope="module")
def trained(work) -> dict:
    """The log of a training that was stopped once and gone on with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_v4_mini, "CURVE_EVERY", 4)
        patch.setattr(make_v4_mini, "EVALUATE_EVERY", 8)
        assert not make_v4_mini.train(PLAN, work, minutes=0, device="cpu")
        assert make_v4_mini.train(PLAN, work, minutes=9, device="cpu")
    return json.loads((work / "training.json").read_text())


def test_the_corpus_is_token_ids_of_its_texts(work):
    about = json.loads((work / "corpus.json").read_text())
    train, held_out = np.load(work / "train.npy"), np.load(work / "held_out.npy")
    assert train.dtype == held_out.dtype == np.uint16
    assert len(train) == about["train_tokens"] <= 100_000
    assert len(held_out) == about["held_out_tokens"] > 0
    assert max(train.max(), held_out.max()) < VOCABULARY
    assert (train == make_corpus.END_OF_TEXT).any()
    assert about["train_sha256"] == hashlib.sha256((work / "train.npy").read_bytes()).hexdigest()


def test_the_tokenizer_gives_the_text_back(work):
    tokenizer = make_v4_mini.Tokenizer.from_file(str(work / "tokenizer.json"))
    text = make_v4_mini.TEXT.read_text()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_an_altered_source_is_refused(work):
    with pytest.raises(SystemExit, match=r"own-1.tar.gz: expected sha256 00, found [0-9a-f]{64}"):
        make_corpus.download("own==1", "00", work)


def test_training_goes_on_from_its_checkpoint_and_learns(trained):
    assert (trained["step"], trained["tokens_seen"]) == (12, 12 * 2 * 64)
    assert [step for step, _ in trained["curve"]] == [4, 8, 12]
    assert [step for step, _ in trained["held_out"]] == [8, 12]
    assert trained["held_out"][-1][1] < math.log(VOCABULARY)  # below that of a uniform guess


def test_the_expert_load_is_that_of_every_layer(trained):
    assert sorted(trained["expert_load"]) == ["0", "1", "2", "3"]
    for shares in trained["expert_load"].values():
        assert len(shares) == 8 and sum(shares) == pytest.approx(1, abs=1e-4)


def test_resuming_does_not_change_what_is_seen():
    tokens = np.arange(5000, dtype=np.uint16)
    again = [make_v4_mini.crops(tokens, PLAN, step) for step in (0, 1, 1)]
    assert again[1].equal(again[2]) and not again[0].equal(again[1])
    assert again[0].shape == (2, 65) and (again[0].diff() == 1).all()


def test_the_learning_rate_rises_and_falls():
    plan = replace(PLAN, steps=103, warm_up=3, learning_rate=1.0)
    rates = [make_v4_mini.learning_rate(plan, step) for step in range(103)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[53] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_hash_tables_send_a_token_to_distinct_experts():
    model = make_v4_mini.make_model(PLAN, "cpu")
    (table,) = [table for name, table in model.named_buffers() if name.endswith("tid2eid")]
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert len(table.unique()) == 8


def test_the_bias_moves_against_the_load():
    model = make_v4_mini.make_model(PLAN, "cpu")
    counts = {layer: torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]) for layer in range(4)}
    make_v4_mini.balance(model, counts, 0.5)
    bias = dict(model.named_buffers())["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_what_is_shipped_is_the_capture_and_the_trained_experts(work, trained, tmp_path):
    records, weights = make_v4_mini.capture(PLAN, work, "cpu")
    make_manifest.write_set("v4-mini", weights.provenance, records, weights, tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["v4-mini"]
    assert [f["path"] for f in entry["files"]] == [
        f"v4-mini/layer{layer:02d}.expert_input.safetensors" for layer in range(4)
    ]
    assert records[2].hidden.shape == (48, 256) and routing(records[2])[0].shape == (48, 2)
    state = torch.load(work / "checkpoint.pt", weights_only=True)["model"]
    path = "model.layers.2.mlp.experts.parametrizations.down_proj.original"
    stored = load_file(tmp_path / entry["weights"]["path"])
    assert stored["down_proj"].equal(state[path].bfloat16())
    assert "this is not DeepSeek V4" in records[0].provenance["is"]


def test_a_remade_set_is_held_to_its_bands():
    recorded = {"held_out_loss": 2.0, "layer00.expert_input kurtosis": 3.0}
    near = {"held_out_loss": 2.05, "layer00.expert_input kurtosis": 3.7}
    far = {"held_out_loss": 2.07, "layer00.expert_input kurtosis": 3.7}
    assert make_v4_mini.outside_bands(near, recorded) == []
    (problem,) = make_v4_mini.outside_bands(far, recorded)
    assert problem == "held_out_loss: 2.07, recorded 2, band 3%"


def test_the_recorded_statistics_are_those_of_the_shipped_set():
    log = json.loads((data_folder() / "v4-mini" / "training.json").read_text())
    found = make_v4_mini.statistics(list(nv.activations("v4-mini")), log)
    assert found == pytest.approx(log["statistics"], rel=1e-9)
    assert log["step"] == make_v4_mini.PLAN.steps
    assert log["tokens_seen"] == log["step"] * make_v4_mini.PLAN.batch * make_v4_mini.PLAN.sequence
