"""Rewrites the tables of the data card, README.md, from the shipped files.

    python data/make_card.py

A test recomputes the tables and compares, so the card cannot drift from the files. To describe the
sets by another statistic, add a column to `statistics`.
"""

import json
import re
from pathlib import Path

import pandas as pd
import torch

import nvfp4lab as nv
from nvfp4lab import controls

HERE = Path(__file__).parent
SETS = ("smollm2", "v4-mini")
TABLE = re.compile(r"(?P<start><!-- (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def statistics(hidden: torch.Tensor) -> dict[str, str]:
    """The card's figures of one site, hidden [T, D], formatted."""
    x = hidden.double()
    channel_rms = x.square().mean(0).sqrt()
    block_amax = x.abs().unflatten(-1, (-1, 16)).amax(-1)
    amax_over_rms = (block_amax / x.square().mean(-1, keepdim=True).sqrt()).flatten()
    measured = nv.measure(hidden, "nvfp4")
    return {
        "sigma": f"{x.std():.4f}",
        "kurtosis": f"{((x - x.mean()) ** 4).mean() / x.var() ** 2:.1f}",
        "Student-t df": f"{controls.fit(hidden, 'student-t').args[0]:.1f}",
        "channel max/median": f"{channel_rms.max() / channel_rms.median():.1f}",
        "block amax / token rms, p50": f"{amax_over_rms.quantile(0.5):.2f}",
        "p99.9": f"{amax_over_rms.quantile(0.999):.1f}",
        "largest value's energy": f"{100 * x.square().max() / x.square().sum():.1f} %",
        **{
            f"scale {name}": f"{100 * getattr(measured, f'scale_{name}') / measured.blocks:.2f} %"
            for name in ("zero", "subnormal", "normal", "saturated", "nan")
        },
    }


def sites() -> str:
    """The statistics of every shipped site."""
    return as_markdown(
        [
            {"set": name, "layer": site.layer, "site": site.site, **statistics(site.hidden)}
            for name in SETS
            for site in nv.activations(name)
        ]
    )


def training() -> str:
    """How v4-mini's training went: the loss at some steps, and the load of its experts."""
    log = json.loads((HERE / "v4-mini" / "training.json").read_text())
    tokens_a_step = log["tokens_seen"] / log["step"]
    curve = dict(log["curve"])
    return as_markdown(
        [
            {
                "step": step,
                "tokens seen": f"{step * tokens_a_step / 1e6:.1f} M",
                "loss": f"{curve[step]:.3f}",
                "held-out loss": f"{held_out:.3f}",
            }
            for step, held_out in log["held_out"]
        ]
    )


def load() -> str:
    """Of each layer's experts on the held-out text: the share of the busiest, idlest and even."""
    log = json.loads((HERE / "v4-mini" / "training.json").read_text())
    hashed = log["plan"]["architecture"]["num_hash_layers"]
    return as_markdown(
        [
            {
                "layer": layer,
                "router": "hash" if int(layer) < hashed else "learned",
                "busiest expert": f"{100 * max(shares):.1f} %",
                "idlest expert": f"{100 * min(shares):.1f} %",
                "even share": f"{100 / len(shares):.1f} %",
            }
            for layer, shares in log["expert_load"].items()
        ]
    )


TABLES = {"statistics": sites, "training": training, "load": load}


def as_markdown(rows: list[dict]) -> str:
    frame = pd.DataFrame(rows).astype(str)
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(card: str) -> str:
    """The card with every table as the files have it."""
    return TABLE.sub(lambda m: m["start"] + TABLES[m["name"]]() + m["end"], card)


def main() -> None:
    card = HERE / "README.md"
    card.write_text(renewed(card.read_text()))


if __name__ == "__main__":
    main()
