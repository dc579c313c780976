"""Executed notebooks turned into pages: `to_html`, `contents_html`.

Used by `nvfp4lab study`; knows nothing of formats, recipes or plots. A page is one file that loads
nothing: styles and pictures are inside, there is no script, and its Content-Security-Policy tells
the browser to fetch nothing. The look is in templates/study/. nbconvert's own templates load
require.js, MathJax and mermaid from other hosts, so none is used; write formulas in Unicode. May be
changed: what kinds of outputs are shown (_SHOWN), as long as a page fetches nothing.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

_TEMPLATES = Path(__file__).resolve().parent / "templates"
# Richest first. No widgets, no JavaScript and no LaTeX: a page without scripts cannot show them.
_SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def to_html(
    notebook: NotebookNode,
    *,
    folder: str | Path = ".",
    out: str | Path | None = None,
    contents: str | None = None,
) -> str:
    """The notebook as one HTML page that fetches nothing; its title is the first heading.

    folder: where the pictures that its Markdown names are read from; they go into the page.
    out: the folder that the page is for; links to other files of the checkout lead there from it.
    contents: relative address of the page that lists all, linked at top and bottom.

    Raises ValueError if an output would still fetch something: a script, a picture on another host.
    """
    exporter = HTMLExporter(
        template_name="study",
        extra_template_basedirs=[str(_TEMPLATES)],
        embed_images=True,
        anchor_link_text="#",
    )
    exporter.display_data_priority = _SHOWN  # pyright: ignore[reportAttributeAccessIssue]
    title, summary = describe(notebook)
    resources = {
        "metadata": {"name": title, "path": str(folder)},
        "study": {"title": title, "summary": summary, "contents": contents},
    }
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    if out is not None:
        page = _links_from(page, Path(folder), Path(out))
    # Notebooks link to each other as files; their pages lie side by side under the same names.
    page = re.sub(r'(<a [^>]*href="(?![a-z]+:)[^"#]+)\.ipynb(?=["#])', r"\1.html", page)
    if fetched := _fetches(page):
        raise ValueError(
            f"the page '{title}' must fetch nothing, but it names {', '.join(fetched[:5])}: "
            "put the data into the page, or take the output away"
        )
    return page


def _links_from(page: str, folder: Path, out: Path) -> str:
    """Links that are relative to `folder` and name a file there, relative to `out`; a notebook's
    page lies beside this one."""

    def moved(match: re.Match[str]) -> str:
        target = folder / unquote(unescape(match[2]))
        if target.suffix == ".ipynb" or not target.is_file():
            return match[0]
        return match[1] + quote(Path(os.path.relpath(target.resolve(), out.resolve())).as_posix())

    return re.sub(r'(<a [^>]*href=")(?![a-z]+:)([^"#]+)', moved, page)


@dataclass(frozen=True)
class Entry:
    """A notebook on the contents page. problem: None for one that ran to its end; picture: a PNG
    to know it by."""

    href: str
    title: str
    summary: str
    problem: str | None = None
    picture: bytes | None = None

    @property
    def picture_address(self) -> str:
        """The picture as an address that holds all of it."""
        assert self.picture is not None
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"


def contents_html(title: str, entries: Iterable[Entry]) -> str:
    """The page that lists the notebooks, one entry each."""
    templates = Environment(loader=FileSystemLoader(_TEMPLATES / "study"), autoescape=True)
    page = templates.get_template("contents.html.j2")
    return page.render(title=title, entries=list(entries))


def describe(notebook: NotebookNode) -> tuple[str, str]:
    """(title, summary) as plain text: the first heading, and up to two sentences that follow it."""
    source = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    page = markdown2html(source)
    heading = re.search(r"<h[1-6][^>]*>(.*?)<a class=\"anchor-link\"", page, re.DOTALL)
    paragraph = re.search(r"<p>(.*?)</p>", page[heading.end() :] if heading else page, re.DOTALL)
    title = _plain(heading[1]) if heading else "Untitled notebook"
    sentences = re.split(r"(?<=[.!?])\s+", _plain(paragraph[1])) if paragraph else []
    return title, " ".join(sentences[:2])


def _plain(markup: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", "", markup)).split())


def _fetches(page: str) -> list[str]:
    """The addresses that a browser would fetch to show the page; not the links to follow."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                followed = name == "href" and tag in ("a", "area")
                if (
                    name in ("src", "srcset", "href", "xlink:href", "poster", "data")
                    and not followed
                ):
                    found.append(value or "")
                elif name == "style":
                    self.handle_style(value or "")
            self.in_style = tag == "style"

        def handle_data(self, data: str) -> None:
            if getattr(self, "in_style", False):
                self.handle_style(data)

        def handle_style(self, text: str) -> None:
            found.extend(re.findall(r"url\(\s*['\"]?([^'\")]+)", text))
            found.extend(re.findall(r"@import\s+['\"]([^'\"]+)", text))

    Reader().feed(page)
    return [address for address in found if not address.startswith(("data:", "#"))]
