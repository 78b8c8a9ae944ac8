"""Ghost Attention's rejection step, rows for every answer, and what no dialogue may lose."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.generation import conversation
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.ghost_attention import build
from llama2_chat.ghost_attention.checks import parse_check
from llama2_chat.ghost_attention.follow import Judged, OracleJudge, ProgramJudge, RewardJudge
from llama2_chat.ghost_attention.instructions import DrawnInstruction
from llama2_chat.ghost_attention.sample import InstructedDialogue, sample_rows
from llama2_chat.jsonl import read_dialogues, write_rows
from llama2_chat.tokenizers import load_tokenizer

ONE_STEP = {"max_steps": 1, "batch_size": 8, "sequence_length": 128}
LETTERS = '''
import json
from pathlib import Path


def letters(dialogues):
    """The share of e's in the answer, minus 0.1; what it is given is written down."""
    with Path(__file__).with_name("seen.jsonl").open("a") as stream:
        stream.writelines(json.dumps(dialogue) + "\\n" for dialogue in dialogues)
    answers = [dialogue[-1]["content"] for dialogue in dialogues]
    return [answer.count("e") / max(1, len(answer)) - 0.1 for answer in answers]
'''


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def users(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def judged(answer: str, **checks: str) -> Judged:
    messages = (Message("system", "Be kind."), Message("user", "Do. Hi?"), Message("assistant", "Do. A."))
    return Judged(
        (*messages, Message("user", "Do. You?")),
        answer,
        "Do.",
        ("case", "end", "free"),
        {group: [parse_check(spec) for spec in specs.split(",")] for group, specs in checks.items()},
    )


def test_programs_judge_each_group_by_all_of_its_checks() -> None:
    specs = {"case": "upper_case", "end": "ends_with:over,max_words:2"}
    answers = ("YES OVER", "YES, SIR, OVER", "yes over", "")
    verdicts = ProgramJudge().judge([judged(answer, **specs) for answer in answers])
    assert [dict(verdict.followed) for verdict in verdicts] == [
        {"case": True, "end": True},
        {"case": True, "end": False},
        {"case": False, "end": True},
        {"case": False, "end": False},
    ]
    assert dict(ProgramJudge().judge([judged("anything")])[0].followed) == {}


def test_a_reward_judges_all_groups_by_one_score() -> None:
    class Scores:
        def score_messages(self, dialogues):
            self.seen = dialogues
            return torch.tensor([0.25, -0.25])

    reward = Scores()
    verdicts = RewardJudge(reward, 0.25).judge([judged("A"), judged("B")])
    assert [dict(verdict.followed) for verdict in verdicts] == [
        dict.fromkeys(("case", "end", "free"), True),
        dict.fromkeys(("case", "end", "free"), False),
    ]
    assert [verdict.score for verdict in verdicts] == [0.25, -0.25]
    # The instruction stands on the last user message alone; an answer that begins like it is left as it is.
    assert [message.content for message in reward.seen[0]] == ["Be kind.", "Hi?", "Do. A.", "Do. You?", "A"]


@pytest.mark.parametrize(
    ("question", "answer", "followed"),
    [
        ("What is your hobby?", "My hobby is painting boats.", {"hobby": True}),
        ("What is your hobby?", "My hobby is old maps.", {"hobby": False}),
        ("What is 1 plus 2?", "The sum of 1 and 2 is 3.", {}),
    ],
)
def test_the_oracle_judges_what_the_question_asks_for(question: str, answer: str, followed: dict) -> None:
    messages = (Message("user", f"You enjoy painting boats. {question}"),)
    (verdict,) = OracleJudge().judge([Judged(messages, answer, "You enjoy painting boats.", ("hobby",), {})])
    assert dict(verdict.followed) == followed


@pytest.fixture
def letters(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "letter_rewards.py").write_text(LETTERS)
    return {"callable": "letter_rewards:letters", "folder": str(tmp_path)}


def test_what_does_not_follow_is_not_trained_on(
    ghost, ghost_config, settings, stage_at, letters, tmp_path
) -> None:
    """The samples of `ghost`, of which a custom reward takes some."""
    directory = stage_at("ghost-rejected")
    config = ghost_config(check="reward", check_reward=letters, check_threshold=-0.021, training=ONE_STEP)
    selection = build.run_stage(config, settings, directory)["selection"]
    kept, judged_rows, followed = [], Counter(), Counter()
    for row, before in zip(rows_of(directory.samples), rows_of(ghost[0].samples), strict=True):
        answer = row["response"]
        assert answer == before["response"]
        *earlier, last = row["answers"]
        assert all(one["followed"] is None for one in earlier)
        if last["status"] != "complete":
            assert last["followed"] is None
            continue
        follows = answer.count("e") / len(answer) - 0.1 >= -0.021
        assert last["followed"] == dict.fromkeys(row["groups"], follows)
        judged_rows.update(row["groups"])
        followed.update(row["groups"] * follows)
        kept += [answer] * (follows and row["status"] == "complete")
    assert [row["messages"][-1]["content"] for row in rows_of(directory.dataset)] == kept
    assert 5 < len(kept) == selection["kept"] < ghost[1]["selection"]["kept"] - 5
    assert selection["status"]["not_followed"] == ghost[1]["selection"]["kept"] - len(kept)
    assert selection["followed"] == {
        group: {"judged": count, "followed": followed[group], "share": followed[group] / count}
        for group, count in judged_rows.items()
    }
    seen = rows_of(tmp_path / "seen.jsonl")
    instructions = {row["instruction"] for row in rows_of(directory.samples)}
    assert len(seen) == sum(row["answers"][-1]["status"] == "complete" for row in rows_of(directory.samples))
    for dialogue in seen:
        *earlier, last = users(dialogue)
        assert all(text.startswith("What is") for text in earlier)
        assert any(last.startswith(f"{text} What is") for text in instructions)


def test_a_policy_that_never_follows_is_reported(
    ghost_config, file_of, letters, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(ghost_config(check="reward", check_reward=letters, check_threshold=9.0))
    assert run_command(["ghost-attention", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "none of 150 sampled dialogues can be trained on" in said
    assert "the policy does not follow its instructions, by check: reward (hobby 0 of " in said
    assert ", persona 0 of " in said
    assert "lower check_threshold" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "dataset.jsonl").exists()


def test_a_row_for_every_answer_of_a_resampled_dialogue(ghost, ghost_config, settings, stage_at) -> None:
    directory = stage_at("ghost-every")
    directory.samples.write_bytes(ghost[0].samples.read_bytes())
    config = ghost_config(rows_per_dialogue="every_answer", training=ONE_STEP)
    selection = build.run_stage(config, settings, directory)["selection"]
    expected = []
    for row in rows_of(directory.samples):
        whole = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        for place in [place for place, message in enumerate(whole) if message["role"] == "assistant"]:
            number = sum(message["role"] == "assistant" for message in whole[:place])
            if row["answers"][number]["status"] != "complete":
                break
            expected.append([users(whole)[0], *[m["content"] for m in whole[place - 1 : place + 1]][1:]])
    made = rows_of(directory.dataset)
    assert [[users(row["messages"])[0], row["messages"][-1]["content"]] for row in made] == expected
    assert selection["kept"] == len(made) > ghost[1]["selection"]["kept"]
    assert sum(selection["status"].values()) == sum(len(r["answers"]) for r in rows_of(directory.samples))
    assert min(selection["turns"]["1"], selection["turns"]["2"], selection["turns"]["3"]) > 0


def test_a_row_for_every_answer_after_the_original_history(
    ghost_config, instructed_world, settings, stage_at
) -> None:
    directory = stage_at("ghost-every-original")
    config = ghost_config(history="original", rows_per_dialogue="every_answer", training=ONE_STEP)
    selection = build.run_stage(config, settings, directory)["selection"]
    samples = rows_of(directory.samples)
    originals = [users(row["messages"]) for row in rows_of(instructed_world / "dialogues.jsonl")]
    expected = [
        questions[: turn + 1]
        for questions in originals
        if len(questions) > 1
        for turn in range(len(questions))
    ]
    # Each is asked under the same instruction as the rest of its dialogue, after the dialogue's own answers.
    found = [
        [text.removeprefix(row["instruction"] + " ") for text in users(row["prompt"])] for row in samples
    ]
    assert found == expected
    for before, row in pairwise(samples):
        if len(users(row["prompt"])) > 1:
            assert row["instruction"] == before["instruction"]
    answers = [m["content"] for row in samples for m in row["prompt"] if m["role"] == "assistant"]
    assert set(answers) == {"It is a number."}
    assert all(len(row["answers"]) == 1 for row in samples)
    assert selection["dialogues"] == len(samples) == sum(selection["status"].values())
    assert (
        len(list(read_dialogues(directory.dataset))) == selection["kept"] == selection["status"]["complete"]
    )


def test_in_a_full_context_the_oldest_turns_go_and_never_the_instruction(
    ghost_config, settings, sft, monkeypatch
) -> None:
    """The model's context is 256 tokens; 20 turns are more. Reads what is fed to the model itself."""
    tokenizer = load_tokenizer(str(sft[0].model))
    engine, chat_format = load_engine(str(sft[0].model), settings)
    prompts = []
    respond = conversation._respond

    def recording(engine, rows, *rest):
        prompts.extend((tokenizer.decode(row.prompt), len(row.questions)) for row in rows)
        return respond(engine, rows, *rest)

    monkeypatch.setattr(conversation, "_respond", recording)
    turns = [Message(role, "Hello there.") for _ in range(20) for role in ("user", "assistant")]
    dialogue = Dialogue((Message("system", "Be kind."), *turns))
    drawn = DrawnInstruction("Act as Captain Rex.", ("persona",), False)
    config = ghost_config(place="system")
    (row,) = sample_rows([InstructedDialogue(dialogue, drawn)], engine, chat_format, None, config, 1)
    assert len(prompts) == len(row["answers"]) == 20
    asked = [text.count("[INST]") for text, _ in prompts]
    assert row["shortened"] == sum(count < turn for turn, count in enumerate(asked, start=1)) > 5
    for text, _ in prompts:
        assert text.count("Act as Captain Rex. Hello there. [/INST]") == text.count("[INST]")
        assert text.count("Be kind.") == 1


@pytest.fixture
def command(ghost_config, file_of, tmp_path, capsys: pytest.CaptureFixture[str]):
    """A function that runs the stage as its user does, and gives the exit code and the message."""

    def run(*overrides: str, **changes) -> tuple[int, str]:
        arguments = [str(file_of(ghost_config(**changes))), *overrides]
        code = run_command(["ghost-attention", *arguments, "--output-dir", str(tmp_path / "out")])
        return code, capsys.readouterr().err

    return run


def test_dialogues_of_one_turn_alone(command, tmp_path) -> None:
    file = tmp_path / "short.jsonl"
    write_rows(file, [{"messages": [{"role": "user", "content": "Hi"}]}] * 3)
    code, said = command(f"dialogues=[{file}]")
    assert code == 2
    assert f"{file}: each of 3 dialogues has one turn alone, so no instruction could last" in said


def test_an_empty_file_of_instructions(command, tmp_path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n")
    code, said = command(f"instructions=[{file}]")
    assert (code, f"{file}: holds no rows" in said or f"{file}:1: holds no rows" in said) == (2, True)


def test_a_check_without_programs(command) -> None:
    code, said = command("check=instructions")
    assert code == 2
    assert (
        "check: instructions: no instruction has a program that checks it; add `check` to the rows of" in said
    )


def test_the_testbeds_check_on_other_dialogues(command, tmp_path) -> None:
    file = tmp_path / "others.jsonl"
    messages = [{"role": role, "content": "Hello!"} for role in ("user", "assistant", "user")]
    write_rows(file, [{"messages": messages}] * 20)
    code, said = command("check=testbed", f"dialogues=[{file}]")
    assert code == 2
    assert "check: testbed: the testbed has no question" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["check=reward"], "check_reward: belongs to check: reward"),
        (["check_reward={callable: 'a:b'}"], "check_reward: belongs to check: reward"),
        (["check=rewrd"], "check"),
        (["check=reward", "check_reward={callable: 'gone:f'}"], 'check_reward.callable: no module "gone"'),
        (["check=reward", "check_reward=gone"], "check_reward: no such"),
        (["place=system", "keep_instruction=every_turn"], "leave place out"),
        (["place=middle"], "place"),
        (["rows_per_dialogue=all"], "rows_per_dialogue"),
        (["check_threshold=.nan"], "check_threshold"),
        (["instructions=[]"], "instructions: nothing is to be kept"),
        (["instruction_lists={cat: {values: [Tom]}}"], "instruction_lists.cat"),
    ],
)  # fmt: skip
def test_bad_settings(command, overrides: list[str], message: str) -> None:
    code, said = command(*overrides)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_lists_without_programs(ghost_config) -> None:
    config = ghost_config(instructions=[], instruction_lists={"hobby": {}}, check="instructions")
    with pytest.raises(UserInputError, match="add `check` to the rows of instruction_lists"):
        build.instruct([], {}, config, 0)
