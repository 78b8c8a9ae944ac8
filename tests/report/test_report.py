"""The report of a run: its numbers are the run's, its HTML is sound, and nothing that a run lacks breaks it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page, check_self_contained
from small_run import HOSTILE, POLICIES, MakeRun, edit_json, evaluation_of


def report_of(run: Path, cli: Any) -> Page:
    ended = cli("report", run)
    assert ended.code == 0, ended.err  # matplotlib may say that it makes its font cache
    assert ended.out == f"{run / 'report.html'}\n"
    return Page(run / "report.html")


def test_a_whole_run(whole: Page) -> None:
    check_self_contained(whole)
    wanted = ["results", "pipeline", "training", "reward-models", "ppo", "policies", "kl"]
    assert list(whole.sections)[1:] == [*wanted, "samples", "time", "dropped", "recipe"]
    assert len(whole.source) < 1_000_000
    assert "small, seed 0" in whole.text("")
    assert "9 March 2026, 12:30 UTC" in whole.text("")
    assert "A <CPU>, 2 cores" in whole.text("")
    assert "safety_rm: margins <are> 0" in whole.text("")
    # Well-formed as XML too: no unclosed element, no bare ampersand, no control character.
    ElementTree.fromstring(whole.source.removeprefix("<!DOCTYPE html>\n"))


def test_numbers_are_the_summary_s(whole: Page) -> None:
    evaluation = {policy: evaluation_of(place) for place, policy in enumerate(POLICIES)}
    head, *rows = whole.rows[: 1 + len(POLICIES)]
    assert head == ["policy", "helpfulness reward", "violations", "KL to SFT, nats", "win rate against SFT"]
    for policy, row in zip(POLICIES, rows, strict=True):
        values, ends = evaluation[policy], evaluation[policy]["intervals"]
        reward, low, high = (
            f"{x:.2f}"
            for x in (
                values["reward_helpfulness_mean"],
                ends["reward_helpfulness_mean"]["low"],
                ends["reward_helpfulness_mean"]["high"],
            )
        )
        assert row[:2] == [policy, f"{reward}{low} to {high}"]
        assert row[2].startswith(f"{100 * values['violation_rate']:.1f}\N{NO-BREAK SPACE}%")
        assert row[4] == f"{100 * values['win_rate_vs_sft']:.1f}\N{NO-BREAK SPACE}%"
    # A measure that the report has never heard of is shown under its own name.
    assert whole.row("a new measure")[1:] == ["0.432"] * 4
    assert whole.row("attribute recall by attribute hobby 2")[1] == "77.7\N{NO-BREAK SPACE}%"
    assert whole.row("correctness greedy by family count")[1] == "66.6\N{NO-BREAK SPACE}%"
    assert whole.text("policies").count("by family") == 1, "in the table, not drawn"
    assert "ppo, step by step" in whole.text("kl")
    assert "helpfulness mean" in whole.text("kl")
    assert whole.row("false refusals, borderline")[1] == "22.7\N{NO-BREAK SPACE}%"


def test_reward_models(whole: Page) -> None:
    row = whole.row("significantly better")
    assert row == ["significantly better", "91.2\N{NO-BREAK SPACE}%86.2 to 95.2", "", "400"]
    assert whole.row("overall")[2:] == ["96.0\N{NO-BREAK SPACE}%", "900"]
    assert not [row for row in whole.rows if row and row[0] == "better"]  # none was counted
    text = whole.text("reward-models")
    assert "Calibration error (10 bins): 0.042." in text
    assert "length scorer: 53.1" in text
    assert whole.row("source a <source>") == [
        "source a <source>",
        "81.2\N{NO-BREAK SPACE}%76.2 to 85.2",
        "",
        "500",
    ]
    assert "in tokens: 54.3 % (49.3 % to 58.3 %, 99 pairs); to tell it from chance takes 514 pairs." in text
    assert "(longer in tokens wins): 61.1 % (56.1 % to 65.1 %, 900 pairs)." in text
    assert "Recall" not in text
    assert "Gate" not in text


def test_what_was_dropped(whole: Page) -> None:
    assert ["demonstrations", "data entry", "41", "9 odd turns"] in whole.rows
    assert ["sft", "of help.jsonl", "300", "5 shortened, 2 dropped"] in whole.rows
    assert ["", "of safe.jsonl", "31", "3 untrained"] in whole.rows
    assert ["", "dialogues", "331", "5 shortened, 2 dropped"] in whole.rows
    assert ["helpfulness_rm", "pairs", "4,321", "17 unrated, 23 too long"] in whole.rows
    assert ["v1", "prompts", "290", "10 prompts without complete answer"] in whole.rows
    assert ["", "samples", "2,111", "13 cut off"] in whole.rows
    assert ["", "dialogues", "280", "6 shortened, 4 dropped"] in whole.rows
    assert ["ppo", "prompts", "77", "5 dropped"] in whole.rows
    assert "cut off: the answer reached the length limit" in whole.text("dropped")


def test_time(whole: Page) -> None:
    rows = [row for row in whole.rows if len(row) == 5 and row[0] == "ppo" and row[1] == ""]
    # 500 of 100 + … + 500 + 4 · 61 seconds; 36,000 tokens in 20 seconds.
    assert rows == [["ppo", "", "8 min 20 s", "29 %", "1,800 tokens/s250 sampling tokens/s"]]
    assert "interrupted" not in whole.text("time")


def test_sampled_text_is_text(whole: Page) -> None:
    assert "<script" not in whole.source
    assert "onerror=alert(1)&gt;" in whole.source
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}").replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert shown in whole.sections["samples"]


def test_samples_side_by_side(whole: Page) -> None:
    """Question 7, where the trained policies differ most, comes first; base and v1 say different things."""
    text = whole.text("samples")
    greedy, safety = text.split("Safety prompts")
    assert greedy.index("greedy question 7") < min(
        greedy.index(f"greedy question {n}") for n in range(12) if n != 7 and f"greedy question {n}" in greedy
    )
    assert greedy.count("greedy question") == 6
    assert safety.count("safety question") == 4
    assert safety.count("borderline question") == 2  # there are no more
    for policy in POLICIES:
        assert f"{policy} answers 7" in greedy
    assert "oracle 0.90" in greedy
    assert "unsafe" in safety
    assert "helpful question" not in text


def test_one_card_for_policies_with_the_same_answer(make_run: MakeRun, cli: Any) -> None:
    run = make_run()
    for policy in ("v1", "ppo"):
        shutil.copy(run / "evaluation/sft.samples.jsonl", run / f"evaluation/{policy}.samples.jsonl")
    text = report_of(run, cli).text("samples")
    assert "sft to ppo" in text
    assert "v1 answers" not in text


def test_pipeline_figure_names_every_stage(whole: Page) -> None:
    text = whole.text("pipeline")
    places = [
        text.index(f"{n} {name}") for n, name in enumerate(("sft", "helpfulness_rm", "safety_rm", "v1"), 1)
    ]
    assert places == sorted(places)
    assert "prompts → 290 kept answers → policy" in text
    assert "pairs → helpfulness reward model" in text
    assert "some/base" in text


def test_same_run_same_bytes(make_run: MakeRun, whole: Page, cli: Any) -> None:
    run = make_run()
    assert report_of(run, cli).source == whole.source


def test_half_written_lines(make_run: MakeRun, cli: Any) -> None:
    """A kill leaves half a line, a full disk may leave half a character."""
    run = make_run()
    for file in ("stages/05-ppo/metrics.jsonl", "events.jsonl", "evaluation/v1.samples.jsonl"):
        with (run / file).open("ab") as stream:
            stream.write(b'{"step": 61, "kl_na\xc3')
    with (run / "stages/01-sft/metrics.jsonl").open("a") as stream:
        stream.write('[1]\n{"step": 41, "loss": NaN, "accuracy": "high"}\n\n')
    page = report_of(run, cli)
    check_self_contained(page)
    text = page.text("")
    for file in ("05-ppo/metrics.jsonl", "01-sft/metrics.jsonl", "events.jsonl", "v1.samples.jsonl"):
        assert f"{file}: 1 line could not be read and is left out." in text


def test_unfinished_run(make_run: MakeRun, cli: Any) -> None:
    """PPO was killed: no result of it, no evaluation."""
    run = make_run()
    shutil.rmtree(run / "evaluation")

    def unfinished(summary: Any) -> None:
        del summary["stages"]["ppo"]
        summary["evaluation"] = {}

    edit_json(run / "summary.json", unfinished)
    page = report_of(run, cli)
    assert "Not done: ppo." in page.text("")
    assert "The evaluation has not run yet." in page.text("")
    assert "4 of 5 stages done" in page.text("")
    assert "ppo (not done)" in page.text("training")
    assert "not done" in page.text("pipeline")
    assert not {"results", "policies", "samples"} & set(page.sections)
    assert "ppo, step by step" in page.text("kl")  # its path so far is there


def test_a_run_that_has_just_begun(make_run: MakeRun, cli: Any) -> None:
    run = make_run()
    for name in ("summary.json", "environment.json", "events.jsonl"):
        (run / name).unlink()
    for name in ("stages", "evaluation", "data"):
        shutil.rmtree(run / name)
    page = report_of(run, cli)
    assert "Not done: sft, helpfulness_rm, safety_rm, v1, ppo." in page.text("")
    assert "summary.json is not there." in page.text("")
    assert list(page.sections) == ["", "pipeline", "recipe"]


def test_fields_that_are_missing_leave_no_hole(make_run: MakeRun, cli: Any) -> None:
    run = make_run()

    def thinned(summary: Any) -> None:
        summary["evaluation"]["base"] = {"reward_helpfulness_mean": 1.0, "violation_rate": None}
        for policy in ("sft", "v1", "ppo"):
            del summary["evaluation"][policy]["intervals"], summary["evaluation"][policy]["attribute_recall"]
        summary["stages"]["safety_rm"]["accuracy"] = {"overall": {}, "by_rating": None}
        del summary["stages"]["helpfulness_rm"]["controls"]

    edit_json(run / "summary.json", thinned)
    page = report_of(run, cli)
    assert page.row("base") == ["base", "1.00", "–", "–", "–"]
    assert "turns since the instruction" not in page.text("policies")
    assert "safety_rm" not in page.text("reward-models")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone", "gone: no such run directory"),
        (lambda folder: folder, "not a run directory (no recipe.yaml in it)"),
    ],
)
def test_not_a_run_directory(tmp_path: Path, cli: Any, make: Any, message: str) -> None:
    ended = cli("report", make(tmp_path))
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.both


def test_a_sweep_is_told_apart(make_run: MakeRun, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "all" / "sweep").mkdir(parents=True)
    make_run("run").rename(tmp_path / "all" / "sweep" / "seed=0")
    ended = cli("report", tmp_path / "all")
    assert ended.code == 2
    assert f"holds a sweep; name one of its runs: {tmp_path / 'all/sweep/seed=0'}" in ended.err


def test_another_format_version(make_run: MakeRun, cli: Any) -> None:
    run = make_run()
    edit_json(run / "environment.json", lambda environment: environment.update(format_version=7))
    ended = cli("report", run)
    assert ended.code == 2
    assert "format 7" in ended.err


def test_torch_is_not_imported(make_run: MakeRun) -> None:
    code = (
        "import sys\nfrom llama2_chat.cli.main import run_command\n"
        f"code = run_command(['report', {str(make_run())!r}])\n"
        "print(code, [name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_long_series_stay_small(make_run: MakeRun, cli: Any) -> None:
    run = make_run()
    rows = (json.dumps({"step": n, "loss": (n * 7919 % 101) / 50}) for n in range(1, 50_001))
    (run / "stages/01-sft/metrics.jsonl").write_text("\n".join(rows))
    page = report_of(run, cli)
    assert len(page.source) < 500_000
    # 50,000 steps in 240 points of 209 steps; 8 points on either side are averaged: 17 · 209.
    assert "step (thick line: mean of 3553 steps)" in page.text("training")


def test_a_run_writes_its_report(workspace: Path, cli: Any) -> None:
    assert cli("run", "recipe.yaml").code == 0
    page = Page(workspace / "runs/small/report.html")
    assert "3 stages" in page.text("")
    assert "first" in page.text("training")


def test_a_report_that_fails_does_not_fail_the_run(
    workspace: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("llama2_chat.report.page.report_page", fail)
    ended = cli("run", "recipe.yaml")
    assert ended.code == 0
    assert "the report could not be written (RuntimeError: no ink)" in ended.err
    events = [json.loads(line) for line in (workspace / "runs/small/events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "report_failed"
    assert "test_report.py" in events[-1]["traceback"]
    # Asked for by itself it is an error like any other.
    assert cli("report", "runs/small").code == 1
