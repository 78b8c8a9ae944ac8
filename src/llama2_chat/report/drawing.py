"""Figures as small inline SVG (matplotlib draws, what HTML does not need is taken out), or as PNG files.

Text stays text (it can be searched and takes the page's font), and nothing depends on a display or on
global state of matplotlib.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama2_chat.files import atomic_path
from llama2_chat.report.markup import Html

INK, SOFT, LINE = "#1f2328", "#636c76", "#d9dee3"
COLOURS = ("#2563a8", "#c2571a", "#1a7f4b", "#8a4fa3", "#b8860b", "#3a8f9c", "#a33a56", "#5c6670")
"""Told apart by people with the usual kinds of colour blindness when neighbours are compared."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llama2-chat",  # the same figure gives the same bytes
    "path.simplify": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that sizes are the same on every machine
    "font.size": 9.5,
    "text.parse_math": False,  # names come from recipes
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
"""matplotlib's settings for every figure."""

_POINTS_PER_INCH = 72
_DOTS_PER_INCH = 160


class Drawing:
    """A figure of one pair of axes and, when its block has ended, its SVG."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure = figure
        self.axes = axes
        self.svg = Html("")


@contextmanager
def drawing(
    title: str, *, width: float = 400, height: float = 220, left: float = 44, bottom: float = 34
) -> Iterator[Drawing]:
    """Draw on the axes inside the block; sizes, and the room left of and below the axes, in CSS pixels.

    Room is given rather than found by matplotlib, which takes twice the time and lets neighbours differ.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH))
        axes = figure.add_axes(
            (left / width, bottom / height, (width - left - 12) / width, (height - bottom - 22) / height)
        )
        axes.set_title(title)
        made = Drawing(figure, axes)
        yield made
        stream = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=metadata)
    made.svg = Html(_trimmed(stream.getvalue(), title))


@contextmanager
def panels(file: Path, rows: int, columns: int, size: tuple[float, float], **grid: Any) -> Iterator[Any]:
    """A grid of axes (always two-dimensional), written to `file` when the block has ended."""
    with matplotlib.rc_context({**SETTINGS, "figure.facecolor": "white", "axes.facecolor": "white"}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **grid)
        with atomic_path(file) as temporary:
            # Without the version of matplotlib, so that the same figures give the same bytes.
            figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def _trimmed(svg: str, title: str) -> str:
    """Without prolog, namespaces, metadata, unused ids and needless digits; ids unique in the page."""
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}"
    svg = svg[svg.index("<svg") :]
    # The style sheet inside would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=").replace("font-family: 'DejaVu Sans'; ", "")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    label = html.escape(title)
    svg = re.sub(
        r"<svg\b[^>]*>", lambda _: f'<svg {view.group()} role="img" aria-label="{label}">', svg, count=1
    )
    # Inside tags only: the numbers that stand between them are labels.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{2,}", _one_decimal, tag.group()), svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m.group(1)}"' if m.group(1) in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for _ in range(3):  # groups that are left empty, and then their parents
        svg = re.sub(r"<(g|defs)>\s*</\1>|<g/>|<defs/>", "", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _one_decimal(match: re.Match[str]) -> str:
    return f"{float(match.group()):.1f}".removesuffix(".0")
