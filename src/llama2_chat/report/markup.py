"""HTML by construction: every text is escaped unless it was made here.

Sampled text may hold anything, so nothing reaches a page as a plain string with tags in it.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_EMPTY_ELEMENTS = ("br", "hr", "meta")


class Html(str):
    """Text that is HTML already."""


def escaped(value: Any) -> Html:
    """`value` as HTML: itself if it is, else its text with everything special escaped.

    Control characters, which XML cannot hold, and lone surrogates are replaced.
    """
    if isinstance(value, Html):
        return value
    text = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Html(html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True))


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element; `class_` gives the attribute class, an attribute that is None is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY_ELEMENTS:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(parts: Iterable[Any], separator: str = "") -> Html:
    """Parts one after the other."""
    return Html(escaped(separator).join(escaped(part) for part in parts))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, texts: Collection[int] = (0,)) -> Html:
    """A table; columns other than `texts` hold numbers. It scrolls sideways where it is too wide."""

    def cells(tag: str, row: Sequence[Any]) -> Html:
        return element(
            "tr",
            *(
                element(tag, cell, class_=None if place in texts else "number")
                for place, cell in enumerate(row)
            ),
        )

    return element(
        "div",
        element(
            "table",
            element("thead", cells("th", head)),
            element("tbody", *(cells("td", row) for row in rows)),
        ),
        class_="scroll",
    )


def section(title: str, *children: Any, identifier: str) -> Html:
    """A section of the page; nothing if all it would hold is empty."""
    body = joined(children)
    if not body:
        return Html("")
    return element("section", element("h2", title), body, id=identifier)


def figure(drawing: Html, caption: Any = None) -> Html:
    """A drawing with its caption."""
    return element("figure", drawing, element("figcaption", caption) if caption else "")


def figures(drawn: Iterable[Html]) -> Html:
    """Figures beside one another, as many as there is room for."""
    body = joined(drawn)
    return element("div", body, class_="figures") if body else Html("")


def folded(title: str, *children: Any) -> Html:
    """Details that open on a click."""
    return element("details", element("summary", title), *children)


def page(title: str, *children: Any, style: str) -> str:
    """The whole document; it names no other file and holds no script."""
    head = element(
        "head",
        Html('<meta charset="utf-8"/>'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *children))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
