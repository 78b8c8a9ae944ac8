"""PPO in the report: what is drawn is the history, and what guards found and samples say is there to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page_reader import Page, check_self_contained
from small_run import HOSTILE, MakeRun, edit_json, write_lines

from llama2_chat.report.page import write_report
from llama2_chat.report.ppo_figures import panels_of
from llama2_chat.report.run_record import read_run

ITERATIONS = 20
SERIES = [
    {
        "step": n,
        "score_mean": n / 10,
        "helpfulness_mean": n / 5,
        "safety_mean": 1.0,
        "kl_nats": n / 4,
        "kl_k3_nats": n / 3,
        "entropy_nats": 2 - n / 20,
        "response_tokens_mean": 30.0 + n,
        "response_tokens_std": 4.0,
        "complete_share": 0.5 + n / 50,
        "cut_off_share": 0.5 - n / 50,
        "empty_share": 0.0,
        "chat_tag_share": 0.0,
        "clip_fraction": 0.1,
        "explained_variance": n / 100,
    }
    for n in range(1, ITERATIONS + 1)
]
HELD_OUT = [
    {
        "step": step,
        "score_mean": step / 9,
        "score_se": 0.5,
        "kl_nats": 0.1,
        "independent_mean": 3.0,
        "independent_se": 0.1,
    }
    for step in (0, 10, 20)
]
SAMPLES = [
    {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "response": f"said after {step} to {number} {HOSTILE}",
        "scores": {"helpfulness": 1.0, "safety": 2.0, "combined": 0.25 + step / 100},
        "status": "complete",
        "iteration": step,
    }
    for step in (0, 10, 20)
    for number in range(6)
]
GUARDS = [
    {"guard": "kl", "action": "warn", "iteration": 7, "reason": "too far <away>"},
    {"guard": "length", "action": "stop", "iteration": 20, "reason": "too long"},
]
METRICS = {
    "guards": GUARDS,
    "stopped_by": {"name": "length", "iteration": 20, "reason": "too long"},
    "kept_iteration": 10,
    "held_out_prompts": 6,
    "dropped_held_out_prompts": 2,
    "held_out_score_mean_first": 0.0,
    "held_out_score_mean_kept": 1.111,
}
TIMES = {"sampling_seconds": 3.0, "scoring_seconds": 0.5, "logprobs_seconds": 0.5, "update_seconds": 1.0}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    path = make_run()
    (stage,) = path.glob("stages/*-ppo")
    write_lines(stage / "metrics.jsonl", SERIES)
    write_lines(stage / "held_out.jsonl", HELD_OUT)
    write_lines(stage / "samples.jsonl", SAMPLES)
    edit_json(path / "summary.json", lambda summary: summary["stages"]["ppo"].update(METRICS))
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    # The fifth iteration was done twice; what it took at last counts.
    slow = {"event": "ppo_iteration", "stage": "ppo", "iteration": 5, **dict.fromkeys(TIMES, 900.0)}
    again = [{"event": "ppo_iteration", "stage": "ppo", "iteration": n, **TIMES} for n in range(1, 21)]
    write_lines(path / "events.jsonl", [*events, slow, *again])
    return path


def drawn(run: Path) -> dict[str, Axes]:
    """The axes of each figure by its title."""
    stage = read_run(run).stage("ppo")
    assert stage is not None
    axes = {}
    for panel in panels_of(stage, [{name.removesuffix("_seconds"): s for name, s in TIMES.items()}] * 3):
        axes[panel.title] = Figure().add_subplot()
        panel.draw(axes[panel.title])
    return axes


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    named = (line for line in axes.lines if not str(line.get_label()).startswith("_"))
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in named}  # type: ignore[arg-type]


def test_batches_and_evaluations_on_one_axis(run: Path) -> None:
    """A batch's line n is of the policy after n - 1 iterations, which the evaluations are counted by."""
    axes = drawn(run)
    done = list(range(ITERATIONS))
    rewards = lines(axes["combined reward"])
    assert rewards["batches"] == (done, [row["score_mean"] for row in SERIES])
    assert rewards["held out"] == ([0, 10, 20], [row["score_mean"] for row in HELD_OUT])
    (band,) = axes["combined reward"].collections
    ends = band.get_paths()[0].vertices
    assert max(y for x, y in ends if x == 20) == pytest.approx(20 / 9 + 1.96 * 0.5)
    assert min(y for x, y in ends if x == 20) == pytest.approx(20 / 9 - 1.96 * 0.5)
    kept = [line.get_xdata() for line in axes["combined reward"].lines if line.get_linestyle() == ":"]
    assert [list(x) for x in kept] == [[10.0, 10.0]]  # type: ignore[arg-type]
    assert lines(axes["independent reward model, held out"])["held out"][1] == [3.0] * 3
    kl = lines(axes["KL to the reference"])
    assert kl["batches, k3"] == (done, [row["kl_k3_nats"] for row in SERIES])
    assert kl["held out"][1] == [0.1] * 3
    assert lines(axes["entropy"])["batches"][1] == [row["entropy_nats"] for row in SERIES]
    assert {"clip fraction", "explained variance", "reward models on the batches"} <= set(axes)


def test_lengths_ends_and_times(run: Path) -> None:
    axes = drawn(run)
    (band,) = axes["response length"].collections
    ends = band.get_paths()[0].vertices
    assert {y for x, y in ends if x == 0} == {27.0, 35.0}  # 31, one standard deviation of 4 on each side
    ends = axes["incomplete responses"]
    labels = [text.get_text() for text in ends.get_legend().get_texts()]
    assert labels == ["cut off"]  # nothing else happened
    (area,) = ends.collections
    heights = {x: y for x, y in area.get_paths()[0].vertices if y > 0}
    assert heights == pytest.approx({n - 1: 50 - 2 * n for n in range(1, 21)})
    assert ends.get_ylim() == pytest.approx((0, 1.35 * 48))
    bars = axes["time of an iteration"].patches
    heights = [bar.get_height() for bar in bars]  # type: ignore[attr-defined]
    assert heights == [3.0] * 3 + [0.5] * 3 + [0.5] * 3 + [1.0] * 3
    assert [bar.get_y() for bar in bars][::3] == [0.0, 3.0, 3.5, 4.0]  # type: ignore[attr-defined]


def test_the_page(run: Path) -> None:
    page = Page(write_report(run))
    check_self_contained(page)
    text = page.text("ppo")
    assert "Iteration 7, kl: too far <away>." in text
    assert "Stopped after iteration 20: too long." in text
    assert text.count("too long") == 1
    assert "Kept: the policy after 10 of 20 iterations, held-out reward 1.11 (0 before the first)." in text
    # 20 iterations of 5 seconds; the slow fifth was done again.
    assert "5.0 s in the mean: sampling 60 %, scoring 10 %" in text
    assert "52.0 % of the responses end by themselves at first, 90.0 % at last." in text
    assert "<script" not in page.source
    assert ["", "held-out prompts", "6", "2 dropped"] in page.rows


def test_samples_before_and_after_side_by_side(run: Path) -> None:
    text = Page(write_report(run)).text("ppo")
    assert text.count("question") == 4
    for name in ("before", "after 10 iterations", "after 20 iterations"):
        assert text.count(f"{name}said after") == 4
    assert "Rc 0.35" in text


def test_a_stage_in_progress(run: Path) -> None:
    """Without metrics: findings from the events, the last samples, no policy that was kept."""
    edit_json(run / "summary.json", lambda summary: summary["stages"].pop("ppo"))
    with (run / "events.jsonl").open("a") as stream:
        for event in (GUARDS[0], GUARDS[0], {**GUARDS[0], "iteration": 9}):
            stream.write(json.dumps({"event": "guard", "stage": "ppo", **event}) + "\n")
    page = Page(write_report(run))
    assert "ppo: iteration 9: too far <away>" in page.text("")  # at the head, with other warnings
    text = page.text("ppo")
    assert text.count("too far <away>") == 2
    assert "Iteration 9, kl" in text
    assert "Kept" not in text
    assert "after 20 iterationssaid after 20" in text


@pytest.mark.parametrize("history", [[], SERIES[:1], [{"step": 1, "score_mean": None}, {"step": 2}]])
def test_a_short_history(run: Path, history: list[dict[str, Any]]) -> None:
    (stage,) = run.glob("stages/*-ppo")
    write_lines(stage / "metrics.jsonl", history)
    for name in ("held_out.jsonl", "samples.jsonl"):
        (stage / name).unlink()
    page = Page(write_report(run))
    check_self_contained(page)
    assert "Samples before" not in page.source
