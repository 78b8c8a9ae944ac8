"""`llama2-chat data check | show | import`, as a user calls them: exit code, what is printed, what is written."""

from __future__ import annotations

import json
import re
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.data_check import check_file
from llama2_chat.jsonl import read_dialogues, write_rows

USER = {"role": "user", "content": "Once"}
ANSWER = {"role": "assistant", "content": "upon"}
EMPTY = {"role": "assistant", "content": " "}
SYSTEM = {"role": "system", "content": "a time"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_command(["data", *map(str, arguments)])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err


def pair(**fields: Any) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [ANSWER], "rejected": [EMPTY], **fields}


def test_check_counts_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        pair(rating="better", chosen_safe=True, rejected_safe=False, domain="safety", source="ours"),
        pair(rating="better", chosen_safe=True, rejected_safe=False, domain="safety", source="ours"),
        pair(rating="negligibly_better", rejected=[ANSWER], chosen_safe=False, rejected_safe=True),
        pair(prompt=[SYSTEM, USER, ANSWER, USER], ratings="better"),
    ]
    write_rows(file, rows)
    code, output, errors = run(capsys, "check", file, "--kind", "preferences")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "rows: 4",
        "user turns: 5",
        "rows with a system message: 1",
        "rows with an empty content: 3",
        "rows with identical answers: 1",
        "rows that prefer the unsafe answer (reward models are not trained on them): 1",
        "rating significantly_better: 0",
        "rating better: 2",
        "rating slightly_better: 0",
        "rating negligibly_better: 1",
        "rows without rating (margin 0): 1",
        "chosen not labelled, rejected not labelled: 1",
        "chosen safe, rejected unsafe: 2",
        "chosen unsafe, rejected safe: 1",
        "domain not named: 2",
        "domain safety: 2",
        "source not named: 2",
        "source ours: 2",
        'field "ratings" is not used (did you mean "rating"?): 1',
    ]


def test_check_warns_where_no_row_is_rated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", [pair(), pair()])
    code, output, _ = run(capsys, "check", tmp_path / "pairs.jsonl", "--kind", "preferences")
    assert code == 0
    assert "rows without rating (margin 0): 2\nwarning: no row has a rating, so a margin table" in output


def test_check_counts_dialogues_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl.gz"
    write_rows(file, [{"messages": [USER, ANSWER], "is_safety": True}, {"messages": [USER, ANSWER, USER]}])
    assert run(capsys, "check", file, "--kind", "dialogues") == (
        0,
        "rows: 2\nuser turns: 3\nrows with a system message: 0\nrows with an empty content: 0\n"
        "rows that end with the user: 1\nis_safety false: 1\nis_safety true: 1\nsource not named: 2\n",
        "",
    )
    write_rows(file, [{"prompt": [USER], "is_safety": True, "risk_category": "illicit"}])
    assert run(capsys, "check", file, "--kind", "prompts") == (
        0,
        "rows: 1\nuser turns: 1\nrows with a system message: 0\nrows with an empty content: 0\n"
        "is_safety true: 1\nrisk category illicit: 1\nsource not named: 1\n",
        "",
    )


def test_check_names_every_bad_row_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps(pair(rating="2")), "{", json.dumps(pair()), json.dumps({}), json.dumps([])]
    file.write_text("\n".join(lines))
    code, output, errors = run(capsys, "check", file, "--kind", "preferences", "--max-errors", 3)
    assert code == 2
    assert output.startswith("rows: 1\n")
    first, *problems, more = errors.splitlines()
    assert first == f"error: 4 rows of {file} cannot be used:"
    assert problems == [
        f'{file}:1: rating "2" unknown; one of significantly_better, better, slightly_better, '
        "negligibly_better",
        f"{file}:2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        f'{file}:4: "prompt" is missing; found no fields',
    ]
    assert more == "and 1 more; --max-errors shows more of them"
    summary = check_file(file, "preferences")
    assert (summary.rows, summary.unusable, len(summary.problems)) == (1, 4, 4)


@pytest.mark.parametrize("arguments", [("check", "--kind", "prompts"), ("show", "--tokenizer", "none")])
def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    file = tmp_path / "none.jsonl"
    code, output, errors = run(capsys, arguments[0], file, *arguments[1:])
    assert (code, output, errors) == (2, "", f"error: {file}: no such file; check the path\n")


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.jsonl"
    file.touch()
    for arguments in (["check", file, "--kind", "prompts"], ["show", file, "--tokenizer", "none"]):
        code, _, errors = run(capsys, *arguments)
        assert code == 2
        assert f"{file}: holds no rows; expected one JSON object a line" in errors


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["check", "x", "--kind", "pairs"], "'pairs' is not one of 'dialogues', 'preferences', 'prompts'"),
        (["check", "x"], "Missing option '--kind'"),
        (["show", "x", "--tokenizer", "t", "--loss-policy", "none"], "'none' is not one of 'all_answers'"),
        (["show", "x", "--tokenizer", "t", "--chat-format", "chatml"], "'chatml' is not one of 'llama2'"),
        (
            ["import", "alpaca", "x", "y", "--kind", "prompts"],
            "'alpaca' is not one of 'hh-rlhf', 'pandalm', 'oasst'",
        ),
        (["import", "oasst", "x", "y", "--kind", "prompts", "--split", "test"], "one of 'train', 'held_out'"),
        (["import", "hh-rlhf", "x", "y", "--kind", "prompts", "--domain", "safe"], "'safe' is not one of"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert problem in " ".join(errors.replace("│", " ").split())


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": [SYSTEM, USER]}]
    write_rows(tmp_path / "dialogues.jsonl", rows)
    return tmp_path / "dialogues.jsonl"


def shown(output: str) -> list[tuple[list[int], list[int]]]:
    rows = [json.loads(line) for line in output.splitlines()]
    assert all(row.keys() == {"input_ids", "loss_mask"} for row in rows)
    return [(row["input_ids"], row["loss_mask"]) for row in rows]


def test_show_as_json(dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer

    folder = data_folder / "stories260K"
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    question = [1, *raw.encode("[INST] Once [/INST]", add_special_tokens=False).ids]
    turn = [1, *raw.encode("[INST] Once [/INST] upon ", add_special_tokens=False).ids, 2]
    asked, answered = [0] * len(question), [1] * (len(turn) - len(question))
    system = "[INST] <<SYS>>\na time\n<</SYS>>\n\nOnce [/INST]"
    prompt = [1, *raw.encode(system, add_special_tokens=False).ids]

    code, output, _ = run(capsys, "show", dialogues, "--tokenizer", folder, "--json")
    assert code == 0
    assert shown(output) == [
        (turn + turn, (asked + answered) * 2),
        (prompt, [0] * len(prompt)),
    ]
    arguments = ("--tokenizer", folder, "--json", "--loss-policy", "last_answer", "--limit", 1)
    code, output, _ = run(capsys, "show", dialogues, *arguments)
    assert code == 0
    assert shown(output) == [(turn + turn, asked + [0] * len(answered) + asked + answered)]


def test_show_in_words(dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "show", dialogues, "--tokenizer", data_folder / "stories260K")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("dialogue 1: ")
    assert lines[0].endswith(" trained")
    # Without colours the trained tokens stand in brackets.
    assert lines[1] == "<s> [INST] Once [/INST]⟦ upon </s>⟧<s> [INST] Once [/INST]⟦ upon </s>⟧"
    assert lines[2].endswith(" tokens, 0 trained")
    assert lines[3:] == ["<s> [INST] <<SYS>>", "a time", "<</SYS>>", "", "Once [/INST]"]


def test_show_in_colour(
    dialogues: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("--tokenizer", data_folder / "stories260K", "--limit", 1)
    _, output, _ = run(capsys, "show", dialogues, *arguments)
    green = [part.split("\x1b[0m")[0] for part in output.split("\x1b[32m")[1:]]
    assert green == [" upon </s>", " upon </s>"]
    assert "⟦" not in output


def test_show_masks_real_dialogues(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HH-RLHF as `--json` and in words: what the mask selects, decoded by the bare tokenizer, is the answers."""
    from tokenizers import Tokenizer

    folder = data_folder / "stories260K"
    source, file = data_folder / "hh-rlhf" / "helpful-base.jsonl.gz", tmp_path / "helpful.jsonl"
    assert run(capsys, "import", "hh-rlhf", source, file, "--kind", "dialogues")[0] == 0
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    arguments = ("show", file, "--tokenizer", folder, "--limit", 25)
    code, output, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found = shown(output)
    dialogues = list(islice(read_dialogues(file), 25))
    assert len(found) == len(dialogues) == 25
    turns = 0
    for (ids, mask), dialogue in zip(found, dialogues, strict=True):
        tokens = zip(ids, mask, strict=True)
        runs = [(trained, [token for token, _ in run]) for trained, run in groupby(tokens, itemgetter(1))]
        assert [trained for trained, _ in runs] == [0, 1] * (len(dialogue.messages) // 2)
        for (trained, run_ids), message in zip(runs, dialogue.messages, strict=True):
            text = message.content if trained else f"[INST] {message.content} [/INST]"
            assert decode(run_ids).strip() == text
            assert run_ids[-1] == 2 if trained else run_ids[0] == 1
            assert (run_ids.count(1), run_ids.count(2)) == ((0, 1) if trained else (1, 0))
            turns += trained
    assert turns > 50
    _, words, _ = run(capsys, *arguments)
    heads = [
        line for line in words.splitlines() if re.fullmatch(r"dialogue \d+: \d+ tokens, \d+ trained", line)
    ]
    assert heads == [
        f"dialogue {number}: {len(ids)} tokens, {sum(mask)} trained"
        for number, (ids, mask) in enumerate(found, 1)
    ]
    assert words.count("⟦") == words.count("⟧") == turns


def test_show_needs_a_template_for_the_tokenizers_format(
    dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_folder / "stories260K"
    code, _, errors = run(capsys, "show", dialogues, "--tokenizer", folder, "--chat-format", "tokenizer")
    assert code == 2
    assert "has no chat template of its own; choose chat_format: llama2" in errors


@pytest.mark.parametrize("name", ["none", "/none/such", "../none"])
def test_show_without_a_tokenizer(dialogues: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, _, errors = run(capsys, "show", dialogues, "--tokenizer", name)
    assert (code, errors) == (2, f"error: {name}: no such model folder\n")
