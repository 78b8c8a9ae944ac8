"""Which of the sampled dialogues become training data, with counts of what does not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Row, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.training_rows import training_rows
from llama2_chat.jsonl import read_rows, write_rows

_REMEDIES = {
    "cut_off": "cut_off: raise sampling.max_new_tokens",
    "empty": "empty: lower sampling.temperature",
    "chat_tag": "chat_tag: lower sampling.temperature",
    "too_long": "too_long: a question with its instruction leaves no room for sampling.max_new_tokens in the policy's "
    "context, so shorten the instructions or lower that",
    "over_sequence_length": "over_sequence_length: raise training.sequence_length",
}
"""What can be done about answers that cannot be trained on, by their status."""


@dataclass
class _Counts:
    """What was seen on the way through `samples.jsonl`."""

    dialogues: int = 0
    status: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    short: int = 0
    recomputed: int = 0
    shortened_turns: int = 0
    shortened_dialogues: int = 0
    judged: Counter[str] = field(default_factory=Counter)
    followed: Counter[str] = field(default_factory=Counter)

    def metrics(self) -> dict[str, Any]:
        """As they are recorded."""
        kept = self.status["complete"]
        return {
            "dialogues": self.dialogues,
            "kept": kept,
            "status": dict(sorted(self.status.items())),
            "followed": self.follow_rates(),
            "turns": {str(count): rows for count, rows in sorted(self.turns.items())},
            "mean_turns": sum(count * rows for count, rows in self.turns.items()) / max(1, kept),
            "short_instructions": self.short,
            "groups": dict(sorted(self.groups.items())),
            "recomputed_turns": self.recomputed,
            "shortened_turns": self.shortened_turns,
            "shortened_dialogues": self.shortened_dialogues,
        }

    def follow_rates(self) -> dict[str, dict[str, Any]]:
        """By group of instructions: answers that were judged, and how many of them follow."""
        return {
            group: {"judged": count, "followed": self.followed[group], "share": self.followed[group] / count}
            for group, count in sorted(self.judged.items())
        }


def select(
    samples: Path, dataset: Path, config: GhostAttentionConfig, chat_format: ChatFormat
) -> dict[str, Any]:
    """Write the training dialogues; returns the counts.

    Raises:
        UserInputError: there is nothing to train on.
    """
    counts = _Counts()
    made = list(_made_rows(samples, config, chat_format, counts))
    if not made:
        raise UserInputError(_nothing_left(counts, config))
    write_rows(dataset, made)
    return counts.metrics()


def _made_rows(
    samples: Path, config: GhostAttentionConfig, chat_format: ChatFormat, counts: _Counts
) -> Iterator[Row]:
    for _, row in read_rows(samples):
        counts.dialogues += 1
        counts.recomputed += row["recomputed"]
        counts.shortened_turns += row["shortened"]
        for answer in row["answers"]:
            for group, followed in (answer["followed"] or {}).items():
                counts.judged[group] += 1
                counts.followed[group] += followed
        for made in training_rows(row, config, chat_format):
            counts.status[made.status] += 1
            if made.status != "complete":
                continue
            counts.shortened_dialogues += made.is_shortened
            counts.turns[sum(message.role == "user" for message in made.messages)] += 1
            counts.groups.update(row["groups"])
            counts.short += row["short"]
            yield {
                "messages": messages_to_rows(made.messages),
                "is_safety": row["is_safety"],
                "source": f"ghost_attention:{row['source'] or 'not named'}",
            }


def _nothing_left(counts: _Counts, config: GhostAttentionConfig) -> str:
    rows = counts.status.total()
    found = f"none of {rows} sampled dialogues can be trained on ({dict(counts.status)})"
    if not counts.status["not_followed"]:
        return f"{found}; {'; '.join(_REMEDIES[status] for status in sorted(counts.status))}"
    rates = ", ".join(
        f"{group} {rate['followed']} of {rate['judged']}" for group, rate in counts.follow_rates().items()
    )
    threshold = ", lower check_threshold" if config.check == "reward" else ""
    return (
        f"{found}: the policy does not follow its instructions, by check: {config.check} ({rates}); choose "
        f"instructions that it follows at least sometimes{threshold}, lower sampling.temperature or max_instructions, "
        "train the policy on them first, or set check: none"
    )
