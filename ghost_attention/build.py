"""The `ghost_attention` stage: sample under an instruction, keep it in the first turn, train the last answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

from llama2_chat.chat_format import ChatFormat, build_chat_format, check_takes_system
from llama2_chat.errors import UserInputError
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.generation.transformers_engine import TransformersEngine, load_engine
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.follow import load_judge
from llama2_chat.ghost_attention.instructions import (
    GroupedDialogue,
    Instruction,
    draw_instruction,
    read_grouped_dialogues,
    read_instructions,
)
from llama2_chat.ghost_attention.lists import ask_lists, instruction_rows
from llama2_chat.ghost_attention.sample import InstructedDialogue, sample_rows
from llama2_chat.ghost_attention.selection import select
from llama2_chat.jsonl import write_rows
from llama2_chat.model_card import model_card
from llama2_chat.settings import RunSettings
from llama2_chat.sft.made_data import fine_tune
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer


def run_stage(
    config: GhostAttentionConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write `samples.jsonl`, `dataset.jsonl` and `model/`, the policy fine-tuned on them.

    Where instructions come from lists, `instructions.jsonl` holds them, and `asked.jsonl` what the policy was asked.

    Returns:
        Metrics of the selection and of the fine-tuning.
    """
    tokenizer = load_tokenizer(config.policy, settings.gguf_file_of(config.policy))
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    if config.place == "system":
        check_takes_system(chat_format, "place: system: the instruction")
    passed_over = _sample(config, settings, directory)
    selection = select(directory.samples, directory.dataset, config, chat_format)
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
    return {"selection": {"one_turn": passed_over, **selection}, **trained}


def _sample(config: GhostAttentionConfig, settings: RunSettings, directory: StageDirectory) -> int:
    """Write `samples.jsonl` if it is not there; returns how many dialogues have one turn alone."""
    by_group = read_instructions(config.instructions)
    groups = list(dict.fromkeys([*by_group, *config.instruction_lists]))
    dialogues = read_grouped_dialogues(config.dialogues, groups)
    lasting = [grouped for grouped in dialogues if grouped.turns > 1]
    if not lasting:
        raise UserInputError(
            f"{', '.join(config.dialogues)}: each of {len(dialogues)} dialogues has one turn alone, so no instruction "
            "could last in them; name dialogues of two turns or more"
        )
    if not directory.samples.exists():
        engine = cache(lambda: load_engine(config.policy, settings))
        for one in _listed(config, settings, directory, engine):
            by_group.setdefault(one.group, []).append(one)
        items = instruct(lasting, by_group, config, settings.seed)
        judge = load_judge(config, settings)
        write_samples(
            directory.samples,
            items,
            lambda chunk: sample_rows(chunk, *engine(), judge, config, settings.seed),
            description=f"{directory.path.name}: sampling",
            unit="dialogues",
        )
    return len(dialogues) - len(lasting)


def _listed(
    config: GhostAttentionConfig,
    settings: RunSettings,
    directory: StageDirectory,
    engine: Callable[[], tuple[TransformersEngine, ChatFormat]],
) -> list[Instruction]:
    """The instructions of the lists; the policy is asked for those that it is to make, unless it has been."""
    lists = config.instruction_lists
    if not lists:
        return []
    asks = any(spec.question is not None for spec in lists.values())
    if asks and not directory.asked.exists():
        policy, chat_format = engine()
        ask_lists(directory.asked, lists, policy, chat_format, sampling=config.sampling, seed=settings.seed)
    rows = instruction_rows(lists, directory.asked if asks else None)
    write_rows(directory.instructions, rows)
    return [Instruction.from_row(row) for row in rows]


def instruct(
    dialogues: Sequence[GroupedDialogue],
    by_group: Mapping[str, Sequence[Instruction]],
    config: GhostAttentionConfig,
    seed: int,
) -> list[InstructedDialogue]:
    """Every conversation that is sampled, with its instruction: a function of the arguments.

    After its own history each answer of a dialogue is sampled by itself, so with `every_answer` and `original` a
    dialogue stands for as many as it has turns, all under the same instruction.
    """
    if config.check == "instructions" and not any(one.checks for group in by_group.values() for one in group):
        raise UserInputError(
            "check: instructions: no instruction has a program that checks it; add `check` to the rows of "
            f"{', '.join(config.instructions) or 'instruction_lists'}, or choose another check"
        )
    rng = Random(seed)
    every = config.history == "original" and config.rows_per_dialogue == "every_answer"
    items = []
    for grouped in dialogues:
        drawn = draw_instruction(
            by_group,
            rng,
            about=grouped.group,
            max_instructions=config.max_instructions,
            short_fraction=config.short_fraction,
        )
        parts = grouped.cut_after_each_question() if every else [grouped.dialogue]
        items += [InstructedDialogue(dialogue, drawn) for dialogue in parts]
    return items
