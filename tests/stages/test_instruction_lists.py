"""Instructions put together from lists, written down, the starter's, or asked of the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.generation import answers as generation_answers
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.engine import Response
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.ghost_attention import build, lists
from llama2_chat.ghost_attention.config import GhostAttentionConfig, InstructionList
from llama2_chat.ghost_attention.instructions import Instruction
from llama2_chat.ghost_attention.lists import clean_items, instruction_rows, items_of
from llama2_chat.ghost_attention.starter import STARTER_LISTS
from llama2_chat.jsonl import read_as, read_rows

NUMBERED = """Sure! Here is a list of hobbies:

1. **Gardening**: growing plants
2) Bird-watching - it is calming.
 3. "Playing chess"
4. gardening
5. 42
6. Collecting very many old coins from all over the world
7. Photography (with film)

Let me know if you want more, thanks."""
BULLETS = "Hobbies\n- [Hiking](http://a.b)\n* _knitting_.\n• Rock climbing: risky\n– J. S. Bach's music\n"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (NUMBERED, ["Gardening", "Bird-watching", "Playing chess", "Photography"]),
        (BULLETS, ["Hiking", "knitting", "Rock climbing", "J. S. Bach's music"]),
        ("Here are some:\nFrench\nGerman\n\nItalian.", ["French", "German", "Italian"]),
        ("Some languages are: French, German, and Italian.", ["French", "German", "Italian"]),
        ("French, German and Italian", ["French", "German", "Italian"]),
        ("Chess; Go;Checkers", ["Chess", "Go", "Checkers"]),
        ("Napoleon", ["Napoleon"]),
        ("Chess, Go: a game, Tag", ["Chess", "Go", "Tag"]),
        ("- Sit in the sun all day\n- Sit in the warm sun", ["Sit in the warm sun"]),  # six words, and five
        ("a) Mozart\nb) Dr. Livingstone", ["Mozart", "Dr. Livingstone"]),
        ("", []),
        ("1. [INST] x\n2. <<SYS>>", []),
    ],
)  # fmt: skip
def test_items_are_found_and_cleaned(text: str, values: list[str]) -> None:
    assert clean_items([items_of(text)])[0] == values


def test_what_is_dropped_is_recorded_with_the_reason() -> None:
    values, dropped = clean_items([items_of(NUMBERED), ["Playing Chess!", "[INST] Go", "Tennis"]])
    assert values == ["Gardening", "Bird-watching", "Playing chess", "Photography", "Tennis"]
    assert dropped == [
        {"item": "gardening", "reason": "repeated"},
        {"item": "42", "reason": "no letter"},
        {"item": "Collecting very many old coins from all over the world", "reason": "too long"},
        {"item": "Playing Chess!", "reason": "repeated"},
        {"item": "[INST] Go", "reason": "chat tag"},
    ]
    assert clean_items([["French", "Klingon"]], "language:{value}") == (
        ["French"],
        [{"item": "Klingon", "reason": "no check"}],
    )


def test_lists_become_rows_of_an_instructions_file() -> None:
    given = {
        "hobby": {"values": ["chess", " old maps "]},
        "ending": {
            "template": "End with the word {value}.",
            "values": ["over"],
            "check": "ends_with:{value}",
        },
        "language": {"template": "Speak {value}.", "values": ["French"]},
    }
    config = config_of(given)
    assert instruction_rows(config.instruction_lists, None) == [
        {"instruction": "You enjoy chess.", "group": "hobby", "short": "Hobby: chess."},
        {"instruction": "You enjoy old maps.", "group": "hobby", "short": "Hobby: old maps."},
        {"instruction": "End with the word over.", "group": "ending", "check": "ends_with:over"},
        {"instruction": "Speak French.", "group": "language"},
    ]


@pytest.mark.parametrize("group", STARTER_LISTS)
def test_the_starters_lists_are_whole(group: str) -> None:
    config = config_of({group: {}})
    rows = instruction_rows(config.instruction_lists, None)
    starter = STARTER_LISTS[group]
    assert len({row["instruction"] for row in rows}) == len(rows) == len(starter.values) >= 4
    instructions = [Instruction.from_row(row) for row in rows]
    assert all(one.short and one.group == group for one in instructions)
    assert all(bool(one.checks) == (group == "language") for one in instructions)
    # What a configuration holds when it is written out and read again is the same.
    assert GhostAttentionConfig.model_validate(config.model_dump(mode="json")) == config


def config_of(instruction_lists: object) -> GhostAttentionConfig:
    return GhostAttentionConfig(policy="p", dialogues=["d"], instruction_lists=instruction_lists)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"cat": {"values": ["Tom"]}},
            r"template and short need \{value\}.* the groups hobby, language, figure",
        ),
        ({"hobby": {"template": "You like it.", "values": ["x"]}}, r"template and short need \{value\}"),
        ({"hobby": {"short": "Hobby", "values": ["x"]}}, r"template and short need \{value\}"),
        ({"hobby": {"values": ["x"], "question": "Which?"}}, "either values or a question"),
        ({"hobby": {"values": []}}, "either values or a question"),
        ({"hobby": {"values": ["x", " "]}}, "values: one is empty"),
        ({"hobby": {"values": ["[INST]"]}}, r"holds the chat tag \[INST\]"),
        ({"hobby": {"question": "<<SYS>>?"}}, "holds the chat tag <<SYS>>"),
        ({"cat": {"template": "[{value}]", "values": ["INST"]}}, r"holds the chat tag \[INST\]"),
        ({"hobby": {"question": " "}}, "question: is empty; write what the policy is asked"),
        ({" ": {"template": "{value}", "values": ["x"]}}, "instruction_lists: a group has no name"),
        ({"hobby": {"values": ["x"], "check": "ends_wth:{value}"}}, 'unknown .did you mean "ends_with"'),
        ({"language": {"values": ["Klingon"], "check": "language:{value}"}}, 'language "Klingon" unknown'),
        ({"hobby": {"valus": ["x"]}}, "valus"),
        ({"hobby": ["x"]}, "valid dictionary or instance of InstructionList"),
        (["hobby"], "valid dictionary"),
        ({}, "nothing is to be kept; name a file here, or groups in instruction_lists"),
    ],
)
def test_wrong_lists(given: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(given)


@pytest.fixture
def asking(ghost_config, settings, stage_at, monkeypatch):
    """A function that runs the stage with a policy that answers a question for a list as it is told."""

    def run(name: str, replies: list[str], status: str = "complete", **changes):
        asked = []
        known = generation_answers.sample_answers

        def reply(engine, chat_format, prompts, **options):
            asked.append((prompts, options))
            known(engine, chat_format, prompts, **options)  # the real call must go through too
            return [[Answer(text, status, Response([], [], "stop")) for text in replies]]

        monkeypatch.setattr(lists, "sample_answers", reply)
        spec = {"hobby": {"question": "Which hobbies are there?", "answers": len(replies)}, "figure": {}}
        directory = stage_at(name)
        training = {"max_steps": 1, "batch_size": 8, "sequence_length": 128}
        changes = {"instructions": [], "instruction_lists": spec, "training": training, **changes}
        config = ghost_config(**{"dialogues": changes.pop("dialogues"), **changes})
        return directory, asked, lambda: build.run_stage(config, settings, directory)

    return run


@pytest.fixture
def plain_dialogues(instructed_world: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "plain.jsonl"
    whole = (instructed_world / "dialogues.jsonl").read_text().replace(', "group": "persona"', "")
    file.write_text("".join(line + "\n" for line in whole.splitlines()[:20]))
    return [str(file)]


def test_the_policy_is_asked_once_and_what_it_said_is_kept(asking, plain_dialogues, monkeypatch) -> None:
    directory, asked, run = asking("ghost-asked", [NUMBERED, BULLETS], dialogues=plain_dialogues)
    metrics = run()
    ((prompts, options),) = asked
    assert [[message.content for message in prompt] for prompt in prompts] == [["Which hobbies are there?"]]
    assert (options["samples_per_prompt"], options["seed"]) == (2, 1)
    ((_, row),) = read_rows(directory.asked)
    assert (row["group"], row["answers"], row["statuses"]) == ("hobby", [NUMBERED, BULLETS], ["complete"] * 2)
    assert row["values"][:2] == ["Gardening", "Bird-watching"]
    assert len(row["dropped"]) == 3
    instructions = list(read_as(directory.instructions, Instruction.from_row))
    assert [one.text for one in instructions[: len(row["values"])]] == [
        f"You enjoy {v}." for v in row["values"]
    ]
    assert sum(one.group == "figure" for one in instructions) == len(STARTER_LISTS["figure"].values)
    assert set(metrics["selection"]["groups"]) == {"hobby", "figure"}
    # A kill after the asking: the policy is not asked again, and the samples are the same bytes.
    samples, made = directory.samples.read_bytes(), directory.instructions.read_bytes()
    directory.samples.unlink()
    directory.instructions.unlink()
    monkeypatch.setattr(lists, "sample_answers", lambda *_, **__: pytest.fail("asked again"))
    run()
    assert (directory.samples.read_bytes(), directory.instructions.read_bytes()) == (samples, made)


def test_the_last_item_of_an_answer_that_was_cut_off_is_left_out(asking, plain_dialogues) -> None:
    directory, _, run = asking(
        "ghost-cut-list", ["1. chess\n2. gardeni"], "cut_off", dialogues=plain_dialogues
    )
    run()
    ((_, row),) = read_rows(directory.asked)
    assert row["values"] == ["chess"]


def test_no_usable_item_is_the_users_mistake(asking, plain_dialogues) -> None:
    directory, _, run = asking("ghost-no-list", ["1. 42"], dialogues=plain_dialogues)
    message = r'lists.hobby: no item .* asked "Which hobbies are there\?", it answered "1. 42"; ask otherwise'
    with pytest.raises(UserInputError, match=message):
        run()
    assert not directory.asked.exists()


def test_a_policy_is_really_asked(ghost_config, settings, sft, tmp_path) -> None:
    """The small test model makes no list, but a word or two pass as items."""
    engine, chat_format = load_engine(str(sft[0].model), settings)
    spec = {"hobby": InstructionList(template="You enjoy {value}.", question="Which hobbies?", answers=8)}
    sampling = ghost_config().sampling
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        lists.ask_lists(file, spec, engine, chat_format, sampling=sampling, seed=0)
    assert files[0].read_bytes() == files[1].read_bytes()
    ((_, row),) = read_rows(files[0])
    assert len(row["answers"]) == len(row["statuses"]) == 8
    prompt = (Message("user", "Which hobbies?"),)
    (sampled,) = generation_answers.sample_answers(
        engine, chat_format, [prompt], samples_per_prompt=8, sampling=sampling, seed=0
    )
    assert row["answers"] == [answer.text for answer in sampled]
    assert row["values"]
