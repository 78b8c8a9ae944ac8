"""Ghost Attention: bad input ends in one message, before anything is sampled where that can be known."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.errors import UserInputError
from llama2_chat.ghost_attention import build
from llama2_chat.jsonl import write_rows


def test_nothing_complete_is_the_users_mistake(ghost_config, settings, stage_at) -> None:
    config = ghost_config(sampling={"temperature": 1.0, "max_new_tokens": 1})
    with pytest.raises(UserInputError, match=r"none of 150 .*cut_off.* raise sampling.max_new_tokens$"):
        build.run_stage(config, settings, stage_at("ghost-cut"))


def test_an_instruction_longer_than_the_context_is_said_to_be(
    ghost_config, settings, stage_at, tmp_path
) -> None:
    write_rows(tmp_path / "long.jsonl", [{"instruction": "Be brief. " * 500}])
    write_rows(tmp_path / "talk.jsonl", [{"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]}])  # fmt: skip
    files = {"instructions": [str(tmp_path / "long.jsonl")], "dialogues": [str(tmp_path / "talk.jsonl")]}
    with pytest.raises(UserInputError, match=r"none of 1 .* too_long: .*shorten the instructions") as error:
        build.run_stage(ghost_config(**files), settings, stage_at("ghost-too-long"))
    assert "cut_off" not in str(error.value)


def test_a_format_without_system_messages_is_found_out_before_sampling(
    ghost_config, settings, stage_at, monkeypatch
) -> None:
    def refuse(chat_format, what: str) -> None:
        raise UserInputError(what)

    monkeypatch.setattr(build, "check_takes_system", refuse)
    directory = stage_at("no-system-ghost")
    with pytest.raises(UserInputError, match="place: system"):
        build.run_stage(ghost_config(place="system"), settings, directory)
    assert not directory.samples.exists()


@pytest.fixture
def config_file(ghost_config, file_of) -> Path:
    return file_of(ghost_config())


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        (
            "instructions",
            {"instuction": "Act."},
            'jsonl:2: field "instuction" unknown (did you mean "instruction"?)',
        ),
        (
            "instructions",
            {"instruction": "Act.", "chek": "one_line"},
            'jsonl:2: field "chek" unknown (did you',
        ),
        ("instructions", {"text": "Act."}, 'jsonl:2: "instruction" is missing; found text'),
        ("instructions", {"instruction": " "}, "jsonl:2: instruction is empty; write what is to be kept"),
        ("instructions", {"instruction": 5}, "jsonl:2: instruction must be a string, found a number"),
        ("instructions", {"instruction": "Act.", "short": "[INST]"}, "jsonl:2: short holds the chat tag"),
        ("instructions", {"instruction": "Act.", "group": ["a"]}, "jsonl:2: group must be a string"),
        (
            "dialogues",
            {"messages": [{"role": "user", "content": "Hi"}], "group": "personna"},
            'jsonl:2: group "personna" has no instruction (did you mean "persona"?); there are',
        ),
        ("dialogues", {"messages": []}, "jsonl:2: messages is empty"),
    ],
)
def test_bad_rows_are_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, row: dict, message: str
) -> None:
    good = {"instruction": "Act.", "group": "persona"}
    if file == "dialogues":
        good = {"messages": [{"role": "user", "content": "Hi"}]}
    write_rows(tmp_path / f"{file}.jsonl", [good, row])
    override = f"{file}=[{tmp_path / f'{file}.jsonl'}]"
    assert (
        run_command(["ghost-attention", str(config_file), override, "--output-dir", str(tmp_path / "out")])
        == 2
    )
    captured = capsys.readouterr().err
    assert f"{file}.{message}" in captured
    assert "Traceback" not in captured


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("short_fraction=1.5", "short_fraction"),
        ("loss_policy=first_answer", "loss_policy"),
        ("check_threshold=1.0", "  - check_threshold: has no effect with check: none; leave it out"),
        ("instructions=[gone.jsonl]", "instructions: no such file"),
    ],
)
def test_bad_settings_are_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert (
        run_command(["ghost-attention", str(config_file), override, "--output-dir", str(tmp_path / "out")])
        == 2
    )
    assert message in capsys.readouterr().err
