"""Scorers whose figures are known beforehand, through the whole evaluation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from known_scorers import KnownScorer, word_pairs, write_pairs

from llama2_chat.dialogue import RATINGS, Message, Preference
from llama2_chat.errors import UserInputError
from llama2_chat.evaluation.reward_evaluation import evaluate_reward_models, model_names
from llama2_chat.evaluation.reward_report import reward_markdown, table
from llama2_chat.reward.metrics import pairs_needed, wilson_interval

LENGTH = lambda words: float(len(words))  # noqa: E731
PERFECT = lambda words: 3.0 if "good" in words else -3.0  # noqa: E731
SAFETY = lambda words: -4.0 if "bad" in words else 4.0  # noqa: E731


def coin(words: list[str]) -> float:
    return random.Random(" ".join(words)).gauss(0.0, 1.0)


def tokens(answer: str) -> int:
    return len(answer.split()) + 1


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write_pairs(tmp_path / "one.jsonl", word_pairs(300, 1, source="first")),
        write_pairs(tmp_path / "two.jsonl", word_pairs(200, 2)),
    ]


@pytest.fixture
def pairs() -> list[Preference]:
    return word_pairs(300, 1) + word_pairs(200, 2)


@pytest.fixture
def longer_wins(tmp_path: Path) -> Path:
    """Training pairs of which the longer is always preferred."""
    prompt = (Message("user", "q"),)
    rows = [Preference(prompt, "a b c d" + " e" * n, "a b") for n in range(9)]
    return write_pairs(tmp_path / "train.jsonl", rows)


def test_a_length_scorer(files: list[Path], pairs: list[Preference], longer_wins: Path) -> None:
    made = evaluate_reward_models(
        {"length": KnownScorer("length", LENGTH)}, files, length_rule_from=[longer_wins]
    )
    right = sum(
        1.0
        if tokens(p.chosen) > tokens(p.rejected)
        else 0.5
        if tokens(p.chosen) == tokens(p.rejected)
        else 0.0
        for p in pairs
    )
    overall, row = made["accuracy"]["overall"], made["length"]["tokens"]
    assert (overall["accuracy"], overall["count"]) == (right / 500, 500)
    assert row["longer_wins"] == overall
    assert row["shorter_wins"]["accuracy"] == pytest.approx(1 - right / 500, rel=1e-12)
    assert row["prefers_longer"]["share"] == row["chosen_longer"]["accuracy"] == 1.0
    assert row["rejected_longer"]["accuracy"] == 0.0
    assert row["mean_chosen"] == sum(tokens(p.chosen) for p in pairs) / 500
    assert row["mean_preferred"] == sum(max(tokens(p.chosen), tokens(p.rejected)) for p in pairs) / 500
    letters = made["length"]["characters"]
    assert letters["mean_rejected"] == sum(len(p.rejected) for p in pairs) / 500
    rule = made["length_rule"]
    assert (rule["rule"], rule["evaluated"]) == ("longer in tokens wins", overall)
    assert rule["train"]["accuracy"] == 1.0
    assert rule["model_minus_rule"]["difference"] == 0.0
    assert rule["train_pairs_also_evaluated"] == 0
    assert made["held_out_pairs"]["kept"] == 500


def test_a_perfect_scorer(files: list[Path], pairs: list[Preference], longer_wins: Path) -> None:
    made = evaluate_reward_models({"rm": KnownScorer("rm", PERFECT)}, files, length_rule_from=[longer_wins])
    by_rating = made["accuracy"]["by_rating"]
    assert {name: row["accuracy"] for name, row in by_rating.items()} == dict.fromkeys(RATINGS, 1.0)
    assert [row["count"] for row in by_rating.values()] == [
        sum(p.rating == r for p in pairs) for r in RATINGS
    ]
    assert made["accuracy"]["overall"]["high"] == 1.0
    # Every pair is predicted σ(6) or σ(-6), and that is how it is.
    assert made["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-6)), abs=1e-7)
    assert made["score_spread"] == {
        "mean_chosen": 3.0,
        "mean_rejected": -3.0,
        "mean_gap": 6.0,
        "gap_deviation": 0.0,
    }
    assert {name: one["overall"]["count"] for name, one in made["by_source"].items()} == {
        "first": 300,
        "not named": 200,
    }
    assert {name: one["overall"]["accuracy"] for name, one in made["by_file"].items()} == {
        "one.jsonl": 1,
        "two.jsonl": 1,
    }
    matched = [
        p
        for p in pairs
        if 10 * abs(tokens(p.chosen) - tokens(p.rejected)) <= max(tokens(p.chosen), tokens(p.rejected))
    ]
    found = made["matched_length"]["tokens"]
    assert (found["accuracy"], found["count"], found["pairs_needed"]) == (1.0, len(matched), None)
    assert 20 < len(matched) < 100
    length = made["length"]["tokens"]
    assert length["mean_preferred"] == length["mean_chosen"]
    rule = made["length_rule"]
    assert rule["model_minus_rule"]["difference"] == pytest.approx(
        1 - rule["evaluated"]["accuracy"], rel=1e-12
    )
    assert rule["model_minus_rule"]["low"] > 0


def test_a_coin(files: list[Path], pairs: list[Preference]) -> None:
    made = evaluate_reward_models({"rm": KnownScorer("rm", coin)}, files)
    for row in (
        made["accuracy"]["overall"],
        *made["matched_length"].values(),
        made["length"]["tokens"]["prefers_longer"],
    ):
        assert row["low"] < 0.5 < row["high"]
    for row in made["matched_length"].values():
        assert row["pairs_needed"] == pairs_needed(row["accuracy"])
        assert row["pairs_needed"] > row["count"]
        assert f"| {row['pairs_needed']:,} pairs needed to tell it from 50 |" in reward_markdown(made)
    assert made["calibration_error"] > 0.1  # it claims to know
    assert "length_rule" not in made
    assert made["score_histogram"]["counts"].keys() == {"rm"}
    assert [sum(counts) for counts in made["score_histogram"]["counts"]["rm"].values()] == [500, 500]


def test_the_seed_orients_the_pairs_and_changes_nothing_else(files: list[Path]) -> None:
    one, same, other = (
        evaluate_reward_models({"rm": KnownScorer("rm", coin)}, files, seed=seed) for seed in (3, 3, 4)
    )
    assert one == same
    assert (one["seed"], one["calibration"]["preference"]["seed"], other["seed"]) == (3, 3, 4)
    assert one["calibration"]["preference"]["bins"] != other["calibration"]["preference"]["bins"]
    assert one["accuracy"] == other["accuracy"]


def test_a_safety_scorer(files: list[Path], pairs: list[Preference]) -> None:
    """Right where one answer alone is unsafe, a tie elsewhere, and every unsafe answer is found."""
    made = evaluate_reward_models({"rm": KnownScorer("rm", SAFETY)}, files)
    by_safety = made["accuracy"]["by_safety"]
    assert {name: row["accuracy"] for name, row in by_safety.items()} == {
        "both_safe": 0.5,
        "both_unsafe": 0.5,
        "safe_unsafe": 1.0,
    }
    unsafe = sum((not p.chosen_safe) + (not p.rejected_safe) for p in pairs)
    for row in (made["unsafe_at_half"], made["gate"]):
        assert (row["precision"], row["recall"]) == (1.0, 1.0)
        assert row["hits"] == row["flagged"] == row["unsafe"] == unsafe
        assert (row["recall_low"], row["recall_high"]) == wilson_interval(unsafe, unsafe)
    assert made["unsafe_recall"] == 1.0
    safety = made["calibration"]["safety"]
    assert [row["count"] for row in safety["bins"]] == [unsafe, *[0] * 8, 1000 - unsafe]
    assert safety["error"] == pytest.approx(1 / (1 + math.exp(4)), abs=1e-7)


def test_a_constant_scorer_is_its_own_control(files: list[Path]) -> None:
    made = evaluate_reward_models({"rm": KnownScorer("rm", lambda words: 0.25)}, files)
    assert made["accuracy"]["overall"]["accuracy"] == 0.5
    assert made["controls"]["constant_scorer"] == made["accuracy"]["overall"]
    assert made["controls"]["length_scorer"] == made["length"]["characters"]["longer_wins"]
    length = made["length"]["tokens"]
    assert length["mean_preferred"] == pytest.approx(
        (length["mean_chosen"] + length["mean_rejected"]) / 2, rel=1e-12
    )


def test_two_models_side_by_side(files: list[Path], pairs: list[Preference]) -> None:
    models = {"perfect": KnownScorer("perfect", PERFECT), "long": KnownScorer("long", LENGTH)}
    made = evaluate_reward_models(models, files)
    alone = evaluate_reward_models({"long": KnownScorer("long", LENGTH)}, files)
    long = made["compared"]["long"]
    assert {key: long[key] for key in ("accuracy", "calibration", "length")} == {
        key: alone[key] for key in ("accuracy", "calibration", "length")
    }
    difference = long["accuracy_difference"]
    assert difference["difference"] == pytest.approx(long["accuracy"]["overall"]["accuracy"] - 1, rel=1e-12)
    assert difference["high"] < 0
    assert made["model"] == "perfect"
    assert "accuracy_difference" not in made
    edges = made["score_histogram"]["edges"]
    # Every prompt has three words, so the longest dialogue counts three more than its answer.
    longest = max(len(p.chosen.split()) for p in pairs), max(len(p.rejected.split()) for p in pairs)
    assert (edges[0], edges[-1]) == (-3.0, 3.0 + max(longest))


def test_models_are_compared_on_the_pairs_that_both_can_take(
    files: list[Path], pairs: list[Preference], capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"a": KnownScorer("a", PERFECT), "b": KnownScorer("b", PERFECT, max_tokens=25)}
    made = evaluate_reward_models(models, files)
    # A prompt is three words and its end.
    fitting = [p for p in pairs if 4 + max(tokens(p.chosen), tokens(p.rejected)) <= 25]
    assert 50 < len(fitting) < 450
    assert made["left_out"] == 500 - len(fitting)
    assert made["accuracy"]["overall"]["count"] == len(fitting)
    assert made["compared"]["b"]["accuracy"] == made["accuracy"]
    assert made["held_out_pairs"]["kept"] == 500
    assert made["compared"]["b"]["held_out_pairs"]["kept"] == len(fitting)
    said = capsys.readouterr().err
    assert f"{500 - len(fitting):,} pairs left out of the comparison" in said
    of_first = sum(4 + max(tokens(p.chosen), tokens(p.rejected)) > 25 for p in pairs[:300])
    assert f"b: one.jsonl: of 300 pairs {of_first:,} dropped: longer than 25 tokens" in said
    text = reward_markdown(made)
    assert f"{made['left_out']:,} pairs are left out" in text
    assert f"| b     | one.jsonl | {300 - of_first}" in text


def test_equal_dialogues_are_scored_once_and_tie(tmp_path: Path) -> None:
    """Even by a model that would give them different scores."""
    prompt = (Message("user", "q"),)
    rows = [Preference(prompt, "a", "a"), Preference(prompt, "a", "b"), Preference(prompt, "b", "a")]
    file = write_pairs(tmp_path / "pairs.jsonl", rows)
    asked: list[str] = []

    def never_the_same(words: list[str]) -> float:
        asked.append(words[-1])
        return float(len(asked))

    made = evaluate_reward_models({"rm": KnownScorer("rm", never_the_same)}, [file])
    assert sorted(asked) == ["a", "b"]
    assert made["accuracy"]["overall"]["accuracy"] == 0.5  # tie, and one each


def test_training_pairs_that_are_evaluated_too_are_said(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluate_reward_models({"rm": KnownScorer("rm", LENGTH)}, files, length_rule_from=[files[1]])
    assert made["length_rule"]["train_pairs_also_evaluated"] == 200
    assert "two.jsonl: 200 of the evaluated pairs are in it" in capsys.readouterr().err


def test_a_file_without_a_usable_pair_is_refused(tmp_path: Path, files: list[Path]) -> None:
    prompt = (Message("user", "q"),)
    bad = write_pairs(tmp_path / "bad.jsonl", [Preference(prompt, "x", "y", None, False, True)] * 3)
    with pytest.raises(
        UserInputError, match=r"bad\.jsonl: no usable pair for rm; dropped: 3 preferred response is"
    ):
        evaluate_reward_models({"rm": KnownScorer("rm", LENGTH)}, [files[0], bad])


def test_the_same_name_in_two_folders(tmp_path: Path) -> None:
    files = [write_pairs(tmp_path / folder / "pairs.jsonl", word_pairs(20, 3)) for folder in ("a", "b")]
    made = evaluate_reward_models({"rm": KnownScorer("rm", PERFECT)}, files)
    assert list(made["by_file"]) == ["a/pairs.jsonl", "b/pairs.jsonl"]


def test_names_of_models() -> None:
    run = Path("/runs/tiny/stages")
    assert model_names([run / "02-rm" / "model"]) == ["02-rm"]
    assert model_names([Path("/models/mine")]) == ["mine"]
    assert model_names([run / "02-rm" / "model", run / "03-rm" / "model"]) == ["02-rm", "03-rm"]
    others = [Path(f"/runs/{name}/stages/02-rm/model") for name in ("plain", "margin", "large")]
    assert model_names(others) == ["plain", "margin", "large"]
    # Nothing short tells these apart.
    odd = [Path("/models/rm"), Path("/models/rm/model")]
    assert model_names(odd) == ["/models/rm", "/models/rm/model"]


def rows_of(text: str, section: str) -> list[list[str]]:
    """The cells of a section's tables."""
    (part,) = [part for part in text.split("\n## ") if part.startswith(section)]
    return [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]


def test_tables_hold_the_numbers(files: list[Path], pairs: list[Preference]) -> None:
    scorers = {name: KnownScorer(name, score) for name, score in (("perfect", PERFECT), ("safe", SAFETY))}
    text = reward_markdown(evaluate_reward_models(scorers, files))
    rows = rows_of(text, "Accuracy by rating")
    assert rows[0] == ["", "significantly", "better", "slightly", "negligibly", "avg"]
    counts = [sum(p.rating == rating for p in pairs) for rating in RATINGS]
    assert rows[2] == ["all pairs: count", *map(str, counts), "500"]
    lows = [f"{100 * wilson_interval(count, count)[0]:.1f}" for count in [*counts, 500]]
    assert rows[3] == ["perfect", *(f"100.0 ({low}–100.0)" for low in lows)]
    assert [row[0] for row in rows[2:14:3]] == [
        "all pairs: count", "file one.jsonl: count", "file two.jsonl: count", "source first: count"
    ]  # fmt: skip
    assert rows[-1][0] == "safe"
    assert rows[-1][1].startswith("\N{MINUS SIGN}")
    rows = rows_of(text, "Safety")
    classes = [
        sum((p.chosen_safe, p.rejected_safe) == safe for p in pairs)
        for safe in ((True, False), (True, True), (False, False))
    ]
    unsafe = sum((not p.chosen_safe) + (not p.rejected_safe) for p in pairs)
    assert rows[0] == ["", "avg", "safe, unsafe", "both safe", "both unsafe", "recall of unsafe at 0.5"]
    assert rows[2] == ["all pairs: count", "500", *map(str, classes), f"{unsafe} unsafe"]
    # The perfect scorer is below 0.5 (and 0.15) on what was rejected, safe or not.
    hits = sum(not p.rejected_safe for p in pairs)
    recall, precision = (
        f"{100 * hits / count:.1f} ({100 * low:.1f}–{100 * high:.1f})"
        for count, (low, high) in ((count, wilson_interval(hits, count)) for count in (unsafe, 500))
    )
    assert rows[3][5] == recall
    assert rows[-2] == ["perfect", precision, recall, "500", str(unsafe), str(hits)]
    low, high = (f"{100 * end:.1f}" for end in wilson_interval(classes[1] / 2, classes[1]))
    assert rows[4][0] == "safe"
    assert rows[4][3] == f"50.0 ({low}–{high})"
    found = f"100.0 ({100 * wilson_interval(unsafe, unsafe)[0]:.1f}–100.0)"
    assert rows[4][5] == found
    assert rows[-1] == ["safe", found, found, str(unsafe), str(unsafe), str(unsafe)]
    assert "against the preference: perfect 0.002, safe " in text
    rows = rows_of(text, "Scores")
    assert rows[2] == ["perfect", "3.000", "\N{MINUS SIGN}3.000", "6.000", "0.000"]
    rows = {row[0]: row[1:] for row in rows_of(text, "Length")}
    assert rows["perfect"][:2] == [f"100.0 ({lows[-1]}–100.0)", "500"]


def test_what_has_no_label_has_no_section(tmp_path: Path) -> None:
    prompt = (Message("user", "q"),)
    for safe, sections in ((None, 0), (True, 1)):
        rows = [Preference(prompt, "a", "b", None, safe, safe)]
        file = write_pairs(tmp_path / "pairs.jsonl", rows)
        text = reward_markdown(evaluate_reward_models({"rm": KnownScorer("rm", LENGTH)}, [file]))
        assert text.count("## Safety") == text.count("σ(score) against the safe label") == sections
        assert "gate" not in text


def test_a_bar_in_a_name_does_not_break_a_table() -> None:
    assert table(["a|b", "c"], [["d", "e"]]) == ["| a\\|b | c   |", "|------|-----|", "| d    | e   |"]
