"""recipes/tiny/distillation_tables.py and scaling_tables.py on runs made by hand: differences, tables, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import write_rows
from llama2_chat.recipes.tiny import distillation_tables, scaling_tables
from llama2_chat.recipes.tiny.distillation_tables import difference_rows, differences, interval

SHARES = (0.0, 0.1, 1.0)


def answers(refused: list[bool], unsafe: list[bool], helpfulness: float = 0.5) -> list[dict[str, Any]]:
    """One answer to each borderline prompt, one to each unsafe one, two to each of two harmless ones."""

    def row(name: str, number: int, **more: Any) -> dict[str, Any]:
        scores = {"helpfulness": helpfulness - number, "safety": 2.0 + number, "combined": 0.5}
        common = {"refused": False, "oracle_safe": True, "oracle_helpfulness": helpfulness, "scores": scores}
        prompt = [{"role": "user", "content": f"{name} {number}"}]
        return {"set": name, "prompt": prompt, "response": "x", "status": "complete", **common, **more}

    return [
        *(row("borderline", n, refused=flag) for n, flag in enumerate(refused)),
        *(row("safety", n, oracle_safe=not flag) for n, flag in enumerate(unsafe)),
        *(row("helpful", n, refused=flag) for n in range(2) for flag in (bool(n), False)),
    ]


def make_run(folder: Path, recipe: str, seed: int, stages: dict[str, Any], policies: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    summary = {"recipe": recipe, "seed": seed, "stages": stages}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation").mkdir()
    for name, rows in policies.items():
        write_rows(folder / "evaluation" / f"{name}.samples.jsonl", rows)
    return folder


@pytest.fixture
def two_policies(tmp_path: Path) -> Path:
    before = answers([True, False, False, False], [True, True, False, False])
    after = answers([True, True, False, False], [False, False, False, False], helpfulness=0.75)
    return make_run(tmp_path / "run", "context-distillation", 0, {}, {"sft": before, "targeted": after})


def test_measures_and_their_differences_by_hand(two_policies: Path) -> None:
    run = two_policies
    assert differences(run, "targeted", "sft", "violations") == [-1.0, -1.0, 0.0, 0.0]
    assert differences(run, "targeted", "sft", "borderline refused") == [0.0, 1.0, 0.0, 0.0]
    assert differences(run, "targeted", "sft", "true helpfulness") == [0.25, 0.25]
    # Wilson's interval for 2 of 4.
    found = interval(run, "sft", "violations")
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.5, 0.1500, 0.8500), abs=1e-4)
    # The second harmless prompt is refused once in two samples.
    assert interval(run, "sft", "harmless refused")["mean"] == 0.25
    ((title, cells),) = difference_rows([run], [("targeted", "sft")], ["violations"])
    assert title == "targeted: violations"
    # Deviation sqrt(1/3), 1.96 standard errors of four prompts: 0.566.
    assert cells == ["-0.500", "-0.500", "-1.066 to +0.066", "-"]


def scaling_run(folder: Path, seed: int, share: float) -> None:
    """Violations fall and refusals rise with the share."""
    unsafe, refused = [share < 1.0, share == 0.0], [share > 0.0, share == 1.0]
    mix = [{"weight": 1.0, "used": 90}, {"weight": share, "used": round(40 * share)}]
    stages = {"sft": {"kind": "sft", "mix": mix}}
    name = folder / "sweep" / f"seed={seed},share={share}"
    make_run(name, "safety-scaling", seed, stages, {"sft": answers(refused, unsafe)})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for share in SHARES:
            scaling_run(tmp_path / "scaling", seed, share)
    return tmp_path / "scaling"


def test_scaling_by_share_and_seed(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = scaling_tables.scaling_of(sweep)
    assert {share: list(runs) for share, runs in scaling.items()} == {share: [0, 1] for share in SHARES}
    assert scaling_tables.main([str(sweep), "--figures", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    means = [row for row in rows if row[0] in ("0 %", "10 %", "100 %")][:3]
    assert [(row[1], row[4], row[7]) for row in means] == [
        ("0", "1.000", "0.000"),
        ("4", "0.500", "0.500"),
        ("40", "0.000", "1.000"),
    ]
    assert ["violations", "-1.000 / -1.000", "-1.000", "-1.000 to -1.000", "-1.000 to -1.000"] in rows
    assert printed.count("\n\n") == 3
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["safety_scaling.png"]


def test_a_sweep_that_is_not_finished_or_not_this_one(
    sweep: Path, two_policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "sweep" / "seed=1,share=0.1" / "summary.json").unlink()
    with pytest.raises(UserInputError, match="not every seed has every share of the safety data"):
        scaling_tables.scaling_of(sweep)
    assert scaling_tables.main([str(two_policies)]) == 2
    assert 'the recipe is "context-distillation", not "safety-scaling"' in capsys.readouterr().err
    assert distillation_tables.main([str(sweep)]) == 2
    assert 'the recipe is "safety-scaling", not "context-distillation"' in capsys.readouterr().err
    assert distillation_tables.main([str(sweep / "sweep" / "none")]) == 2
