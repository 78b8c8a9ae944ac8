"""recipes/tiny/reward_tables.py and tables.py against arithmetic by hand: intervals, differences, layout, exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama2_chat.dialogue import Message, Preference
from llama2_chat.errors import MissingFileError
from llama2_chat.recipes.tiny import reward_tables
from llama2_chat.recipes.tiny.reward_tables import AVERAGE, RATING_COLUMNS, SAFETY_COLUMNS, Scored
from llama2_chat.recipes.tiny.tables import difference_cells, exit_code, runs_of, seed_interval

ASKED = (Message("user", "A pet?"),)
PAIRS = [
    Preference(ASKED, "a", "b", "significantly_better", chosen_safe=True, rejected_safe=False),
    Preference(ASKED, "a", "b", "significantly_better", chosen_safe=True, rejected_safe=True),
    Preference(ASKED, "a", "b", "better", chosen_safe=False, rejected_safe=False),
    Preference(ASKED, "a", "b", "negligibly_better"),
]
FOUND = Scored(PAIRS, [2.0, 1.0, -0.5, 3.0], [-1.0, 1.0, 0.5, 0.0])


def test_points_are_one_a_half_or_none_in_the_pairs_of_the_column() -> None:
    by_rating = {name: FOUND.points((name, keep)) for name, keep in RATING_COLUMNS}
    assert by_rating == {
        "significantly better": [1.0, 0.5],
        "better": [0.0],
        "slightly better": [],
        "negligibly better": [1.0],
        "average": [1.0, 0.5, 0.0, 1.0],
    }
    by_safety = {name: FOUND.points((name, keep)) for name, keep in SAFETY_COLUMNS[1:]}
    assert by_safety == {"safe and unsafe": [1.0], "both safe": [0.5], "both unsafe": [0.0]}


def test_responses_below_a_half_are_counted_by_their_own_label() -> None:
    """Unsafe: scores -1, -0.5, 0.5. Safe: 2, 1, 1. The last pair has no labels."""
    assert FOUND.below_half(safe=False) == [1.0, 1.0, 0.0]
    assert FOUND.below_half(safe=True) == [0.0, 0.0, 0.0]
    # Half of the safe ones are below 1: none, with the tie; a threshold of 1 finds all three unsafe ones.
    assert FOUND.found_at(0.5) == 1.0
    low = Scored(PAIRS, [0.2, 0.7, 0.4, 0.0], [0.1, 0.3, 0.6, 0.0])
    # Safe: 0.2, 0.3, 0.7; unsafe: 0.1, 0.4, 0.6. A third of the safe ones are below 0.3.
    assert low.found_at(0.34) == pytest.approx(1 / 3)
    assert low.found_at(0.67) == 1.0
    assert FOUND.distance == pytest.approx((3 + 0 + 1 + 3) / 4)


def test_the_interval_over_seeds_is_students() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484."""
    assert seed_interval([1.0, 2.0, 3.0], ".3f") == "-0.484 to 4.484"
    assert seed_interval([1.0], ".3f") == "-"


def test_differences_are_taken_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of two pairs. Differences in points: (100, 0) and (0, 0); seed means 50 and 0.

    Over the four pairs: mean 25, deviation 50, half width 1.96 · 50 / 2 = 49. Over the two seeds: deviation
    35.355, half width 12.706 · 25 = 317.65.
    """
    right, wrong = Scored(PAIRS[:2], [1.0, 1.0], [0.0, 0.0]), Scored(PAIRS[:2], [0.0, 1.0], [1.0, 0.0])
    made = {("1", "ours"): right, ("1", "other"): wrong, ("2", "ours"): wrong, ("2", "other"): wrong}
    monkeypatch.setattr(reward_tables, "scored", lambda run, stage, domain: made[run.name, stage])
    ((name, cells),) = reward_tables.differences([Path("1"), Path("2")], "ours", "other", "safety", [AVERAGE])
    assert name == "average"
    assert cells == ["+50.0 / +0.0", "+25.00", "-24.00 to +74.00", "-292.65 to +342.65"]


def test_cells_of_paired_differences() -> None:
    """The same two seeds, to another digit: half widths 1.95996 · 50 / 2 = 48.999 and 12.706 · 25 = 317.65."""
    cells = ["+50.000 / +0.000", "+25.000", "-23.999 to +73.999", "-292.650 to +342.650"]
    assert difference_cells([[100.0, 0.0], [0.0, 0.0]]) == cells


def test_the_scaling_table_has_a_row_for_each_size(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        run = tmp_path / "sweep" / f"seed={seed}"
        stages = {"small_sft": {}}
        for count in (10, 1200):
            folder = run / "stages" / f"01-small_{count}" / "model"
            folder.mkdir(parents=True)
            save_file({"w": torch.zeros(40, 30), "b": torch.zeros(7)}, folder / "model.safetensors")
            stages[f"small_{count}"] = {"accuracy": {"overall": {"accuracy": accuracy + count / 10000}}}
        (run / "summary.json").write_text(json.dumps({"recipe": "reward-scaling", "stages": stages}))
    assert reward_tables.tables(tmp_path).splitlines() == [
        "| pairs | 10 | 1,200 |",
        "|---|---|---|",
        "| small, 1,207 parameters | 0.601 (0.501 / 0.701) | 0.720 (0.620 / 0.820) |",
    ]


def test_a_folder_without_a_finished_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"no summary\.json there or in sweep/\*/; name a finished run"
    ):
        reward_tables.tables(tmp_path)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command's own code, 0 for one that gives none, 2 and one line for a user's mistake."""
    assert [exit_code(lambda: 3), exit_code(lambda: None)] == [3, 0]

    def mistaken() -> None:
        runs_of(tmp_path)

    assert exit_code(mistaken) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"error: {tmp_path}: no summary.json")
