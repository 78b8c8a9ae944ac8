"""Ghost Attention: where the instruction stands, what is trained, and kills in the middle."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from llama2_chat.chat_format import build_chat_format
from llama2_chat.cli.main import run_command
from llama2_chat.files import sha256_of
from llama2_chat.generation import conversation, sample_file
from llama2_chat.ghost_attention import build
from llama2_chat.jsonl import read_dialogues, read_samples
from llama2_chat.sft import made_data
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer
from llama2_chat.training import StageCallback


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def users(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def test_the_instruction_stands_in_every_prompt_and_once_in_the_data(ghost, instructed_world) -> None:
    directory, _ = ghost
    originals = [
        row for row in rows_of(instructed_world / "dialogues.jsonl") if len(users(row["messages"])) > 1
    ]
    samples = rows_of(directory.samples)
    assert len(list(read_samples(directory.samples))) == len(samples) == len(originals) == 150
    for original, sample in zip(originals, samples, strict=True):
        expected = [f"{sample['instruction']} {text}" for text in users(original["messages"])]
        assert users(sample["prompt"]) == expected
    made = rows_of(directory.dataset)
    fit = [
        (original, sample)
        for original, sample in zip(originals, samples, strict=True)
        if sample["status"] == "complete"
    ]
    assert 40 < len(made) <= len(fit) < 150
    kept = [pair for pair in fit if pair[1]["response"] in {row["messages"][-1]["content"] for row in made}]
    turns = Counter()
    for row in made:
        original, sample = next(
            (o, s)
            for o, s in kept
            if s["response"] == row["messages"][-1]["content"]
            and users(row["messages"])[0] == users(s["prompt"])[0]
        )
        first, *rest = users(row["messages"])
        questions = users(original["messages"])
        assert [first, *rest] == [f"{sample['instruction']} {questions[0]}", *questions[1:]]
        systems = [m for m in original["messages"] if m["role"] == "system"]
        assert [m for m in row["messages"] if m["role"] == "system"] == systems
        turns[len(questions)] += 1
    assert sorted(turns) == [2, 3]


def test_the_model_is_asked_with_the_instruction_on_every_turn(
    ghost_config, instructed_world, settings, stage_at, sft, monkeypatch
) -> None:
    """Reads what is fed to the model itself."""
    tokenizer = load_tokenizer(str(sft[0].model))
    texts = []
    respond = conversation._respond

    def recording(engine, rows, *rest):
        texts.extend(tokenizer.decode(row.prompt) for row in rows)
        return respond(engine, rows, *rest)

    monkeypatch.setattr(conversation, "_respond", recording)
    training = {"max_steps": 1, "batch_size": 8, "sequence_length": 128}
    config = ghost_config(max_instructions=1, short_fraction=0.0, training=training)
    build.run_stage(config, settings, stage_at("ghost-spied"))
    originals = rows_of(instructed_world / "dialogues.jsonl")
    assert len(texts) == sum(len(users(row["messages"])) for row in originals) - 10  # 10 of one turn
    wordings = ("Act as ", "You enjoy old maps.", "Be brief.")
    for text in texts:
        asked = text.count("[INST]")
        assert max(text.count(wording) for wording in wordings) == asked
    assert max(text.count("[INST]") for text in texts) == 3


@pytest.fixture
def trained_on(ghost, ghost_config, settings, stage_at, monkeypatch):
    """A function that fine-tunes on the samples of `ghost` and gives the tokenised data and the folder."""

    def run(loss_policy: str) -> tuple[list, StageDirectory, dict]:
        directory = stage_at(f"ghost-{loss_policy}")
        shutil.copy(ghost[0].samples, directory.samples)
        seen = []
        train = made_data.train_sequences

        def recording(model, sequences, **options):
            seen.extend(sequences)
            return train(model, sequences, **options)

        monkeypatch.setattr(made_data, "train_sequences", recording)
        metrics = build.run_stage(
            ghost_config(loss_policy=loss_policy, sft_dialogues=[]), settings, directory
        )
        monkeypatch.undo()
        return seen, directory, metrics

    return run


def test_exactly_the_last_answer_is_trained(trained_on, settings, sft) -> None:
    sequences, directory, metrics = trained_on("last_answer")
    tokenizer = load_tokenizer(str(sft[0].model))
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    dialogues = list(read_dialogues(directory.dataset))
    for dialogue, sequence in zip(dialogues, sequences, strict=True):
        prompt = chat_format.prompt_ids(dialogue.messages[:-1])
        assert sequence.input_ids[: len(prompt)] == prompt
        assert sequence.loss_mask == [place >= len(prompt) for place in range(len(sequence.input_ids))]
        answer = sequence.input_ids[len(prompt) :]
        assert chat_format.decode_response(answer) == dialogue.messages[-1].content
        assert answer[-1] == tokenizer.eos_id
    assert any(len(dialogue.messages) >= 5 for dialogue in dialogues)
    assert metrics["trained_tokens"] == sum(sum(sequence.loss_mask) for sequence in sequences)


def test_the_control_differs_in_the_mask_alone(trained_on, ghost) -> None:
    """The control's dialogues against Ghost Attention's: the same ids, other trained tokens."""
    last, directory, metrics = trained_on("last_answer")
    every, control, control_metrics = trained_on("all_answers")
    assert control.dataset.read_bytes() == directory.dataset.read_bytes() == ghost[0].dataset.read_bytes()
    assert [sequence.input_ids for sequence in every] == [sequence.input_ids for sequence in last]
    assert control_metrics["selection"] == metrics["selection"]
    assert control_metrics["trained_tokens"] > metrics["trained_tokens"]
    assert sha256_of(control.model) != sha256_of(directory.model)
    more = [sum(a.loss_mask) > sum(b.loss_mask) for a, b in zip(every, last, strict=True)]
    assert all(more)


def test_metrics_count_what_the_files_hold(ghost) -> None:
    directory, metrics = ghost
    selection, samples, made = metrics["selection"], rows_of(directory.samples), rows_of(directory.dataset)
    assert selection["dialogues"] == sum(selection["status"].values()) == 150
    assert (selection["one_turn"], selection["followed"]) == (10, {})
    assert selection["kept"] == selection["status"]["complete"] == len(made)
    turns = Counter(str(len(users(row["messages"]))) for row in made)
    assert selection["turns"] == dict(turns)
    assert selection["mean_turns"] == pytest.approx(
        sum(int(turn) * count for turn, count in turns.items()) / len(made)
    )
    short = sum("Figure:" in users(r["messages"])[0] or "Hobby:" in users(r["messages"])[0] for r in made)
    assert selection["short_instructions"] == short
    assert selection["groups"]["hobby"] == sum("old maps" in users(row["messages"])[0] for row in made)
    assert selection["recomputed_turns"] == sum(row["recomputed"] for row in samples)
    assert metrics["sft_share"] == 0.5
    assert {row["source"] for row in made} == {"ghost_attention:handmade"}


def test_a_dialogue_longer_than_a_sequence_keeps_its_instruction(
    ghost, ghost_config, settings, stage_at, capfd
) -> None:
    """Its oldest turns go. SFT dialogues are shortened too, and that is said."""
    directory = stage_at("ghost-short-sequences")
    shutil.copy(ghost[0].samples, directory.samples)
    training = {"batch_size": 8, "epochs": 1, "sequence_length": 64, "max_steps": 1}
    metrics = build.run_stage(ghost_config(training=training), settings, directory)
    selection, before = metrics["selection"], ghost[1]["selection"]
    assert selection["shortened_dialogues"] > before["shortened_dialogues"] == 0
    assert selection["mean_turns"] < before["mean_turns"]
    assert metrics["lengths"] == {"kept": selection["kept"], "shortened": 0, "dropped": 0}
    instructions = {row["instruction"] for row in rows_of(directory.samples)}
    for row in rows_of(directory.dataset):
        first, *others = users(row["messages"])
        assert any(first.startswith(f"{text} What is") for text in instructions)
        assert all(text.startswith("What is") for text in others)
    (mixed_in,) = metrics["sft_mix"]
    lengths = mixed_in["lengths"]
    assert (mixed_in["file"], lengths) == ("demonstrations.jsonl", metrics["sft_lengths"])
    said = [line for line in capfd.readouterr().err.splitlines() if " dialogues " in line]
    assert [line.split(" dialogues ")[0] for line in said] == [
        f"ghost-short-sequences: demonstrations.jsonl: of {sum(lengths.values())}"
    ]
    assert lengths["shortened"] + lengths["dropped"] > 0


def test_original_history_samples_the_last_answer_only(ghost_config, settings, stage_at) -> None:
    directory = stage_at("ghost-original")
    build.run_stage(ghost_config(history="original"), settings, directory)
    made = rows_of(directory.dataset)
    answers = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in made]
    assert max(map(len, answers)) == 3
    assert {answer for row in answers for answer in row[:-1]} == {"It is a number."}
    for row in rows_of(directory.samples):
        assert all(text.startswith(row["instruction"] + " ") for text in users(row["prompt"]))


def test_killed_while_sampling_ends_with_the_same_bytes(
    ghost, ghost_config, settings, stage_at, dies_in_the_second_call
) -> None:
    directory = stage_at("ghost-killed-sampling")
    sampled = dies_in_the_second_call(build, "sample_rows")
    with pytest.raises(KeyboardInterrupt):
        build.run_stage(ghost_config(), settings, directory)
    partial = directory.samples.with_name("samples.jsonl.partial")
    assert len(partial.read_text().splitlines()) == sample_file.ITEMS_PER_CHUNK
    with partial.open("a") as stream:
        stream.write('{"prompt": [{"role": "us')  # what a kill in the middle of a write leaves
    build.run_stage(ghost_config(), settings, directory)
    assert len(sampled) == 3
    assert same_results(directory, ghost[0])


def test_killed_while_fine_tuning_ends_with_the_same_bytes(
    ghost, ghost_config, settings, stage_at, monkeypatch
) -> None:
    directory = stage_at("ghost-killed-training")
    step_end = StageCallback.on_step_end

    def dies_at_step_5(self, args, state, control, **rest):
        if state.global_step == 5:
            raise KeyboardInterrupt
        return step_end(self, args, state, control, **rest)

    monkeypatch.setattr(StageCallback, "on_step_end", dies_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        build.run_stage(ghost_config(), settings, directory)
    assert (directory.checkpoints / "checkpoint-3").is_dir()
    assert not directory.model.exists()
    monkeypatch.undo()
    assert build.run_stage(ghost_config(), settings, directory) == ghost[1]
    events = [json.loads(line) for line in directory.events.path.read_text().splitlines()]
    resumed = [event["resumed_from"] for event in events if event["event"] == "training_started"]
    assert resumed == [None, "checkpoint-3"]
    assert same_results(directory, ghost[0])


def same_results(one: StageDirectory, other: StageDirectory) -> bool:
    return all(
        sha256_of(getattr(one, name)) == sha256_of(getattr(other, name))
        for name in ("samples", "dataset", "metrics_file", "model")
    )


def test_the_users_command_gives_the_same_files(ghost_config, file_of, ghost, tmp_path: Path) -> None:
    config_file = file_of(ghost_config())
    assert run_command(["ghost-attention", str(config_file), "--output-dir", str(tmp_path / "out")]) == 0
    for name in ("samples.jsonl", "dataset.jsonl", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (ghost[0].path / name).read_bytes()
    done = json.loads((tmp_path / "out" / "done.json").read_text())
    assert done["metrics"] == ghost[1]
