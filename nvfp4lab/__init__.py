"""What it costs to stage MoE activations in NVFP4, and which way of doing it is right.

The public names are here and are imported on first use, so that `import nvfp4lab` is as quick as
`import torch` and needs neither a GPU nor Triton's driver. To publish a name, add it to `_HOME`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvfp4lab.catalogue import recipe as recipe
    from nvfp4lab.catalogue import recipes as recipes
    from nvfp4lab.codec import quantize as quantize
    from nvfp4lab.controls import control as control
    from nvfp4lab.diagnose import compare as compare
    from nvfp4lab.diagnose import explain_block as explain_block
    from nvfp4lab.diagnose import identify as identify
    from nvfp4lab.diagnose import probe as probe
    from nvfp4lab.errors import measure as measure
    from nvfp4lab.quantized import Quantized as Quantized
    from nvfp4lab.records import Activations as Activations
    from nvfp4lab.records import ExpertWeights as ExpertWeights
    from nvfp4lab.records import activations as activations
    from nvfp4lab.records import expert_weights as expert_weights
    from nvfp4lab.records import load_activations as load_activations
    from nvfp4lab.rules import Recipe as Recipe
    from nvfp4lab.staging import stage as stage
    from nvfp4lab.staging import stage_mega_moe_inputs as stage_mega_moe_inputs
    from nvfp4lab.statistics import Statistics as Statistics
    from nvfp4lab.sweeps import sweep as sweep
    from nvfp4lab.sweeps import sweep_statistics as sweep_statistics
    from nvfp4lab.theory import expected_error as expected_error
    from nvfp4lab.theory import predict as predict

__version__ = "0.1.0"

_HOME = {
    "Quantized": "quantized",
    "quantize": "codec",
    "control": "controls",
    "compare": "diagnose",
    "explain_block": "diagnose",
    "identify": "diagnose",
    "probe": "diagnose",
    "measure": "errors",
    "Activations": "records",
    "ExpertWeights": "records",
    "activations": "records",
    "expert_weights": "records",
    "load_activations": "records",
    "Recipe": "rules",
    "recipe": "catalogue",
    "recipes": "catalogue",
    "stage": "staging",
    "stage_mega_moe_inputs": "staging",
    "expected_error": "theory",
    "predict": "theory",
    "Statistics": "statistics",
    "sweep": "sweeps",
    "sweep_statistics": "sweeps",
}
_MODULES = (
    "benchmarks",
    "blocks",
    "capture",
    "catalogue",
    "codec",
    "controls",
    "diagnose",
    "errors",
    "experts",
    "formats",
    "layouts",
    "outer",
    "plots",
    "quantized",
    "records",
    "report",
    "rules",
    "staging",
    "statistics",
    "sweeps",
    "theory",
)

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"nvfp4lab.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"nvfp4lab.{name}")
    else:
        raise AttributeError(f"module 'nvfp4lab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
