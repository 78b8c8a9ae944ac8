"""A page as a reader sees it: its text by section, its tables, and what is wrong with its HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

EMPTY_ELEMENTS = {"meta", "br", "hr"}


class Page(HTMLParser):
    """Parses strictly: every element is closed, in order."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = file.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.sections: dict[str, str] = {"": ""}
        self.rows: list[list[str]] = []
        self._section = ""
        self.feed(self.source)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), f"an attribute of {tag} stands twice"
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "section":
            self._section = values["id"]
            self.sections[self._section] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.sections[self._section] += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def text(self, section: str) -> str:
        """A section's text with single spaces."""
        return re.sub(r"\s+", " ", self.sections[section])

    def row(self, first: str) -> list[str]:
        """The first table row that begins with `first`."""
        return next(row for row in self.rows if row and row[0] == first)


def check_self_contained(page: Page) -> None:
    """No script, nothing that is loaded from anywhere, no handler of an event."""
    tags = {tag for tag, _, _ in page.attributes} | set(re.findall(r"<([a-zA-Z][\w-]*)", page.source))
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "base", "form"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "data", "srcset"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", page.source)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert used <= set(page.ids)
