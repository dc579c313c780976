"""vLLM's own staging kernels raced beside ours, on a CUDA GPU, as `nvfp4lab bench` races ours.

    unzip vllm-0.33.0-*.whl 'vllm/model_executor/layers/fused_moe/prepare_megamoe.py' \\
        'vllm/models/muse_spark/nvidia/ops/prepare_megamoe_nvfp4.py' -d FOLDER
    PYTHONPATH=. python tests/conformance/race.py FOLDER data/benchmarks/h100_vllm.json

The files are loaded alone, as by_source.py loads them; all kernels of a case work on the same
buffers in turns, and 32 rows of what each wrote, vLLM's too, are compared with `quantize`. To race
another peer, add it to `peers`.
"""

import functools
import sys
from pathlib import Path

import torch
from by_source import load_vllm_kernels

from nvfp4lab.benchmarks import Settings
from nvfp4lab.benchmarks.inputs import StagingSet
from nvfp4lab.benchmarks.running import run_steps
from nvfp4lab.benchmarks.staging import PART, Peer, race
from nvfp4lab.benchmarks.steps import for_every_case


def peers(folder: Path) -> dict[str, Peer]:
    """vLLM's two NVFP4 staging kernels by name."""
    megamoe, muse = load_vllm_kernels(folder)

    def stage_megamoe(s: StagingSet) -> None:
        megamoe.prepare_megamoe_nvfp4_inputs(
            s.hidden_states,
            s.topk_weights,
            s.topk_ids,
            s.x_fp4,
            s.x_sf,
            s.x_scales,
            s.topk_idx_out,
            s.topk_weights_out,
        )

    def stage_muse(s: StagingSet) -> None:
        muse.prepare_megamoe_nvfp4_inputs(
            s.hidden_states,
            s.topk_weights,
            s.topk_ids,
            s.x_fp4,
            s.x_sf.view(torch.uint8),
            s.topk_idx_out,
            s.topk_weights_out,
        )

    return {
        "vLLM's own vllm-megamoe": Peer("vllm-megamoe", stage_megamoe, has_outer=True),
        "vLLM's own vllm-muse": Peer("vllm-muse", stage_muse, has_outer=False),
    }


def main(folder: Path, out: Path) -> int:
    settings = Settings()
    one_case = functools.partial(race, peers=peers(folder))
    result = run_steps(for_every_case(PART, one_case, settings), settings, [PART])
    out.write_text(result.to_json(), encoding="utf-8")
    print(result.table())
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
