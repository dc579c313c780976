"""Writes a shipped set: its records, its expert weights, and its entry of manifest.json.

The makers of the sets end here, so that what a set consists of is decided once.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvfp4lab.records import (
    Activations,
    ExpertWeights,
    file_entry,
    save_activations,
    save_expert_weights,
)

HERE = Path(__file__).parent


def write_set(
    name: str,
    about: Mapping[str, Any],
    records: Sequence[Activations],
    weights: ExpertWeights,
    root: Path = HERE,
) -> None:
    """Replace the set `name` under `root`. Records and weights carry `about` as provenance."""
    (root / name).mkdir(exist_ok=True)
    files = []
    for record in records:
        path = root / name / f"{record.label}.safetensors"
        files.append(file_entry(path, save_activations(path, record), record, root))
    path = root / name / f"layer{weights.layer:02d}.experts.safetensors"
    entry = {
        "path": path.relative_to(root).as_posix(),
        "sha256": save_expert_weights(path, weights),
        "bytes": path.stat().st_size,
        "layer": weights.layer,
        "gate_up_proj": list(weights.gate_up_proj.shape),
        "down_proj": list(weights.down_proj.shape),
    }
    manifest = root / "manifest.json"
    sets = json.loads(manifest.read_text()) if manifest.exists() else {}
    sets[name] = dict(about) | {"files": files, "weights": entry}
    manifest.write_text(json.dumps(sets, indent=2) + "\n")
