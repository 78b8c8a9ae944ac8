"""From prompts as messages to answers as text, with what makes an answer unfit for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import CHAT_TAGS, Message
from llama2_chat.generation.engine import GenerationEngine, Response
from llama2_chat.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer.

    `text` ends before the first chat tag or control token. `status` says whether it may be trained on: only "complete"
    answers may; the others were cut off at the length limit, held a chat tag or a control token (such as one that
    begins another turn), are empty, or were not sampled at all because their question is too long for the context.
    """

    text: str
    status: Literal["complete", "cut_off", "chat_tag", "empty", "too_long"]
    response: Response


def to_answer(response: Response, chat_format: ChatFormat) -> Answer:
    """Decode a response; a chat tag or a control token in it ends it and is never obeyed."""
    control = chat_format.first_control(response.token_ids)
    text = chat_format.decode_response(response.token_ids[:control])
    places = [place for tag in CHAT_TAGS if (place := text.find(tag)) >= 0]
    if places or control is not None:
        return Answer(text[: min(places, default=None)].strip(), "chat_tag", response)
    if response.finish_reason == "length":
        return Answer(text, "cut_off", response)
    return Answer(text, "complete" if text else "empty", response)


def sample_answers(
    engine: GenerationEngine,
    chat_format: ChatFormat,
    prompts: Sequence[Sequence[Message]],
    *,
    samples_per_prompt: int,
    sampling: SamplingConfig,
    seed: int,
) -> list[list[Answer]]:
    """`samples_per_prompt` answers to each prompt (messages that end with the user's)."""
    responses = engine.generate(
        [chat_format.prompt_ids(messages) for messages in prompts],
        samples_per_prompt=samples_per_prompt,
        sampling=sampling,
        seed=seed,
    )
    return [[to_answer(response, chat_format) for response in row] for row in responses]
