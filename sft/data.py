"""Dialogues of one file → token sequences, with counts of everything that was done to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue
from llama2_chat.reductions import announce_reductions
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import LengthReport, LossPolicy, TokenizedDialogue, tokenize_dialogues


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """One file's dialogues as token sequences, each at most `max_tokens` long, and what is to be known of them."""

    file: str
    max_tokens: int
    sequences: list[TokenizedDialogue]
    lengths: LengthReport
    """What the length policy did to the file's dialogues."""
    safety: int
    """Dialogues that are safety demonstrations (`is_safety`)."""
    empty_contents: int
    """Dialogues in which a message is empty; an empty answer trains the token that ends it."""

    @property
    def untrained(self) -> int:
        """Sequences in which the loss policy selects nothing, such as dialogues that end with the user."""
        return sum(not any(sequence.loss_mask) for sequence in self.sequences)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss policy selects and that something comes before."""
        return sum(sum(sequence.loss_mask[1:]) for sequence in self.sequences)

    def to_row(self) -> dict[str, Any]:
        """As metrics; the file by its name alone, since its folder differs between machines."""
        return {
            "file": Path(self.file).name,
            "safety": self.safety,
            "empty_contents": self.empty_contents,
            "lengths": self.lengths.to_row(),
            "untrained": self.untrained,
            "trained_tokens": self.trained_tokens,
        }

    def announce(self, directory: StageDirectory) -> None:
        """Say which dialogues were shortened or dropped, or train nothing, and why."""
        limit = f"{self.max_tokens:,} tokens (training.sequence_length)"
        announce_reductions(
            directory,
            self.file,
            rows=self.lengths.total,
            what="dialogues",
            reasons={
                f"shortened: oldest turns left out to fit into {limit}": self.lengths.shortened,
                f"dropped: the last turn alone is longer than {limit}": self.lengths.dropped,
                "train nothing: no answer that the loss policy selects": self.untrained,
            },
        )


def encode_file(
    file: str,
    dialogues: Iterable[Dialogue],
    *,
    chat_format: ChatFormat,
    loss_policy: LossPolicy,
    max_tokens: int,
) -> EncodedFile:
    """The dialogues that `file` gave, tokenised and fitted to `max_tokens`."""
    used = list(dialogues)
    sequences, lengths = tokenize_dialogues(used, chat_format, loss_policy, max_tokens)
    return EncodedFile(
        file,
        max_tokens,
        sequences,
        lengths,
        safety=sum(dialogue.is_safety for dialogue in used),
        empty_contents=sum(
            not all(message.content.strip() for message in dialogue.messages) for dialogue in used
        ),
    )


def sequences_of(files: Sequence[EncodedFile]) -> list[TokenizedDialogue]:
    """The sequences of all files, file after file."""
    return list(chain.from_iterable(file.sequences for file in files))


def lengths_of(files: Sequence[EncodedFile]) -> dict[str, int]:
    """What the length policy did to all files together, as metrics."""
    return sum((file.lengths for file in files), LengthReport()).to_row()
