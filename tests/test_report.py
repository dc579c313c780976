"""nvfp4lab.report and the command: what is judged safe, and the page that says so."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from sweep_runs import capture
from test_publish import Fetched

import nvfp4lab as nv
from nvfp4lab import cli, records, report
from nvfp4lab.cli import shards
from nvfp4lab.report import BASELINE, Limits
from nvfp4lab.sweeps import Swept
from nvfp4lab.sweeps.state import Key

SITE = (3, "expert_input")
GAUSSIAN = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))


def swept(x: torch.Tensor, *recipes: str, **of_the_last) -> Swept:
    """Of one site; fields of the last recipe's statistics may be changed."""
    statistics: dict[Key, nv.Statistics] = {(*SITE, r): nv.measure(x, r) for r in recipes}
    last = (*SITE, recipes[-1])
    statistics[last] = replace(statistics[last], **of_the_last)
    return Swept(statistics, (), {SITE: len(x)})


def judged(**changes) -> dict[str, Any]:
    """The verdict on nvfp4 on a Gaussian, with fields of its statistics changed."""
    (row,) = report.verdicts(swept(GAUSSIAN, BASELINE, "nvfp4", **changes)).to_dict("records")
    return dict(row)


def tokens_at(db: int, count: int) -> np.ndarray:
    """A histogram of 200 tokens' QSNR, `count` of them at `db` and the others at 20 dB."""
    histogram = np.zeros(123, np.int64)
    histogram[21 + db], histogram[41] = count, 200 - count
    return histogram


def test_nvfp4_on_a_gaussian_is_safe():
    row = judged()
    assert (row["verdict"], row["why"], row["lost"]) == ("safe", "", 0)
    assert 0 < row["short_db"] < 0.3 and 18 <= row["token_qsnr_db"] <= 20


def test_one_lost_element_breaks_a_recipe():
    lost = tokens_at(-1, 0)
    lost[41], lost[-1] = 199, 1
    row = judged(nonfinite_output=1, token_qsnr=lost, scale_nan=2)
    assert row["verdict"] == "broken" and row["tokens_lost"] == 1 / 200
    assert row["why"] == "NaN in 0.50% of the tokens, by 0.25% NaN scales"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sum_ee": 300.0}, "dB short of exact scales"),
        ({"token_qsnr": tokens_at(10, 3)}, "the worst tokens"),
        ({"sum_xq": 1.1e4}, "gain 0.8"),
    ],
)
def test_beyond_a_limit_a_recipe_is_lossy(changes, why):
    row = judged(**changes)
    assert row["verdict"] == "lossy" and why in row["why"]


def test_too_few_bad_tokens_for_one_percent_are_not_the_worst():
    assert judged(token_qsnr=tokens_at(10, 1))["verdict"] == "safe"


def test_limits_are_a_choice():
    mx = swept(GAUSSIAN, BASELINE, "mxfp4-even")
    assert report.verdicts(mx)["verdict"].tolist() == ["lossy"]
    loose = Limits(short_db=9, token_short_db=9, gain=0.5)
    assert report.verdicts(mx, loose)["verdict"].tolist() == ["safe"]


def test_the_baseline_is_needed():
    with pytest.raises(ValueError, match=f"expected a sweep with {BASELINE}"):
        report.verdicts(swept(GAUSSIAN, "nvfp4"))


def test_a_site_without_the_baseline_is_not_judged_and_the_others_are():
    both = swept(GAUSSIAN, BASELINE, "nvfp4")
    alone = {(9, "expert_input", "nvfp4"): nv.measure(GAUSSIAN, "nvfp4")}
    frame = report.verdicts(replace(both, statistics={**both.statistics, **alone}))
    assert frame[["layer", "site"]].to_numpy().tolist() == [[*SITE]]


def test_a_shard_that_is_lost_after_it_was_counted_leaves_a_page_of_the_others(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, site in zip(paths, nv.activations("smollm2"), strict=False):
        records.save_activations(path, site.rows(0, 8))
    state, out = tmp_path / "state", tmp_path / "page.html"
    nv.sweep_statistics(paths, ["nvfp4"], state=state, progress=False)
    paths[1].write_bytes(b"no record")
    counted = report.write_report(paths, out, ["nvfp4"], state=state, progress=False)
    assert len(counted.failed) == 1 and len(report.verdicts(counted)) == 1
    assert "NOT COUNTED" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("x", [torch.zeros(4, 64), torch.zeros(0, 64)], ids=["zeros", "none"])
def test_without_anything_to_lose_every_recipe_is_safe(x):
    all_three = swept(x, BASELINE, "nvfp4", "mxfp8-deepseek-v4")
    assert report.verdicts(all_three)["verdict"].tolist() == ["safe", "safe"]


def test_nan_that_was_there_before_is_said():
    x = GAUSSIAN.clone()
    x[0, 0] = float("nan")
    frame = report.verdicts(swept(x, BASELINE, "nvfp4"))
    assert str(frame["why"].item()).endswith("(1 elements were NaN or Inf before)")


JUDGED = pd.DataFrame(
    [
        (0, "a", "seed", "broken", "NaN", 22.0, 1.4, 9, 0.445),
        (0, "a", "nvfp4", "safe", "", 22.9, 0.5, 0, 0.0),
        (5, "a", "seed", "safe", "", 20.6, 0.2, 0, 0.0),
        (5, "a", "nvfp4", "lossy", "1.2 dB short", 20.0, 1.2, 0, 0.0),
    ],
    columns=[
        "layer",
        "site",
        "recipe",
        "verdict",
        "why",
        "qsnr_db",
        "short_db",
        "lost",
        "tokens_lost",
    ],
)


def test_the_summary_counts_sites_and_names_the_worst_safest_recipe_first():
    frame = report.summary(JUDGED)
    assert frame.to_dict("records") == [
        {"recipe": "nvfp4", "safe": 1, "lossy": 1, "broken": 0, "worst": "layer 5 a: 1.2 dB short"},
        {"recipe": "seed", "safe": 1, "lossy": 0, "broken": 1, "worst": "layer 0 a: NaN"},
    ]


def test_the_worst_site_is_one_of_the_worst_verdict_whatever_its_qsnr():
    by_gain = JUDGED[JUDGED["recipe"] == "nvfp4"].assign(
        verdict=["safe", "lossy"], why=["", "gain 0.970"], short_db=[0.9, 0.5], lost=0
    )
    assert report.summary(by_gain)["worst"].item() == "layer 5 a: gain 0.970"


def test_the_table_says_in_words_what_it_colours():
    html = report.table(JUDGED).to_html()
    for text in ("NaN in 44.50% of tokens", "22.9 dB", "20.0 dB, lossy", "20.6 dB"):
        assert f">{text}</td>" in html
    assert html.count("background-color") == 3  # one rule a verdict


def test_the_table_shows_markup_as_text():
    html = report.table(JUDGED.assign(site="<script>alert(1)</script>")).to_html()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_a_channel_names_the_loudest_of_its_block():
    x = torch.full((8, 32), 1.0)
    x[:, 5], x[:, 20] = 100.0, 10.0
    frame = report.channels(swept(x, "nvfp4"), "nvfp4").set_index("channel")
    assert frame.loc[range(16), "loudest"].eq(5).all()
    assert frame.loc[range(16, 32), "loudest"].eq(20).all()
    assert frame.loc[0, "under_loudest_db"] == pytest.approx(40)
    assert frame.loc[[5, 20], "under_loudest_db"].eq(0).all()
    assert sum(frame["xx_share"]) == pytest.approx(1)
    assert frame["share"].is_monotonic_decreasing


# the page


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return capture(tmp_path / "capture")


def hostile(folder: Path) -> None:
    """A record whose every text would do something if it were taken for code or markup."""
    site = nv.activations("smollm2")[0].rows(0, 32)
    evil = "<script src='https://example.org/a.js'></script> $\\bad{$ '''\n\"+1/0+\""
    about = {**site.provenance, "is": evil}
    records.save_activations(
        folder / "'+str(1÷0)+'.safetensors",
        replace(site, site="<img src=x onerror=alert(1)> $\\nonsense{$", provenance=about),
    )


def test_a_report_is_one_page_that_fetches_nothing_and_shows_its_figures(folder, capsys):
    arguments = ["report", "capture", "--recipes", "nvfp4", "seed", "--out", "o.html"]
    assert cli.main(arguments) == 0
    page = Path("o.html").read_text(encoding="utf-8")
    assert Fetched(page).addresses == [] and "script" not in Fetched(page).tags
    assert page.count('src="data:image/png;base64,') >= 4
    printed = capsys.readouterr().out
    assert "recipe  safe  lossy  broken" in printed and "page  " in printed
    assert not list(Path.cwd().glob("*.partial"))


def test_a_report_goes_on_from_a_sweep_and_counts_nothing_twice(folder, monkeypatch):
    state = ["--state", "kept"]
    recipes = ["--recipes", "nvfp4", "seed", BASELINE]
    assert cli.main(["sweep", "capture", *recipes, "--out", "o.csv", *state]) == 0
    before = {p.name: p.stat().st_mtime_ns for p in Path("kept").glob("*.npz")}
    assert cli.main(["report", "capture", *recipes, "--out", "o.html", *state]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in Path("kept").glob("*.npz")} == before


def test_texts_of_a_capture_are_shown_and_neither_run_nor_taken_for_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's").mkdir()
    hostile(tmp_path / "it's")
    assert cli.main(["report", "it's", "--recipes", "nvfp4", "seed", "--out", "o.html"]) == 0
    page = Path("o.html").read_text(encoding="utf-8")
    assert Fetched(page).addresses == [] and "script" not in Fetched(page).tags
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_a_bad_shard_is_named_on_the_page_and_the_rest_judged(folder, capsys):
    shard = max(Path("capture").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert cli.main(["report", "capture", "--recipes", "nvfp4", "--out", "o.html"]) == 1
    page = Path("o.html").read_text(encoding="utf-8")
    assert "NOT COUNTED" in page and f"{shard.name}: " in page
    assert "not counted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capture", "--recipes", "nvfp5"], "unknown recipe 'nvfp5'; did you mean nvfp4"),
        (["nowhere"], "no activations at "),
        (["capture", "--recipes", BASELINE], "expected a recipe to judge beside"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_anything_is_written(
    folder, arguments, message, capsys
):
    assert cli.main(["report", *arguments, "--out", "o.html"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("o.html").exists()


def test_a_page_that_cannot_be_written_is_refused_first(folder, capsys):
    assert cli.main(["report", "capture", "--out", "no/o.html"]) == 2
    assert "--out is a file in a folder that is there" in capsys.readouterr().err
    assert not Path("no").exists()


def test_a_page_that_fails_leaves_the_old_one_and_says_where(folder, monkeypatch, capsys):
    Path("o.html").write_text("old")
    notebook = nbformat.read(report.notebook(), as_version=4)
    notebook.cells[-1].source = "1 / 0"
    nbformat.write(notebook, "broken.ipynb")
    monkeypatch.setattr(report, "notebook", lambda: Path("broken.ipynb"))
    assert cli.main(["report", "capture", "--recipes", "nvfp4", "--out", "o.html"]) == 1
    assert "the page could not be made: broken.ipynb, cell" in capsys.readouterr().err
    assert Path("o.html").read_text() == "old"


def test_the_notebook_has_the_commands_own_recipes_and_limits():
    cell = nbformat.read(report.notebook(), as_version=4).cells[1]
    names: dict = {}
    lines = cell.source.splitlines()
    exec("\n".join(line for line in lines if line.startswith(("RECIPES", "SHORT_DB"))), names)
    assert tuple(names["RECIPES"]) == shards.DEFAULT
    assert Limits(names["SHORT_DB"], names["TOKEN_SHORT_DB"], names["GAIN"]) == Limits()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_without_a_network_requests_nothing_but_the_page(folder, width):
    assert cli.main(["report", "capture", "--recipes", "nvfp4", "seed", "--out", "o.html"]) == 0
    page, log = Path("o.html").absolute(), Path("net.json").absolute()
    options = f"--headless=new --no-sandbox --disable-gpu --window-size={width},900".split()
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--screenshot=shot.png"]
    options += [f"--user-data-dir={page.parent / 'profile'}", f"--log-net-log={log}"]
    browser = ["chromium", *options, page.as_uri()]
    subprocess.run(browser, check=True, capture_output=True, timeout=120)
    assert Path("shot.png").stat().st_size > 10_000
    assert requested(log.read_text()) <= {page.as_uri()}


def requested(log: str) -> set[str]:
    """The addresses in a network log of Chromium, less what it asks of its makers by itself."""
    urls = set(re.findall(r'"url":"([^"]*)"', log))
    own = ("google.com", "googleapis.com", "gvt1.com")
    return {
        url
        for url in urls
        if urlsplit(url).scheme in ("http", "https", "file", "ws", "wss")
        and not (urlsplit(url).hostname or "").endswith(own)
    }
