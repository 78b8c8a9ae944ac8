"""The `ghost_attention` stage: sample under an instruction, keep it in the first turn, train the last answer."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Row, messages_from_rows
from llama2_chat.errors import UserInputError
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.instructions import (
    draw_instruction,
    read_grouped_dialogues,
    read_instructions,
)
from llama2_chat.ghost_attention.sample import InstructedDialogue, sample_rows, training_messages
from llama2_chat.jsonl import read_rows, write_rows
from llama2_chat.model_card import model_card
from llama2_chat.settings import RunSettings
from llama2_chat.sft.made_data import fine_tune
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import tokenize_dialogue
from llama2_chat.tokenizers import load_tokenizer


def run_stage(
    config: GhostAttentionConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write `samples.jsonl`, `dataset.jsonl` and `model/`, the policy fine-tuned on them.

    Returns:
        Metrics of the selection and of the fine-tuning.
    """
    dialogues = instruct(config, settings.seed)
    if not directory.samples.exists():
        engine, chat_format = load_engine(config.policy, settings)
        write_samples(
            directory.samples,
            dialogues,
            lambda chunk: sample_rows(chunk, engine, chat_format, config, settings.seed),
            description=f"{directory.path.name}: sampling",
            unit="dialogues",
        )
    selection = _select(config, settings, directory)
    trained = fine_tune(
        config.policy,
        settings,
        directory,
        training=config.training,
        loss_policy=config.loss_policy,
        sft_dialogues=config.sft_dialogues,
        sft_fraction=config.sft_fraction,
        card=model_card("ghost_attention", config, settings),
    )
    return {"selection": selection, **trained}


def instruct(config: GhostAttentionConfig, seed: int) -> list[InstructedDialogue]:
    """Every dialogue with the instruction that it gets, a function of files, configuration and seed."""
    by_group = read_instructions(config.instructions)
    rng = Random(seed)
    return [
        InstructedDialogue(
            grouped.dialogue,
            draw_instruction(
                by_group,
                rng,
                about=grouped.group,
                max_instructions=config.max_instructions,
                short_fraction=config.short_fraction,
            ),
        )
        for grouped in read_grouped_dialogues(config.dialogues, list(by_group))
    ]


def _select(config: GhostAttentionConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Write the training dialogues; what cannot be trained on is counted by its status."""
    tokenizer = load_tokenizer(config.policy, settings.gguf_file_of(config.policy))
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    status: Counter[str] = Counter()
    kept: list[Row] = []
    made: list[Row] = []
    recomputed = shortened = 0
    for _, row in read_rows(directory.samples):
        recomputed += row["recomputed"]
        shortened += row["shortened"]
        messages = training_messages(row)
        tokens = tokenize_dialogue(messages_from_rows(messages, "messages"), chat_format, "last_answer")
        # Cut to the sequence length, a dialogue would lose its first turn and with it the instruction.
        fits = len(tokens.input_ids) <= config.training.sequence_length
        reason = row["status"] if fits or row["status"] != "complete" else "over_sequence_length"
        status[reason] += 1
        if reason == "complete":
            kept.append(row)
            source = f"ghost_attention:{row['source'] or 'not named'}"
            made.append({"messages": messages, "is_safety": row["is_safety"], "source": source})
    if not kept:
        raise UserInputError(
            f"none of {status.total()} sampled dialogues can be trained on ({dict(status)}); "
            "raise sampling.max_new_tokens (cut_off), lower it (too_long), lower sampling.temperature or raise "
            "training.sequence_length"
        )
    write_rows(directory.dataset, made)
    turns = Counter(sum(message["role"] == "user" for message in row["prompt"]) for row in kept)
    groups = Counter(group for row in kept for group in row["groups"])
    return {
        "dialogues": status.total(),
        "kept": len(kept),
        "status": dict(sorted(status.items())),
        "turns": {str(count): rows for count, rows in sorted(turns.items())},
        "mean_turns": sum(count * rows for count, rows in turns.items()) / len(kept),
        "short_instructions": sum(row["short"] for row in kept),
        "groups": dict(sorted(groups.items())),
        "recomputed_turns": recomputed,
        "shortened_turns": shortened,
    }
