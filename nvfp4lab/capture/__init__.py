"""Capture: what enters the experts of a running model, written as activation records.

`huggingface` is a context manager around a transformers model; `vllm_worker` and `sglang_wrapper`
are for the two servers (untested on the engines). All of them say `begin`, `take`, `end` to a
Recorder, which owns the sampling and budgets; folder.py owns the files. An engine is added as one
module that calls a Recorder. Nothing here knows of recipes.
"""

from nvfp4lab.capture.folder import seal as seal
from nvfp4lab.capture.huggingface_hooks import huggingface as huggingface
from nvfp4lab.capture.recorder import Recorder as Recorder

__all__ = ["Recorder", "huggingface", "seal"]
