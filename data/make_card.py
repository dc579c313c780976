"""Rewrites the statistics table of the data card, README.md, from the shipped activations.

    python data/make_card.py

A test recomputes the table and compares, so the card cannot drift from the files. To describe the
sets by another statistic, add a column to `statistics`.
"""

import re
from pathlib import Path

import pandas as pd
import torch

import nvfp4lab as nv
from nvfp4lab.errors import scale_classes

HERE = Path(__file__).parent
SETS = ("smollm2",)
TABLE = re.compile(r"(?<=<!-- statistics -->\n).*?(?=<!-- end -->)", re.DOTALL)


def statistics(hidden: torch.Tensor) -> dict[str, str]:
    """The card's figures of one site, hidden [T, D], formatted."""
    x = hidden.double()
    channel_rms = x.square().mean(0).sqrt()
    block_amax = x.abs().unflatten(-1, (-1, 16)).amax(-1)
    amax_over_rms = (block_amax / x.square().mean(-1, keepdim=True).sqrt()).flatten()
    q = nv.quantize(hidden, "nvfp4")
    shares = {name: count / q.scales.numel() for name, count in scale_classes(q).items()}
    return {
        "sigma": f"{x.std():.4f}",
        "kurtosis": f"{((x - x.mean()) ** 4).mean() / x.var() ** 2:.1f}",
        "channel max/median": f"{channel_rms.max() / channel_rms.median():.1f}",
        "block amax / token rms, p99.9": f"{amax_over_rms.quantile(0.999):.1f}",
        "largest value's energy": f"{100 * x.square().max() / x.square().sum():.1f} %",
        **{
            f"scale {name}": f"{100 * shares[name]:.2f} %"
            for name in ("zero", "subnormal", "normal", "saturated")
        },
    }


def table() -> str:
    """The whole table as Markdown."""
    rows = [
        {"set": name, "layer": site.layer, "site": site.site, **statistics(site.hidden)}
        for name in SETS
        for site in nv.activations(name)
    ]
    frame = pd.DataFrame(rows).astype(str)
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    card = HERE / "README.md"
    card.write_text(TABLE.sub(lambda _: table(), card.read_text()))


if __name__ == "__main__":
    main()
