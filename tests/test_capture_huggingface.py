"""Capture from transformers, end to end on tiny models that are made here and run on the CPU.

What the experts got is noted by a hook of the test's own, after every other hook has run; what was
recorded must equal it bit for bit. DeepSeek V4 is transformers' own, with random weights.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_capture import routing

import nvfp4lab as nv
from nvfp4lab import cli
from nvfp4lab.capture import huggingface_hooks

DEEPSEEK_V4: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"],
    "num_hash_layers": 1,
    "sliding_window": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "max_position_embeddings": 1024,
    "vocab_size": 512,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


def fill_hash_tables(model: torch.nn.Module) -> None:
    """Distinct experts for each token; as made the tables are zeros."""
    generator = torch.Generator().manual_seed(1)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(512, 8, generator=generator).topk(2).indices)


@pytest.fixture(scope="module")
def saved_v4(tmp_path_factory) -> Path:
    """A tiny DeepSeek V4 with a tokenizer, as from_pretrained finds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny_v4")
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**DEEPSEEK_V4))
    fill_hash_tables(model)
    model.save_pretrained(path)
    words = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(500))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>"
    ).save_pretrained(path)
    return path


def load_v4(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return transformers.DeepseekV4ForCausalLM.from_pretrained(path, dtype=dtype).eval()


def note_experts(model) -> dict[int, list[tuple[torch.Tensor, ...]]]:
    """layer -> what its experts got, in each pass."""
    got: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for layer, block in enumerate(model.model.layers):

        def note(module, arguments, layer=layer):
            got.setdefault(layer, []).append(tuple(a.clone() for a in arguments))

        block.mlp.experts.register_forward_pre_hook(note)
    return got


def batch(seed: int, rows: int = 3, length: int = 40) -> dict[str, torch.Tensor]:
    """Token ids and the mask of texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 500, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def join(path: Path) -> dict[int, nv.Activations]:
    shards = nv.load_activations(path, sha256=True)
    assert len({s.layer for s in shards}) == len(shards)
    return {s.layer: s for s in shards}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_recorded_is_what_the_experts_got(tmp_path, saved_v4, dtype):
    model = load_v4(saved_v4, dtype)
    got = note_experts(model)
    inputs = [batch(seed) for seed in (1, 2)]
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c"):
        for each in inputs:
            model(**each)
    valid = torch.cat([each["attention_mask"].flatten() for each in inputs]).bool()
    recorded = join(tmp_path / "c")
    assert sorted(recorded) == [0, 1, 2, 3]
    for layer, site in recorded.items():
        hidden, ids, weights = (torch.cat(parts)[valid] for parts in zip(*got[layer], strict=True))
        assert site.hidden.equal(hidden.bfloat16())
        assert routing(site)[0].equal(ids)
        assert routing(site)[1].equal(weights.float())


def test_the_experts_input_is_the_norms_output(tmp_path, saved_v4):
    """The routed experts get what the shared expert gets: the output of the layer's norm."""
    model, outputs = load_v4(saved_v4), {}
    for layer, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_hook(
            lambda module, arguments, output, layer=layer: outputs.update({layer: output})
        )
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c"):
        model(input_ids=batch(0)["input_ids"])
    for layer, site in join(tmp_path / "c").items():
        assert site.hidden.equal(outputs[layer].flatten(0, 1))


def test_hash_layers_and_routed_layers_are_both_recorded(tmp_path, saved_v4):
    model, ids = load_v4(saved_v4), batch(0)["input_ids"]
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c"):
        model(input_ids=ids)
    recorded = join(tmp_path / "c")
    table = model.model.layers[0].mlp.gate.tid2eid
    assert routing(recorded[0])[0].equal(table[ids.flatten()])
    assert not routing(recorded[1])[0].equal(table[ids.flatten()])


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_the_tokens_places_in_their_texts(tmp_path, saved_v4, side):
    each = batch(3)
    if side == "left":
        each = {name: tensor.flip(1) for name, tensor in each.items()}
    model = load_v4(saved_v4)
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c"):
        model(**each)
    lengths = each["attention_mask"].sum(1).tolist()
    want = torch.cat([torch.arange(length) for length in lengths])
    assert join(tmp_path / "c")[0].positions.equal(want)


def test_generation_is_recorded_token_by_token(tmp_path, saved_v4):
    """The prompt, then each new token but the last, which enters no layer."""
    model = load_v4(saved_v4)
    got = note_experts(model)
    with nv.capture.huggingface(model, tmp_path / "c"):
        model.generate(input_ids=batch(0, rows=1)["input_ids"], max_new_tokens=5, do_sample=False)
    site = join(tmp_path / "c")[2]
    assert site.positions.equal(torch.arange(44))
    assert site.hidden.equal(torch.cat([hidden for hidden, _, _ in got[2]]))


def test_the_model_gives_the_same_with_and_without_capture(tmp_path, saved_v4):
    model, each = load_v4(saved_v4), batch(0)
    with torch.inference_mode():
        before = model(**each).logits
        with nv.capture.huggingface(model, tmp_path / "c"):
            during = model(**each).logits
        after = model(**each).logits
    assert during.equal(before) and after.equal(before)


def test_no_hook_is_left(tmp_path, saved_v4):
    model = load_v4(saved_v4)
    with pytest.raises(KeyError), nv.capture.huggingface(model, tmp_path / "c"):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pass_that_failed_leaves_nothing(tmp_path, saved_v4):
    model, good = load_v4(saved_v4), batch(0)
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c") as recorder:
        fails = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch(1))
        fails.remove()
        model(**good)
    assert recorder.passes == 1
    assert len(join(tmp_path / "c")[3]) == good["attention_mask"].sum()


def test_ids_are_taken_before_expert_parallelism_remaps_them(tmp_path, saved_v4):
    model, ids = load_v4(saved_v4), batch(0)["input_ids"]

    def remap(module, arguments):
        hidden, experts, weights = arguments
        return hidden, (experts + 1) % 8, weights

    model.model.layers[0].mlp.experts.register_forward_pre_hook(remap)
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c", layers=[0]):
        model(input_ids=ids)
    table = model.model.layers[0].mlp.gate.tid2eid
    assert routing(join(tmp_path / "c")[0])[0].equal(table[ids.flatten()])


def test_a_dense_model_is_recorded_without_routing(tmp_path):
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    got = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c"):
        model(**batch(0))
    site = join(tmp_path / "c")[1]
    valid = batch(0)["attention_mask"].flatten().bool()
    assert (site.site, site.topk_ids) == ("mlp_input", None)
    assert site.hidden.equal(got[0].flatten(0, 1)[valid].bfloat16())


def test_the_record_says_what_it_is(tmp_path, saved_v4):
    model = load_v4(saved_v4)
    about = {"text": "random words", "text_licence": "none needed"}
    with torch.inference_mode(), nv.capture.huggingface(model, tmp_path / "c", provenance=about):
        model(**batch(0))
    told = join(tmp_path / "c")[0].provenance
    assert told["is"] == f"what enters the experts of {saved_v4} (DeepseekV4ForCausalLM)"
    assert told["engine"].startswith(f"transformers {transformers.__version__}, torch ")
    assert (told["dtype"], told["weight_quantization"]) == ("bfloat16", "none")
    assert (told["model_type"], told["captured_or_synthetic"]) == ("deepseek_v4", "captured")
    assert about.items() <= told.items()


def test_a_layer_that_is_not_there_is_refused(tmp_path, saved_v4):
    with (
        pytest.raises(ValueError, match=r"has no layer \[7\], expected some of \[0, 1, 2, 3\]"),
        nv.capture.huggingface(load_v4(saved_v4), tmp_path / "c", layers=[1, 7]),
    ):
        pass
    assert not (tmp_path / "c").exists()


def test_a_model_without_layers_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"expected one stack of layers with .mlp .* found none"),
        nv.capture.huggingface(torch.nn.Linear(2, 2), tmp_path / "c"),
    ):
        pass


def test_a_mask_that_does_not_show_the_padding_is_refused(tmp_path, saved_v4):
    model = load_v4(saved_v4)
    mask = torch.zeros(3, 1, 40, 40, dtype=torch.bfloat16)
    with (
        nv.capture.huggingface(model, tmp_path / "c"),
        pytest.raises(ValueError, match="needs the two-dimensional attention mask"),
    ):
        model(batch(0)["input_ids"], attention_mask=mask)


# the norm that returned float32 -----------------------------------------------------------------


def faulty_norm(self, hidden_states):
    """DeepseekV4RMSNorm of transformers 5.17: the product with a float32 weight is float32."""
    x = hidden_states.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * x.to(hidden_states.dtype)


def test_with_the_faulty_norm_a_bf16_model_runs_and_records_what_a_right_one_gives(
    tmp_path, saved_v4, monkeypatch
):
    each, right = batch(0), load_v4(saved_v4)
    with torch.inference_mode(), nv.capture.huggingface(right, tmp_path / "right"):
        right(**each)
    module = sys.modules["transformers.models.deepseek_v4.modeling_deepseek_v4"]
    monkeypatch.setattr(module.DeepseekV4RMSNorm, "forward", faulty_norm)
    model = load_v4(saved_v4)
    with pytest.raises(RuntimeError, match="dtype"), torch.inference_mode():
        model(**each)
    with (
        pytest.warns(UserWarning, match="DeepseekV4RMSNorm returns float32 for BF16 input"),
        torch.inference_mode(),
        nv.capture.huggingface(model, tmp_path / "faulty"),
    ):
        model(**each)
    for layer, site in join(tmp_path / "faulty").items():
        assert site.hidden.equal(join(tmp_path / "right")[layer].hidden)


def test_a_right_norm_is_left_alone(saved_v4, recwarn):
    assert huggingface_hooks._correct_norms(load_v4(saved_v4)) == []


# the command ------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Twenty prompts of 1 to 60 words."""
    generator = torch.Generator().manual_seed(4)
    lines = [
        " ".join(f"w{i}" for i in torch.randint(0, 500, (length,), generator=generator).tolist())
        for length in torch.randint(1, 61, (20,), generator=generator).tolist()
    ]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines))
    return tmp_path / "prompts.txt"


def command(saved_v4: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--batch", "3", "--max-length", "32"]
    return ["capture", str(saved_v4), "--prompts", str(prompts), "--out", str(out), *sizes, *more]


def words_of(prompts: Path) -> list[int]:
    return [int(word[1:]) + 1 for word in prompts.read_text().split()]


def test_the_command_records_every_token_once(tmp_path, saved_v4, prompts, capsys):
    assert cli.main(command(saved_v4, prompts, tmp_path / "c")) == 0
    site = join(tmp_path / "c")[0]
    table = load_v4(saved_v4).model.layers[0].mlp.gate.tid2eid
    assert routing(site)[0].equal(table[torch.tensor(words_of(prompts))])
    assert f"{len(words_of(prompts))} tokens" in capsys.readouterr().out


def test_the_command_goes_on_where_it_was_killed(tmp_path, saved_v4, prompts):
    cli.main(command(saved_v4, prompts, tmp_path / "whole"))
    root = Path(__file__).resolve().parent.parent
    code = (
        "import os, signal, sys\nfrom nvfp4lab import cli\n"
        "from nvfp4lab.capture import Recorder\nend = Recorder.end\n"
        "def dies(self):\n    end(self)\n"
        "    if self.passes == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Recorder.end = dies\ncli.main(sys.argv[1:])"
    )
    arguments = command(saved_v4, prompts, tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="was interrupted"):
        nv.load_activations(tmp_path / "c")
    assert cli.main(arguments) == 0
    for layer, want in join(tmp_path / "whole").items():
        got = join(tmp_path / "c")[layer]
        assert got.hidden.equal(want.hidden) and routing(got)[0].equal(routing(want)[0])


def test_the_command_stops_at_its_tokens(tmp_path, saved_v4, prompts):
    assert cli.main(command(saved_v4, prompts, tmp_path / "c", "--tokens", "50")) == 0
    assert {len(s) for s in join(tmp_path / "c").values()} == {50}


def test_the_command_says_when_the_prompts_are_too_few(tmp_path, saved_v4, prompts, capsys):
    assert cli.main(command(saved_v4, prompts, tmp_path / "c", "--tokens", "100000")) == 0
    assert "fewer than the 100000 asked for: the prompts have no more" in capsys.readouterr().out


def test_other_prompts_are_not_mixed_in(tmp_path, saved_v4, prompts, capsys):
    cli.main(command(saved_v4, prompts, tmp_path / "c"))
    prompts.write_text("w1 w2")
    assert cli.main(command(saved_v4, prompts, tmp_path / "c")) == 2
    assert "holds a capture with another text_sha256" in capsys.readouterr().err


def test_missing_prompts_are_an_error_before_the_model_is_loaded(tmp_path, capsys):
    nowhere = tmp_path / "nowhere.txt"
    assert cli.main(command(Path("no/such/model"), nowhere, tmp_path / "c")) == 2
    assert f"no prompts at {nowhere}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named_before_the_model_is_loaded(
    tmp_path, prompts, capsys
):
    out = prompts / "new" / "c"  # below a file
    assert cli.main(command(Path("no/such/model"), prompts, out)) == 2
    assert f"--out {out} cannot be written: there is no folder {prompts}" in capsys.readouterr().err


def test_a_json_prompt_is_its_text(tmp_path, saved_v4):
    lines = [{"text": "w1 w2 w3"}, {"text": "w4"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    cli.main(command(saved_v4, path, tmp_path / "c"))
    table = load_v4(saved_v4).model.layers[0].mlp.gate.tid2eid
    assert routing(join(tmp_path / "c")[0])[0].equal(table[torch.tensor([2, 3, 4, 5])])


def test_a_json_prompt_without_text_is_named(tmp_path, saved_v4, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "w1"}\n{"prompt": "w2"}')
    assert cli.main(command(saved_v4, path, tmp_path / "c")) == 2
    expected = "line 2: expected an object with text or an object with messages"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("text", "want"), [("3", [3]), ("0,2-4,9", [0, 2, 3, 4, 9])])
def test_layers_are_numbers_and_ranges(text, want):
    assert cli.capture._layer_numbers(text) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "x"], "expected layers such as 0,3,10-20, got 'x'"),
        (["--layers", "20-10"], "expected layers such as 0,3,10-20, got '20-10'"),
        (["--layers=-3"], "expected layers such as 0,3,10-20, got '-3'"),
        (["--tokens", "0"], "expected a whole number of 1 or more, got '0'"),
        (["--keep", "2"], "expected a share in (0, 1], got '2'"),
        (["--max-gb", "nan"], "expected a number above 0, got 'nan'"),
    ],
)
def test_numbers_are_checked_before_the_model_is_loaded(tmp_path, capsys, arguments, message):
    command = ["capture", "no such model", "--prompts", str(tmp_path / "none"), "--out", "o"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_an_error_without_a_traceback(tmp_path, prompts, capsys):
    command = ["capture", str(tmp_path / "none"), "--prompts", str(prompts), "--out", "o"]
    assert cli.main(command) == 2
    assert "none cannot be loaded, expected the folder or the name" in capsys.readouterr().err
