"""What is kept over the turns in the report: the table of each Ghost Attention stage, its figures drawn once."""

from __future__ import annotations

import json
from typing import Any

from page_reader import Page
from small_run import MakeRun, edit_json, evaluation_of, interval

PERCENT = "\N{NO-BREAK SPACE}%"
STAGE = {"kind": "ghost_attention", "policy": "v1", "dialogues": ["talks"], "instructions": ["rules"]}


def with_ghost_attention(run: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Append a stage `gatt` that starts from `v1`, with what either keeps."""
    recipe = (run / "recipe.yaml").read_text()
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in STAGE.items())
    (run / "recipe.yaml").write_text(recipe.replace("evaluation:\n", f"  gatt:\n{lines}evaluation:\n"))

    def change(summary: dict[str, Any]) -> None:
        summary["stages"]["gatt"] = {"kind": "ghost_attention", "wall_seconds": 1.0}
        summary["evaluation"]["v1"] |= before
        summary["evaluation"]["gatt"] = evaluation_of(4) | after

    edit_json(run / "summary.json", change)


def page_of(run: Any, cli: Any) -> Page:
    ended = cli("report", run)
    assert ended.code == 0, ended.err
    return Page(run / "report.html")


def test_the_table_of_a_ghost_attention_stage(make_run: MakeRun, cli: Any) -> None:
    """Turns in the order of their numbers; the baseline is the policy that the stage started from."""
    run = make_run()
    before = {
        "attribute_recall": {"20": 0.03125, "2": 0.9875, "10": 0.25},
        "attribute_shown": {"1": 0.91, "2": 0.4},
    }
    after = {
        "attribute_recall": {"20": 0.96875, "2": 1.0, "10": 0.99},
        "attribute_shown": {"1": 0.92, "2": 0.93},
        "intervals": {"attribute_recall.20": interval(0.96875, 0.01)},
    }
    with_ghost_attention(run, before, after)
    page = page_of(run, cli)
    head = page.rows.index(["turn", "baseline (v1)", "+ GAtt (gatt)"])
    rows = page.rows[head + 1 : head + 4]
    assert [row[0] for row in rows] == ["2", "10", "20"]
    assert rows[2] == ["20", f"3.1{PERCENT}", f"96.9{PERCENT}95.9 to 97.9"]
    assert page.rows[head + 4] == ["turn", "baseline (v1)", "+ GAtt (gatt)"]
    assert page.rows[head + 5 : head + 7] == [
        ["1", f"91.0{PERCENT}", f"92.0{PERCENT}"],
        ["2", f"40.0{PERCENT}", f"93.0{PERCENT}"],
    ]
    text = page.text("policies")
    assert "gatt: attribute recall (layout of Table 30)" in text
    # One drawing over the turns, none for each turn; the figures stand in the table of all figures too.
    assert page.row("attribute shown 2")[-1] == f"93.0{PERCENT}"
    assert page.source.count('aria-label="language of the answers kept"') == 1
    assert 'aria-label="attribute shown 2' not in page.source


def test_without_the_policy_it_started_from_there_is_no_table(make_run: MakeRun, cli: Any) -> None:
    run = make_run()
    with_ghost_attention(run, {}, {})
    edit_json(run / "summary.json", lambda summary: summary["evaluation"].pop("v1"))
    page = page_of(run, cli)
    assert "Table 30" not in page.text("policies")
    assert 'aria-label="attribute recall"' in page.source
