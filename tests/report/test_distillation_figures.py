"""Context distillation in the report: what is drawn are the samples' scores, what is written the metrics' numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page_reader import Page, check_self_contained
from small_run import HOSTILE, MakeRun, edit_json, evaluation_of, write_lines

from llama2_chat.report.distillation_figures import Panel, columns_of, panels_of
from llama2_chat.report.page import write_report
from llama2_chat.report.run_record import StageRecord, read_run


def sample(number: int, original: float, distilled: float, generic: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": f"dangerous question {number}"}],
        "preprompt": f"You are careful {number}.",
        "response": f"careful answer {number} {HOSTILE}",
        "original_response": f"rash answer {number}",
        "scores": {"safety": distilled, "original_safety": original},
        "status": "complete",
        "original_status": "cut_off",
        "kept": distilled > original,
    }
    if generic is not None:
        row["scores"]["generic_safety"] = generic
    return row


SAMPLES = [
    sample(0, -3.0, 2.0, -1.0),
    sample(1, 1.0, 0.5),
    sample(2, -2.0, 4.0, 1.0),
    sample(3, 3.0, 3.5, 2.0),
    sample(4, 2.0, 1.0),
]


def summary(prompts: int, kept: int, scores: tuple[float, float, float], unsafe: float) -> dict[str, Any]:
    names = ("original", "preprompted", "selected")
    return {
        **{"prompts": prompts, "kept": kept, "share": kept / prompts},
        **{f"safety_{name}": score for name, score in zip(names, scores, strict=True)},
        **{f"unsafe_{name}": unsafe for name in names},
    }


METRICS = {
    "selection": {
        **summary(5, 3, (0.2, 2.2, 2.5), 0.4),
        "by_category": {
            "illicit": summary(3, 2, (-0.1, 1.5, 1.7), 0.3333),
            "not named": summary(2, 1, (0.77, 3.1, 3.3), 0.125),
        },
    }
}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run whose last stage distils PPO's policy."""
    path = make_run()
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    recipe["stages"]["distilled"] = {"kind": "context_distillation", "policy": "ppo", "safety": "safety_rm"}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    record = {"kind": "context_distillation", "wall_seconds": 9.0, **METRICS}
    edit_json(path / "summary.json", lambda summary: summary["stages"].update(distilled=record))
    edit_json(path / "summary.json", lambda summary: summary["evaluation"].update(distilled=evaluation_of(4)))
    write_lines(path / "stages" / "06-distilled" / "samples.jsonl", SAMPLES)
    return path


@pytest.fixture
def stage(run: Path) -> StageRecord:
    found = read_run(run).stage("distilled")
    assert found is not None
    return found


def axes_of(panel: Panel) -> Axes:
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def drawn(stage: StageRecord) -> dict[str, Axes]:
    return {panel.name: axes_of(panel) for panel in panels_of(stage)}


def test_kept_and_left_out_are_told_apart_in_the_scatter(stage: StageRecord) -> None:
    axes = drawn(stage)["before_and_after"]
    points = {str(group.get_label()): group.get_offsets().tolist() for group in axes.collections}  # type: ignore[union-attr]
    assert points == {
        "left out": [[1.0, 0.5], [2.0, 1.0]],
        "kept": [[-3.0, 2.0], [-2.0, 4.0], [3.0, 3.5]],
    }
    (line,) = axes.lines
    assert list(line.get_xdata()) == list(line.get_ydata()) == [-3.0, 4.0]  # type: ignore[arg-type]


def test_the_distribution_is_of_the_prompts_answered_in_all_ways(stage: StageRecord) -> None:
    axes = drawn(stage)["preprompts"]
    means = {"without preprompt": -2 / 3, "generic preprompt": 2 / 3, "with answer template": 9.5 / 3}
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(list(means.values()))  # type: ignore[index]
    assert [patch.get_label() for patch in axes.patches] == list(means)
    for patch in axes.patches:  # a third of the prompts for each score
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        assert sum(values) == pytest.approx(100)
        assert (edges[0], edges[-1]) == pytest.approx((-3.0, 4.0))
        assert sorted(values[values > 0]) == pytest.approx([100 / 3] * 3)


def test_without_a_comparison_there_is_one_preprompt(stage: StageRecord) -> None:
    rows = [SAMPLES[1], SAMPLES[4]]
    assert columns_of(rows, compared=False) == {"without preprompt": [1.0, 2.0], "with preprompt": [0.5, 1.0]}
    (_, panel, _) = panels_of(replace(stage, samples=rows))
    assert [patch.get_label() for patch in axes_of(panel).patches] == ["without preprompt", "with preprompt"]


def test_shares_kept_by_category(stage: StageRecord) -> None:
    axes = drawn(stage)["kept"]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([200 / 3, 50])  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["67 % (2 of 3)", "50 % (1 of 2)"]


def test_many_points_are_thinned_evenly_and_that_is_said(stage: StageRecord) -> None:
    rows = [sample(n, float(n), n + 1.0) for n in range(2000)]
    panel = next(panels_of(replace(stage, samples=rows)))
    assert "800 of 2,000 prompts are drawn." in panel.caption
    (group,) = axes_of(panel).collections
    xs = [x for x, _ in group.get_offsets().tolist()]  # type: ignore[union-attr]
    assert len(xs) == 800
    assert (xs[0], xs[-1]) == (1.0, 1998.0)
    assert {b - a for a, b in pairwise(xs)} == {2.0, 3.0}


def test_on_the_page_and_as_files(run: Path) -> None:
    page = Page(write_report(run))
    check_self_contained(page)
    text = page.text("context-distillation")
    assert "3 of 5 answers are kept; on the line nothing changes." in text
    assert page.row("all prompts") == ["all prompts", "5", "60.0\xa0%", *_cells((0.2, 2.2, 2.5), "40.0\xa0%")]
    assert page.row("not named")[:3] == ["not named", "2", "50.0\xa0%"]
    assert page.row("not named")[3].startswith("0.770")
    # PPO is the fourth policy of the small run, the distilled one the fifth: nine points fewer violations.
    row = next(row for row in page.rows if row[0] == "violations" and len(row) == 4)
    assert (row[1][:4], row[2][:4], row[3][:4]) == ("10.1", "1.1\xa0", "−9.0")
    for shown in ("without preprompt: −2.00", "with preprompt: 4.00", "rash answer 0", "You are careful 4."):
        assert shown in text
    assert text.index("careful answer 2") < text.index("careful answer 0") < text.index("careful answer 3")
    assert text.index("Left out") < text.index("careful answer 1")
    names = [f"distilled-{name}.png" for name in ("before_and_after", "kept", "preprompts")]
    files = sorted((run / "figures").iterdir())
    assert [file.name for file in files] == names
    before = [file.read_bytes() for file in files]
    write_report(run)
    assert [file.read_bytes() for file in files] == before


def _cells(scores: tuple[float, ...], unsafe: str) -> list[str]:
    return [f"{score:.3f}{unsafe} unsafe" if score < 1 else f"{score:.2f}{unsafe} unsafe" for score in scores]


def test_an_unfinished_stage_or_other_rows_do_no_harm(run: Path, stage: StageRecord) -> None:
    assert [panel.name for panel in panels_of(replace(stage, metrics={}))] == [
        "before_and_after",
        "preprompts",
    ]
    odd: list[dict[str, Any]] = [
        {},
        {"scores": None},
        {"scores": {"safety": 1.0, "original_safety": None}, "kept": True},
    ]
    assert list(panels_of(replace(stage, samples=odd, metrics={"selection": {"by_category": [1]}}))) == []
    assert list(panels_of(replace(stage, kind="ppo"))) == []
    edit_json(run / "summary.json", lambda summary: summary["stages"].pop("distilled"))
    edit_json(run / "summary.json", lambda summary: summary["evaluation"].pop("distilled"))
    (run / "stages" / "06-distilled" / "samples.jsonl").write_text(json.dumps(SAMPLES[0]) + '\n{"half')
    assert "1 of 1 answers are kept" in Page(write_report(run)).text("context-distillation")


def test_a_run_without_such_a_stage_has_no_such_section(whole: Page) -> None:
    assert "context-distillation" not in whole.sections
