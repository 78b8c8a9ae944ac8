"""Figures of rejection sampling: what is drawn are the metrics' numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page_reader import Page, check_self_contained
from small_run import HOSTILE, MakeRun, edit_json

from llama2_chat.report.page import write_report
from llama2_chat.report.run_record import read_run
from llama2_chat.report.sampling_figures import Panel, panels_of

SIZES = [1, 2, 4, 8, 10]
TEMPERATURES = [1.2, 0.6, 0.9]


def curve(start: float, step: float) -> list[dict[str, Any]]:
    means = [start + step * place for place in range(len(SIZES))]
    return [{"n": n, "mean": m, "low": m - 0.02, "high": m + 0.03} for n, m in zip(SIZES, means, strict=True)]


METRICS: dict[str, Any] = {
    "best_of": {"maximum": curve(0.5, 0.07), "median": curve(0.5, 0.001)},
    "temperature": {
        "chosen": 0.9,
        "k": 8,
        "prompts": 1234,
        "samples_per_prompt": 10,
        "temperatures": [
            {"temperature": t, "maximum": curve(0.4 + t / 10, 0.05), "median": curve(0.4, 0.0)}
            for t in TEMPERATURES
        ],
    },
    "kept_from": [
        {"iteration": 1, "policy": HOSTILE, "answers": 30, "combined_mean": 0.7},
        {"iteration": 2, "policy": "04-v1", "answers": 90, "combined_mean": 0.8},
    ],
}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    path = make_run()
    edit_json(path / "summary.json", lambda summary: summary["stages"]["v1"].update(METRICS))
    return path


@pytest.fixture
def drawn(run: Path) -> dict[str, Axes]:
    """The axes of each figure by its name."""
    stage = read_run(run).stage("v1")
    assert stage is not None
    return {panel.name: axes_of(panel) for panel in panels_of(stage)}


def axes_of(panel: Panel) -> Axes:
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    named = (line for line in axes.lines if not str(line.get_label()).startswith("_"))
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in named}  # type: ignore[arg-type]


def test_best_and_median_over_n_on_a_log_axis(drawn: dict[str, Axes]) -> None:
    axes = drawn["best_of"]
    assert axes.get_xscale() == "log"
    expected = {
        label: (SIZES, [row["mean"] for row in METRICS["best_of"][name]])
        for label, name in (("best of n", "maximum"), ("median of n", "median"))
    }
    assert lines(axes) == expected
    bands = [band.get_paths()[0].vertices for band in axes.collections]
    for vertices, name in zip(bands, ("maximum", "median"), strict=True):
        rows = METRICS["best_of"][name]
        assert vertices[:, 1].min() == pytest.approx(min(row["low"] for row in rows))  # type: ignore[index]
        assert vertices[:, 1].max() == pytest.approx(max(row["high"] for row in rows))  # type: ignore[index]


def test_best_over_temperatures_in_order_with_k_among_the_lines(drawn: dict[str, Axes]) -> None:
    found = lines(drawn["temperature"])
    assert list(found) == ["best of 1", "best of 2", "best of 8", "best of 10"]
    temperatures, means = found["best of 8"]
    assert temperatures == sorted(TEMPERATURES)
    assert means == pytest.approx([0.4 + t / 10 + 0.05 * 3 for t in sorted(TEMPERATURES)])
    (chosen,) = (line for line in drawn["temperature"].lines if line.get_linestyle() == ":")
    assert list(chosen.get_xdata()) == [0.9, 0.9]  # type: ignore[arg-type]


def test_sources_are_bars_with_their_share(drawn: dict[str, Axes]) -> None:
    axes = drawn["kept_from"]
    assert [patch.get_width() for patch in axes.patches] == [30, 90]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["30 (25 %)", "90 (75 %)"]


def test_on_the_page_and_as_files(run: Path) -> None:
    page = Page(write_report(run))
    check_self_contained(page)
    text = page.text("rejection-sampling")
    assert "1,234 held-out prompts; dotted: the chosen temperature, 0.9, by the best of 8." in text
    assert "At n = 10 the best is +0.276 above the median." in text
    names = ["v1-best_of.png", "v1-kept_from.png", "v1-temperature.png"]
    files = sorted((run / "figures").iterdir())
    assert [file.name for file in files] == names
    before = [file.read_bytes() for file in files]
    write_report(run)
    assert [file.read_bytes() for file in files] == before


def test_a_stage_with_one_sample_or_half_its_numbers(run: Path) -> None:
    stage = read_run(run).stage("v1")
    assert stage is not None
    single = {name: rows[:1] for name, rows in METRICS["best_of"].items()}
    (panel,) = panels_of(replace(stage, metrics={"best_of": single}))
    assert axes_of(panel).get_xscale() == "linear"
    for metrics in ({}, {"best_of": {}}, {"best_of": None}, {"temperature": {}}, {"kept_from": []}):
        assert list(panels_of(replace(stage, metrics=metrics))) == []
