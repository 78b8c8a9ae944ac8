"""One iteration's batch: which prompts, one response to each, and the score that each response earns."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.errors import UserInputError
from llama2_chat.generation.answers import Answer, to_answer
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.jsonl import read_prompts
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt with its token ids."""

    prompt: Prompt
    ids: list[int]


def read_fitting_prompts(
    files: Iterable[str], chat_format: ChatFormat, *, max_new_tokens: int, context_length: int
) -> tuple[list[EncodedPrompt], int]:
    """The prompts that leave room for a whole response, and how many do not.

    Raises:
        UserInputError: none does.
    """
    files = list(files)
    prompts = [
        EncodedPrompt(prompt, chat_format.prompt_ids(prompt.messages))
        for prompt in chain.from_iterable(read_prompts(Path(file)) for file in files)
    ]
    room = context_length - max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not fitting:
        raise UserInputError(
            f"{', '.join(files)}: none of the {len(prompts)} prompts leaves room for {max_new_tokens} new tokens "
            f"in the policy's context of {context_length}; lower sampling.max_new_tokens or shorten the prompts"
        )
    return fitting, len(prompts) - len(fitting)


def prompt_order(count: int, *, batch_size: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts of an iteration (from 0): the next ones of endless shuffled epochs.

    A function of its arguments, so that a resumed run goes on where it stopped.
    """
    chosen: list[int] = []
    position = iteration * batch_size
    while len(chosen) < batch_size:
        epoch, start = divmod(position, count)
        order = list(range(count))
        random.Random(f"prompts:{seed}:{epoch}").shuffle(order)
        taken = order[start : start + batch_size - len(chosen)]
        chosen += taken
        position += len(taken)
    return chosen


def sample_batch(
    engine: GenerationEngine,
    chat_format: ChatFormat,
    prompts: Sequence[EncodedPrompt],
    *,
    sampling: SamplingConfig,
    iteration: int,
    seed: int,
    members: Sequence[int] | None = None,
) -> list[Answer]:
    """One answer to each prompt; equal prompts of a batch get answers of their own.

    The engine's samples are a function of seed and prompt, so each iteration, and each further occurrence
    of a prompt in it, has its own seed.

    Args:
        members: The prompts of the batch to answer, in this order; default: all.
    """
    wanted = range(len(prompts)) if members is None else members
    occurrences: Counter[tuple[int, ...]] = Counter()
    rounds: defaultdict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        key = tuple(prompt.ids)
        rounds[occurrences[key]].append(index)
        occurrences[key] += 1
    answers: dict[int, Answer] = {}
    chosen = frozenset(wanted)
    for number, together in rounds.items():
        asked = [index for index in together if index in chosen]
        if not asked:
            continue
        rows = engine.generate(
            [prompts[index].ids for index in asked],
            samples_per_prompt=1,
            sampling=sampling,
            seed=random.Random(f"sampling:{seed}:{iteration}:{number}").getrandbits(63),
        )
        answers.update(
            (index, to_answer(row[0], chat_format)) for index, row in zip(asked, rows, strict=True)
        )
    return [answers[index] for index in wanted]


def score_answers(
    scorer: RewardScorer, prompts: Sequence[EncodedPrompt], answers: Sequence[Answer]
) -> list[Score]:
    """The reward models' scores, read on the text as a user would see it."""
    return scorer.score(
        [
            (*encoded.prompt.messages, Message("assistant", answer.text))
            for encoded, answer in zip(prompts, answers, strict=True)
        ],
        [encoded.prompt.is_safety for encoded in prompts],
    )


def raw_combined(score: Score) -> float:
    """R_c before the sigmoid: the raw score of the branch that was taken."""
    if score.branch == "safety":
        assert score.safety is not None
        return score.safety
    return score.helpfulness


def scores_to_learn(scores: Sequence[Score], answers: Sequence[Answer], config: PpoConfig) -> Tensor:
    """Float32 (B,): raw combined scores, those of unfit answers replaced; to be whitened.

    A response that was cut off, is empty or holds a chat tag is no answer, whatever a reward model says of
    the part that it saw: by default it counts as the lowest complete answer of its batch (where none is
    complete, as the lowest of all).
    """
    raw = torch.tensor([raw_combined(score) for score in scores])
    complete = torch.tensor([answer.status == "complete" for answer in answers])
    if config.incomplete == "lowest":
        lowest = raw[complete].min() if bool(complete.any()) else raw.min()
        raw = torch.where(complete, raw, lowest)
    return raw
