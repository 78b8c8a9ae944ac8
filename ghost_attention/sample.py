"""Sampling dialogues with the instruction on every user message, and judging the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue, Message, Row, messages_to_rows
from llama2_chat.generation.conversation import Conversation, SampledConversation, sample_conversations
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.follow import Judge, Judged, Verdict
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
        # The last answer is no history.
        turns = [
            message
            for question, answer in zip(questions[:-1], answers, strict=False)
            for message in (Message("user", question), answer)
        ]
        return Conversation((questions[-1],), (*system, *turns))


def sample_rows(
    dialogues: Sequence[InstructedDialogue],
    engine: TransformersEngine,
    chat_format: ChatFormat,
    judge: Judge | None,
    config: GhostAttentionConfig,
    seed: int,
) -> list[Row]:
    """One row of `samples.jsonl` for each dialogue: the samples format, with what was instructed and kept."""
    conversations = [dialogue.conversation(config.history) for dialogue in dialogues]
    sampled = sample_conversations(engine, chat_format, conversations, sampling=config.sampling, seed=seed)
    everyone = list(zip(dialogues, conversations, sampled, strict=True))
    verdicts = _verdicts(everyone, judge, config)
    return [
        _row(*whole, {turn: found for (row, turn), found in verdicts.items() if row == number}, config)
        for number, whole in enumerate(everyone)
    ]


def _verdicts(
    sampled: Sequence[tuple[InstructedDialogue, Conversation, SampledConversation]],
    judge: Judge | None,
    config: GhostAttentionConfig,
) -> dict[tuple[int, int], Verdict]:
    """By row and place among the sampled answers: of the complete ones that may be trained."""
    if judge is None:
        return {}
    last_alone = config.rows_per_dialogue == "last" and config.loss_policy == "last_answer"
    judged: dict[tuple[int, int], Judged] = {}
    for number, (instructed, conversation, result) in enumerate(sampled):
        drawn = instructed.instruction
        messages = list(conversation.history)
        for place, (question, answer) in enumerate(zip(conversation.questions, result.answers, strict=True)):
            messages.append(Message("user", question))
            trained = not last_alone or place == len(result.answers) - 1
            if trained and answer.status == "complete":
                judged[number, place] = Judged(
                    tuple(messages), answer.text, drawn.text, drawn.groups, drawn.checks
                )
            messages.append(Message("assistant", answer.text))
    return dict(zip(judged, judge.judge(list(judged.values())), strict=True))


def _row(
    instructed: InstructedDialogue,
    conversation: Conversation,
    sampled: SampledConversation,
    verdicts: dict[int, Verdict],
    config: GhostAttentionConfig,
) -> Row:
    *earlier, last = sampled.answers
    prompt = list(conversation.history)
    for question, answer in zip(conversation.questions[:-1], earlier, strict=True):
        prompt += [Message("user", question), Message("assistant", answer.text)]
    prompt.append(Message("user", conversation.questions[-1]))
    unfit = [answer.status for answer in sampled.answers if answer.status != "complete"]
    drawn = instructed.instruction
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
        "instruction": drawn.text,
        "groups": list(drawn.groups),
        "short": drawn.is_short,
        "checks": {group: [check.spec for check in checks] for group, checks in drawn.checks.items()},
        "answers": [
            _answer_row(answer.status, verdicts.get(place)) for place, answer in enumerate(sampled.answers)
        ],
        "recomputed": sampled.recomputed,
        "shortened": sampled.shortened,
        "source": instructed.dialogue.source,
    }


def _answer_row(status: str, verdict: Verdict | None) -> Row:
    row: Row = {"status": status, "followed": None if verdict is None else dict(verdict.followed)}
    return row if verdict is None or verdict.score is None else {**row, "score": verdict.score}
