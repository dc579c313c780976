"""nvfp4lab.report and the command: what is judged safe, and the page that says so."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from sweep_runs import capture, save
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


def test_without_anything_to_lose_every_recipe_is_safe():
    all_three = swept(torch.zeros(4, 64), BASELINE, "nvfp4", "mxfp8-deepseek-v4")
    frame = report.verdicts(all_three)
    assert frame["verdict"].tolist() == ["safe", "safe"]
    assert report.table(frame).to_html().count(">exact</td>") == 2


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(0, 64), "no tokens"),
        (torch.full((4, 64), float("nan")), "every element is NaN or Inf"),
    ],
)
def test_a_site_without_a_finite_element_is_not_called_safe(x, why):
    nothing, something = swept(x, BASELINE, "nvfp4"), swept(GAUSSIAN, BASELINE, "nvfp4")
    assert report.not_judged(nothing) == {SITE: why}
    with pytest.raises(ValueError, match=f"a site to judge it at, got none: layer 3 .*{why}"):
        report.verdicts(nothing)
    other = {(4, *key[1:]): one for key, one in something.statistics.items()}
    both = replace(nothing, statistics={**nothing.statistics, **other}, planned={SITE: 4})
    assert report.verdicts(both)["layer"].tolist() == [4]


def test_a_site_counted_before_without_the_baseline_is_not_judged():
    both = swept(GAUSSIAN, BASELINE, "nvfp4")
    of_lost = {(9, SITE[1], "nvfp4"): both.statistics[(*SITE, "nvfp4")]}
    both = Swept({**both.statistics, **of_lost}, (), {SITE: 200, (9, SITE[1]): 200})
    assert list(report.not_judged(both)) == [(9, SITE[1])]
    assert report.verdicts(both)["layer"].tolist() == [SITE[0]]


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ((slice(None), slice(32, 48)), "nothing is left of 16 channels"),
        ((7, slice(None)), "nothing is left of 1 token"),
    ],
)
def test_what_is_flushed_whole_is_lossy_however_small_it_is(where, why):
    x = GAUSSIAN.clone()
    x[where] *= 2.0**-14  # below half of the smallest scale of nvfp4, not of nvfp4-token
    x = torch.cat([x, GAUSSIAN]).bfloat16()[: 200 if where[0] != 7 else 400]
    frame = report.verdicts(swept(x, BASELINE, "nvfp4", "vllm-megamoe")).set_index("recipe")
    assert frame["verdict"].to_dict() == {"nvfp4": "lossy", "vllm-megamoe": "safe"}
    assert frame.loc["nvfp4", "why"] == why


def test_one_lost_token_in_a_hundred_thousand_is_not_rounded_to_none():
    lost = tokens_at(-1, 0) * 500
    lost[41], lost[-1] = 99_999, 1
    row = judged(nonfinite_output=1, token_qsnr=lost)
    assert row["why"] == "NaN in 0.001% of the tokens"
    assert ">NaN in 0.001% of tokens</td>" in report.table(pd.DataFrame([row])).to_html()


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


def test_the_worst_of_the_safe_sites_is_the_one_that_falls_shortest():
    rows = JUDGED.assign(lost=0, recipe="nvfp4", verdict="safe", why="", short_db=[0.1, 0.5, 0, 0])
    assert report.summary(rows)["worst"].item() == "layer 0 a: 0.50 dB short of exact scales"
    assert report.summary(rows.assign(short_db=0.0))["worst"].item() == ""


def test_the_worst_site_is_not_a_safe_one_that_falls_shorter():
    rows = JUDGED.assign(lost=0, recipe="nvfp4", verdict="safe", why="")
    rows.loc[3, ["verdict", "why", "short_db"]] = "lossy", "gain 0.9", 0.1
    assert report.summary(rows)["worst"].item() == "layer 5 a: gain 0.9"


def test_the_table_says_in_words_what_it_colours():
    html = report.table(JUDGED).to_html()
    for text in ("NaN in 44.50% of tokens", "22.9 dB", "20.0 dB, lossy", "20.6 dB"):
        assert f">{text}</td>" in html
    assert html.count("background-color") == 3  # one rule a verdict


def test_no_decibels_have_a_minus_sign_of_zero():
    assert "-0.0 dB" not in report.table(JUDGED.assign(qsnr_db=-1e-9)).to_html()


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


HOSTILE = (  # each would do something, or be lost, if it were taken for code, markup or a format
    "<script src='https://example.org/a.js'></script>",
    "<img src=x onerror=alert(1)>",
    "</td></table></pre><!-- gone",
    "&lt;b&gt; &#x41; &amp;amp;",
    "[followed](https://example.org/) ![fetched](https://example.org/a.png)",
    "$\\frac{1}{2}$ $\\bad{$",
    "{{ 1234*5678 }} {% raw %} {# gone #}",
    "{0} {site!r} {undefined} %s %(site)s",
    '\'\'\' """ \' + str(1/0) + " + str(1/0) + " \\',
    "back\\slash \\n \\x41",
    "__import__('os').system('touch ran')",
    "!touch ran",
    "%run ran.py",
    "%%bash",
    "touch ran",
)
FOLDER = (
    'it\'s "{1234*5678}" \\\n!touch ran\n%%bash'  # a path, which becomes a parameter of the page
)


def hostile(folder: Path) -> None:
    """A record whose texts, and the name of whose file, are all of HOSTILE."""
    record, text = nv.activations("smollm2")[0].rows(0, 32), "\n".join(HOSTILE)
    about = {**record.provenance, "is": text, "model": text, text: text}
    records.save_activations(
        folder / "'+str(1÷0)+' {1234*5678} <b>\n!touch ran.safetensors",
        replace(record, site=text, provenance=about),
    )


class Shown(HTMLParser):
    """What a reader of a page sees, and what of it is more than text: links, handlers, comments."""

    WITHOUT_END = ("meta", "img")

    def __init__(self, page: str):
        super().__init__()
        self.text, self.active, self.open = "", set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.active |= {name for name, _ in attrs if name.startswith("on")}
        self.active |= {value for name, value in attrs if name == "href"}
        if tag not in self.WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.WITHOUT_END:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.active.add(data)


ODD = ("$x$", "_a", "", "a\"b'c<d>&", "two\nlines", "y" * 10**5, "y" * 200 + "n" + "y" * 199)
BAD = "layer09.a.safetensors"


@dataclass(frozen=True)
class Made:
    code: int
    page: Path
    text: str
    printed: str
    errors: str
    counted_twice: bool


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """One page, after a sweep, of a capture with nearly everything odd that a capture can have."""
    root = tmp_path_factory.mktemp("report")
    folder = capture(root / FOLDER)
    hostile(folder)
    for layer, site in enumerate(ODD, start=20):
        save(folder / f"layer{layer}.safetensors", GAUSSIAN.bfloat16(), layer, site)
    save(folder / "layer40.safetensors", torch.zeros(0, 16).bfloat16(), 40)
    save(folder / "layer41.safetensors", torch.zeros(5, 16).bfloat16(), 41)
    save(folder / BAD, GAUSSIAN.bfloat16(), 9).write_bytes(b"no record")
    printed, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(root),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        common = [FOLDER, "--recipes", "nvfp4", "seed", BASELINE, "--state", "kept", "--out"]
        cli.main(["sweep", *common, "o.csv"])
        before = {p.name: p.stat().st_mtime_ns for p in Path("kept").glob("*.npz")}
        code = cli.main(["report", *common, "o.html"])
        after = {p.name: p.stat().st_mtime_ns for p in Path("kept").glob("*.npz")}
    page = root / "o.html"
    text = page.read_text(encoding="utf-8")
    return Made(code, page, text, printed.getvalue(), errors.getvalue(), before != after)


def test_a_report_is_one_page_that_fetches_nothing_and_shows_its_figures(made):
    assert Fetched(made.text).addresses == [] and "script" not in Fetched(made.text).tags
    assert made.text.count('src="data:image/png;base64,') >= 4
    assert "recipe  safe  lossy  broken" in made.printed and "page  " in made.printed
    assert not list(made.page.parent.glob("*.partial"))


def test_a_report_goes_on_from_a_sweep_and_counts_nothing_twice(made):
    assert not made.counted_twice


def test_texts_of_a_capture_are_shown_on_the_page_as_they_are(made):
    shown = Shown(made.text).text
    assert not [text[:80] for text in (*HOSTILE, *ODD) if text not in shown]


def test_texts_of_a_capture_are_not_taken_for_markup(made):
    shown = Shown(made.text)
    assert not shown.open
    assert all(address.startswith("#") for address in shown.active), shown.active


def test_texts_of_a_capture_are_not_run(made):
    folders = (made.page.parent, report.notebook().parent)
    assert not [folder for folder in folders if (folder / "ran").exists()]
    assert str(1234 * 5678) not in Shown(made.text).text


def test_a_bad_shard_is_named_on_the_page_and_the_rest_judged(made):
    assert made.code == 1
    assert "NOT COUNTED" in made.text and f"{BAD}: " in made.text
    assert "not counted" in made.errors


def test_a_site_without_tokens_is_named_on_the_page_and_not_judged(made):
    assert "NOT JUDGED: layer 40 mlp_input: no tokens" in made.text
    assert ">exact</td>" in made.text and "nan dB" not in made.text and "inf dB" not in made.text


def pictures(folder: Path, *recipes: str) -> dict[str, Any]:
    """What the cells of the notebook leave, run here and not in a kernel; no picture is empty."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with matplotlib.rc_context(), pytest.MonkeyPatch.context() as patch:
        plt.switch_backend("Agg")
        drawn: list[bool] = []

        def show() -> None:
            axes = [ax for number in plt.get_fignums() for ax in plt.figure(number).axes]
            drawn.extend(bool(ax.lines or ax.collections or ax.texts) for ax in axes)
            plt.close("all")

        patch.setattr(plt, "show", show)
        for cell in nbformat.read(report.notebook(), as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                assert not plt.get_fignums()  # each is shown by the cell that draws it
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"CAPTURE": [str(folder)], "RECIPES": list(recipes)}
    assert all(drawn)
    return names


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 64), GAUSSIAN[:1], torch.full((4, 64), 5.0)],
    ids=["zeros", "one token", "a constant"],
)
def test_no_capture_makes_the_page_fail_or_a_picture_empty(tmp_path, x, capsys):
    save(tmp_path / "a.safetensors", x.bfloat16())
    pictures(tmp_path, "nvfp4", "mxfp8-deepseek-v4")
    assert ("No recipe makes an error" in capsys.readouterr().out) == (not x.any())


def test_pictures_show_ten_recipes_the_least_safe_and_say_so(tmp_path, capsys):
    save(tmp_path / "a.safetensors", GAUSSIAN.bfloat16() / 128)
    recipes = [name for name in nv.recipes() if name not in (BASELINE, *shards.SLOW_OR_RANDOM)]
    shown = pictures(tmp_path, *recipes)["DRAWN"]
    assert len(shown) == 10 and shown[0] == recipes[0] and "seed" in shown
    text = f"Pictures show 10 of the {len(recipes)} recipes: {recipes[0]}, and the least safe."
    assert text in capsys.readouterr().out


def test_pictures_tell_sites_apart_whatever_they_are_called(tmp_path):
    save(tmp_path / "a.safetensors", GAUSSIAN.bfloat16())
    drawn = pictures(tmp_path, "nvfp4")["drawn"]
    frame = drawn(pd.DataFrame({"site": ODD, "recipe": "nvfp4"}))
    assert frame["site"].nunique() == len(ODD)
    assert not frame["site"].str.startswith("_").any() and frame["site"].str.len().min() > 0


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
    assert "cannot be written: " in capsys.readouterr().err
    assert not Path("no").exists()


def test_a_page_that_fails_leaves_the_old_one_and_says_where(folder, monkeypatch, capsys):
    Path("o.html").write_text("old")
    notebook = nbformat.read(report.notebook(), as_version=4)
    notebook.cells = [*notebook.cells[:2], nbformat.v4.new_code_cell("1 / 0")]
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
def test_a_browser_without_a_network_requests_nothing_but_the_page(
    made, tmp_path, monkeypatch, width
):
    monkeypatch.chdir(tmp_path)
    page, log = made.page, tmp_path / "net.json"
    options = f"--headless=new --no-sandbox --disable-gpu --window-size={width},900".split()
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--screenshot=shot.png"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
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
