"""Two runs compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page, check_self_contained
from small_run import MakeRun, edit_json

from llama2_chat.report.measures import Estimate, difference

PERCENT = "\N{NO-BREAK SPACE}%"


def compared(a: Path, b: Path, cli: Any, *options: Any) -> Page:
    ended = cli("report", a, b, *options)
    assert ended.code == 0, ended.err  # matplotlib may say that it makes its font cache
    return Page(Path(ended.out.strip()))


def test_comparison(make_run: MakeRun, cli: Any) -> None:
    a, b = make_run("first"), make_run("second", seed=4)

    def better(summary: Any) -> None:
        ours = summary["evaluation"]["v1"]
        ours["violation_rate"] -= 0.1
        for key in ("mean", "low", "high"):
            ours["intervals"]["violation_rate"][key] -= 0.1
        del summary["evaluation"]["base"]
        summary["stages"]["sft"]["loss_last"] = 0.25

    edit_json(b / "summary.json", better)
    page = compared(a, b, cli)
    assert (a / "report-vs-second.html").is_file()
    check_self_contained(page)
    assert page.row("seed") == ["seed", "0", "4"]
    assert "Only A has: base." in page.text("policies")
    rows = [row for row in page.rows if row[:1] == ["violations"]]
    # sft, v1, ppo; v1: 19.1 % ± 2 against 9.1 % ± 2, so the difference is −10 ± 2√2.
    assert rows[1] == [
        "violations",
        f"19.1{PERCENT}17.1 to 21.1",
        f"9.1{PERCENT}7.1 to 11.1",
        f"−10.0{PERCENT}−12.8 to −7.2",
    ]
    assert page.source.count('class="better"') == 1
    assert 'class="worse"' not in page.sections["policies"]
    assert page.row("loss last")[1:] == ["0.361", "0.250", "−0.111"]
    assert "Policy: ppo." in page.text("samples")
    assert page.row("v1")[1:] == ["6 min 40 s", "6 min 40 s", "1.00"]


def test_output_can_be_named(make_run: MakeRun, tmp_path: Path, cli: Any) -> None:
    a, b = make_run("first"), make_run("second")
    page = compared(a, b, cli, "--output", tmp_path / "out" / "c.html")
    assert (tmp_path / "out" / "c.html").is_file()
    assert "None: recipes and environments are the same." in page.text("settings")


def test_runs_with_nothing_in_common(make_run: MakeRun, cli: Any) -> None:
    a, b = make_run("first"), make_run("second")
    edit_json(b / "summary.json", lambda summary: summary.update(evaluation={}, stages={}))
    for file in b.glob("stages/*/metrics.jsonl"):
        file.unlink()
    page = compared(a, b, cli)
    assert "B" in page.text("")
    assert "samples" not in page.sections


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first", "first"], "the same folder"),
        (["first", "gone"], "gone: no such run directory"),
        (["first", "--output", "x.html"], "--output goes with two runs"),
        (["first", "second", "--output", "first"], "is a folder; name a file"),
        (["first", "second", "--output", "first/recipe.yaml/x.html"], "cannot be written"),
    ],
)
def test_wrong_arguments(
    make_run: MakeRun, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    make_run("first")
    make_run("second")
    monkeypatch.chdir(tmp_path)
    ended = cli("report", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.both


def test_difference_of_two_shares() -> None:
    """Newcombe 1998, Table II: 56/70 − 48/80 by method 10 is 0.2000, 0.0524 to 0.3339."""

    def wilson(successes: int, count: int) -> Estimate:
        z, p = 1.959964, successes / count
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        return Estimate(p, middle - half, middle + half)

    change = difference(wilson(48, 80), wilson(56, 70))
    assert change.value == pytest.approx(0.2, abs=1e-9)
    assert (change.low, change.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_difference_without_intervals() -> None:
    assert difference(Estimate(1.0), Estimate(3.0, 2.5, 3.5)) == Estimate(2.0)
