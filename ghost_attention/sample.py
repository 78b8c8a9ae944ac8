"""Sampling dialogues with the instruction on every user message, and what of them becomes training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue, Message, Row, messages_to_rows
from llama2_chat.generation.conversation import Conversation, SampledConversation, sample_conversations
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.instructions import DrawnInstruction


@dataclass(frozen=True, slots=True)
class InstructedDialogue:
    """A dialogue whose questions are to be answered under an instruction."""

    dialogue: Dialogue
    instruction: DrawnInstruction

    def conversation(self, history: str) -> Conversation:
        """What is sampled: all turns (`resampled`), or the last one after the dialogue's own (`original`)."""
        system = [message for message in self.dialogue.messages if message.role == "system"]
        questions = [
            f"{self.instruction.text} {message.content}"
            for message in self.dialogue.messages
            if message.role == "user"
        ]
        if history == "resampled":
            return Conversation(tuple(questions), tuple(system))
        answers = [message for message in self.dialogue.messages if message.role == "assistant"]
        turns = [
            message
            for question, answer in zip(
                questions[:-1], answers, strict=False
            )  # the last answer is no history
            for message in (Message("user", question), answer)
        ]
        return Conversation((questions[-1],), (*system, *turns))


def sample_rows(
    dialogues: Sequence[InstructedDialogue],
    engine: TransformersEngine,
    chat_format: ChatFormat,
    config: GhostAttentionConfig,
    seed: int,
) -> list[Row]:
    """One row of `samples.jsonl` for each dialogue: the samples format, with what was instructed."""
    conversations = [dialogue.conversation(config.history) for dialogue in dialogues]
    sampled = sample_conversations(engine, chat_format, conversations, sampling=config.sampling, seed=seed)
    return [
        _row(dialogue, conversation, result, config)
        for dialogue, conversation, result in zip(dialogues, conversations, sampled, strict=True)
    ]


def _row(
    instructed: InstructedDialogue,
    conversation: Conversation,
    sampled: SampledConversation,
    config: GhostAttentionConfig,
) -> Row:
    *earlier, last = sampled.answers
    prompt = list(conversation.history)
    for question, answer in zip(conversation.questions[:-1], earlier, strict=True):
        prompt += [Message("user", question), Message("assistant", answer.text)]
    prompt.append(Message("user", conversation.questions[-1]))
    unfit = [answer.status for answer in sampled.answers if answer.status != "complete"]
    return {
        "prompt": messages_to_rows(prompt),
        "response": last.text,
        "scores": None,
        "policy": Path(config.policy).parent.name,
        "iteration": 0,
        "temperature": config.sampling.temperature,
        "sample_index": 0,
        "is_safety": instructed.dialogue.is_safety,
        "status": unfit[0] if unfit else "complete",
        "instruction": instructed.instruction.text,
        "groups": list(instructed.instruction.groups),
        "short": instructed.instruction.is_short,
        "recomputed": sampled.recomputed,
        "shortened": sampled.shortened,
        "source": instructed.dialogue.source,
    }


def training_messages(row: Row) -> list[Row]:
    """The sampled dialogue with the instruction in its first user message only."""
    addition = f"{row['instruction']} "
    messages = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    return [
        {**message, "content": message["content"].removeprefix(addition)}
        if message["role"] == "user" and place > first
        else message
        for place, message in enumerate(messages)
    ]
