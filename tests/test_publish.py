"""nvfp4lab.publish: an executed notebook becomes a page that fetches nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat import v4
from tiny_notebooks import TEXT, example

from nvfp4lab import publish


def output(kind: str, text: str) -> nbformat.NotebookNode:
    """A notebook that already has one output."""
    cell = v4.new_code_cell("...", outputs=[v4.new_output("display_data", data={kind: text})])
    return v4.new_notebook(cells=[cell])


class Fetched(HTMLParser):
    """What a browser loads with a page: addresses in tags that load, and in styles."""

    LOADS = ("script", "link", "img", "iframe", "object", "embed", "source", "video", "audio")

    def __init__(self, page: str):
        super().__init__()
        self.addresses = re.findall(r"@import[^;]*;|url\((?!['\"]?data:)[^)]*\)", page)
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in self.LOADS:
            loads = [v for k, v in attrs if k in ("src", "href", "srcset", "data", "poster")]
            self.addresses += [v for v in loads if not (v or "").startswith("data:")]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return publish.to_html(example(tmp_path_factory.mktemp("with space")), contents="index.html")


def test_a_page_fetches_nothing(page):
    assert Fetched(page).addresses == []


def test_a_page_has_no_script(page):
    assert "script" not in Fetched(page).tags


def test_a_page_forbids_the_browser_to_fetch(page):
    policy = re.search(r'Content-Security-Policy"? content="([^"]*)"', page)
    policy = policy or re.search(r'content="([^"]*)" http-equiv="Content-Security-Policy"', page)
    assert policy is not None
    assert policy[1] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_page_has_the_figure_and_the_table(page):
    assert page.count('src="data:image/png;base64,') == 1
    assert ">21.250000</td>" in page


def test_a_page_is_titled_by_the_first_heading(page):
    assert "<title>The error of two layers</title>" in page


def test_links_to_notebooks_become_links_to_pages(page):
    links = set(re.findall(r'<a href="([^"#][^"]*)"', page))
    assert links == {
        "index.html",
        "02_rounding.html#ties",
        "03_scales.html",
        "https://example.org/notes.ipynb",
    }


def test_links_out_of_the_notebooks_lead_there_from_the_page(tmp_path):
    notebooks, out = tmp_path / "a checkout/notebooks", tmp_path / "pages"
    for file in (notebooks / "01_x.ipynb", notebooks.parent / "data/notes.md"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    text = "[a](../data/notes.md#end) [b](01_x.ipynb#ties) [c](gone.md) [d](https://example.org)"
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(text)])
    page = publish.to_html(notebook, folder=notebooks, out=out)
    links = re.findall(r'<a href="([^"#][^"]*)"', page)
    assert links == [
        "../a%20checkout/data/notes.md#end",
        "01_x.html#ties",
        "gone.md",
        "https://example.org",
    ]


def test_a_folded_cell_is_folded():
    cell = v4.new_code_cell("secret = 1", metadata={"jupyter": {"source_hidden": True}})
    page = publish.to_html(v4.new_notebook(cells=[cell, v4.new_code_cell("shown = 1")]))
    (folded,) = re.findall(r"<details>.*?</details>", page, re.DOTALL)
    assert "secret" in folded
    assert "shown" not in folded


def test_text_output_is_escaped():
    assert "&lt;script src=" in publish.to_html(output("text/plain", "<script src='a.js'>"))


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://example.org/a.js"></script>',
        '<img src="//example.org/a.png">',
        '<img src="figure.png">',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>b { background: url(https://example.org/a.png) }</style>",
        "<p style=\"background: url('http://example.org/a.png')\">",
        '<svg><image xlink:href="https://example.org/a.png"/></svg>',
    ],
)
def test_output_that_would_fetch_is_refused(markup):
    with pytest.raises(ValueError, match="must fetch nothing, but it names"):
        publish.to_html(output("text/html", markup))


def test_links_and_inline_pictures_are_not_fetched():
    markup = '<a href="https://example.org">x</a><img alt="" src="data:image/png;base64,AA==">'
    assert markup[:10] in publish.to_html(output("text/html", markup))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([TEXT], ("The error of two layers", "Layer 5 has the smaller error. It is 21.25 dB.")),
        (["Words first.\n\n## `x` & y\n\nThen *one*."], ("x & y", "Then one.")),
        (["# Alone"], ("Alone", "")),
        (["# A", "```\n# no heading\n```\n\nB."], ("A", "B.")),
        ([], ("Untitled notebook", "")),
    ],
)
def test_a_notebook_is_described_by_its_heading_and_first_sentences(cells, expected):
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(cell) for cell in cells])
    assert publish.describe(notebook) == expected


def test_the_contents_page_escapes_and_links():
    entries = [
        publish.Entry("01_x.html", "a < b", "First."),
        publish.Entry("02_y.failed.html", "c", "", problem="02_y.ipynb, cell 3: ValueError"),
        publish.Entry("03_z.html", "d", "", picture=b"png"),
    ]
    page = publish.contents_html("The study", entries)
    assert '<a href="01_x.html">a &lt; b</a>' in page
    assert "Did not run to its end: 02_y.ipynb, cell 3: ValueError" in page
    assert page.count('<img alt="" src="data:image/png;base64,cG5n">') == 1
    assert Fetched(page).addresses == []
