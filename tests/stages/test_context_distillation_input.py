"""Context distillation: bad input ends in one message, before anything is sampled where that can be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import write_rows
from llama2_chat.safety import build
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.preprompt import with_preprompt


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_nothing_complete_is_the_users_mistake(distillation_config, settings, stage_at) -> None:
    config = distillation_config(sampling={"max_new_tokens": 1})
    with pytest.raises(UserInputError, match=r"none of the answers to 75 prompts .* raise sampling"):
        build.run_stage(config, settings, stage_at("distillation-cut"))


def test_a_prompt_too_long_for_the_context_is_passed_over_and_counted(
    distillation_config, settings, stage_at, tmp_path, capsys
) -> None:
    """A prompt that fits to the token is sampled, one token more is not; the others' answers stay the same."""
    config = distillation_config(preprompts=["Be good."], category_templates={})
    engine, chat_format = build.load_engine(config.policy, settings)
    room = engine.model.config.max_position_embeddings - config.sampling.max_new_tokens

    def size(words: int) -> int:
        asked = with_preprompt((Message("user", "a " * words + "?"),), "Be good.")
        return len(chat_format.prompt_ids(asked))

    words = room - size(1)
    words = max(count for count in range(1, words + 2) if size(count) <= room)
    assert size(words) <= room < size(words + 1)
    texts = ["Hi", "a " * words + "?", "a " * (words + 1) + "?"]
    rows = [{"prompt": [{"role": "user", "content": text}], "is_safety": True} for text in texts]
    write_rows(tmp_path / "prompts.jsonl", rows)
    directory = stage_at("distillation-long")
    changes = {"preprompts": ["Be good."], "category_templates": {}, "keep": "all"}
    files = {"prompts": [str(tmp_path / "prompts.jsonl")]}
    metrics = build.run_stage(distillation_config(**changes, **files), settings, directory)
    assert metrics["selection"]["too_long"] == 1
    assert [row["prompt"][0]["content"] for row in rows_of(directory.samples)] == texts[:2]
    assert "1 of 3 prompts are too long and are passed over" in capsys.readouterr().err
    write_rows(tmp_path / "prompts.jsonl", rows[2:])
    with pytest.raises(UserInputError, match=r"each of 1 prompts is too long: .*lower sampling.max_new"):
        build.run_stage(distillation_config(**changes, **files), settings, stage_at("distillation-longer"))


def test_a_format_without_system_messages_is_found_out_before_sampling(
    distillation_config, settings, stage_at, monkeypatch
) -> None:
    def refuse(chat_format, what: str) -> None:
        raise UserInputError(what)

    monkeypatch.setattr(build, "check_takes_system", refuse)
    directory = stage_at("no-system-distillation")
    with pytest.raises(UserInputError, match="the preprompt"):
        build.run_stage(distillation_config(), settings, directory)
    assert not directory.samples.exists()


@pytest.fixture
def config_file(distillation_config, file_of) -> Path:
    return file_of(distillation_config())


def test_no_adversarial_prompt_is_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "harmless.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}])
    override = f"prompts=[{tmp_path / 'harmless.jsonl'}]"
    command = ["context-distillation", str(config_file), override, "--output-dir", str(tmp_path / "out")]
    assert run_command(command) == 2
    assert "harmless.jsonl: none of 1 prompts is tagged is_safety: true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preprompts=['[INST] x']", "preprompts: the text holds the chat tag [INST]"),
        ("preprompts=[]", "preprompts"),
        ("preprompts=[' ']", "preprompts: a text is empty"),
        ("preprompts=['Be {adjective}.']", '"Be {adjective}." holds {adjective}; did you mean {adjectives}?'),
        ("adjectives=[]", "adjectives"),
        ("adjectives=[wise, calm, wise]", "adjectives: wise stands more than once"),
        ("adjectives=[wise, 'Wise ']", "adjectives: wise stands more than once"),
        (
            ["preprompts=['[{adjectives}]']", "adjectives=[INST]"],
            '"[{adjectives}]" with "INST" holds the chat tag',
        ),
        ("adjectives=['<<SYS>>']", "adjectives: the text holds the chat tag <<SYS>>"),
        ("category_templates={ilicit: x}", "category_templates"),
        ("category_templates={illicit: ''}", "category_templates: a text is empty"),
        ("keep=best", "keep"),
        ("min_rise=-0.1", "min_rise"),
        ("min_rise=.nan", "min_rise"),
    ],
)
def test_bad_settings_are_exit_code_2(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str | list[str],
    message: str,
) -> None:
    overrides = [override] if isinstance(override, str) else override
    command = ["context-distillation", str(config_file), *overrides, "--output-dir", str(tmp_path / "out")]
    assert run_command(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preprompts": ["Be good."], "adjectives": ["kind"]},
            "no template of preprompts holds {adjectives}",
        ),
        ({"keep": "all", "min_rise": 1.0}, "min_rise has no effect with keep: all"),
        (
            {"compare_preprompts": True, "category_templates": {}},
            "compare_preprompts needs category_templates",
        ),
    ],
)
def test_settings_that_would_have_no_effect(distillation_config, changes, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        distillation_config(**changes)


def test_a_fixed_preprompt_and_the_defaults_written_out_are_legal(distillation_config) -> None:
    config = distillation_config(preprompts=["Be good."])
    assert ContextDistillationConfig(**config.model_dump()) == config
