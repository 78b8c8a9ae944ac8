"""What is wrong with the user's text or proportions: exit code 2, one message with the place, nothing half-written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llama2_chat.cli.main import run_command
from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.recipe import load_recipe

LINES = [json.dumps({"text": f"Document {number} of this file."}).encode() for number in range(50)]

Attempt = Callable[..., str]


@pytest.fixture
def attempt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Attempt:
    """Run `llama2-chat pretrain` on two sources, `good.jsonl` and another; returns the message of exit code 2."""
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(LINES) + b"\n")

    def run(second: str = "good.jsonl", **changes: object) -> str:
        config = {
            "text": ["good.jsonl", second],
            "architecture": {"hidden_size": 16, "layers": 1, "context_length": 64},
            "vocabulary_size": 300,
            "training": {"sequence_length": 64, "batch_size": 4},
            **changes,
        }
        (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config))
        arguments = ["pretrain", str(tmp_path / "pretrain.yaml"), "--output-dir", str(tmp_path / "out")]
        assert run_command(arguments) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert error.count("error: ") == 1
        written = {path.name for path in (tmp_path / "out").rglob("*")}
        # What says which configuration the folder belongs to may stay; text, tokenizer, model may not.
        assert written <= {"config.yaml", "started.json", "events.jsonl", ".lock"}
        return error

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "no text"}', '"text" must be a text; found None'),
        (b'{"text": null}', '"text" must be a text; found None'),
        (b'{"text": 3}', '"text" must be a text; found 3'),
        (b'{"text": ["a"]}', "\"text\" must be a text; found ['a']"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xE9 at column 14)"),
        (b'{"text": "half \\ud83d"}', "text holds half of a surrogate pair (U+D83D) at character 5"),
        (b'{"text": "a"', "not valid JSON"),
        (b'"a"', "a row must be a JSON object, found str"),
    ],
)
def test_bad_rows(attempt: Attempt, tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([*LINES, line, *LINES]) + b"\n")
    assert f"bad.jsonl:51: {message}" in attempt("bad.jsonl")


def test_a_truncated_gzip(attempt: Attempt, tmp_path: Path) -> None:
    packed = gzip.compress(b"\n".join(LINES) + b"\n")
    (tmp_path / "bad.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    error = attempt("bad.jsonl.gz")
    assert "bad.jsonl.gz:" in error
    assert "the gzip data ends too early" in error


@pytest.mark.parametrize("proportions", [None, [1.0, 0.0]])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b'{"text": ""}\n{"text": " \\n"}\n', "no document, all 2 texts are empty; give text or leave"),
    ],
)
def test_a_source_without_a_document(
    attempt: Attempt, tmp_path: Path, content: bytes, message: str, proportions: list[float] | None
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert f"bad.jsonl: {message}" in attempt("bad.jsonl", proportions=proportions)


def test_a_source_that_is_not_there(attempt: Attempt) -> None:
    assert "text: no such file: " in attempt("gone.jsonl")


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ([1.0], "1 proportions for 2 sources of text; give one for each"),
        ([0.5, -0.5], "every proportion is a number from 0, at least one above 0; found [0.5, -0.5]"),
        ([0.5, float("nan")], "proportions.1: Input should be a finite number (found nan)"),
        ([0, 0.0], "at least one above 0"),
        (["0.5", 0.5], "should be a valid number"),
        (0.5, "should be a valid list"),
    ],
)
def test_wrong_proportions(attempt: Attempt, proportions: object, message: str) -> None:
    error = attempt(proportions=proportions)
    assert "proportions" in error
    assert message in error


def test_text_that_is_neither_a_name_nor_a_list(attempt: Attempt) -> None:
    assert "  - text: " in attempt(text=3)
    assert "  - text: " in attempt(text=[])


def test_too_little_text_for_the_vocabulary(attempt: Attempt) -> None:
    assert "vocabulary_size: the text yields" in attempt(vocabulary_size=5000)


def test_a_recipe_says_which_source_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(LINES[0])
    recipe = {
        "name": "small",
        "base_model": "made",
        "data": {"books": "text.jsonl", "web": "text.jsonl"},
        "stages": {"made": {"kind": "pretrain", "text": ["web", "boks"], "proportions": [1]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert sorted(caught.value.problems) == [
        "stages.made.proportions: 1 proportions for 2 sources of text; give one for each",
        'stages.made.text: no data entry "boks" (did you mean "books"?); there are books, web',
    ]
