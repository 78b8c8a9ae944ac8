"""Preference rows → token ids of both dialogues, with margin and safety labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Preference
from llama2_chat.jsonl import read_preferences
from llama2_chat.reductions import announce_reductions
from llama2_chat.reward.loss import rating_margins
from llama2_chat.reward.pooling import SEPARATE, RowLayout, pack_dialogues, tree_size, trees_of
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import fit_to_length, tokenize_dialogue

UNLABELLED = -1


@dataclass
class PairReport:
    """What became of the preference rows; each is counted once under `kept` or a reason to drop it."""

    kept: int = 0
    unrated: int = 0
    """Of the kept: those without a rating."""
    shortened: int = 0
    """Of the kept: those that lost their oldest turns, the same in both dialogues."""
    dropped: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: PairReport) -> PairReport:
        return PairReport(
            self.kept + other.kept,
            self.unrated + other.unrated,
            self.shortened + other.shortened,
            self.dropped + other.dropped,
        )

    def to_row(self) -> dict[str, Any]:
        """As metrics."""
        return {
            "kept": self.kept,
            "unrated": self.unrated,
            "shortened": self.shortened,
            "dropped": dict(sorted(self.dropped.items())),
        }


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """The usable pairs of one file with the token ids of (chosen, rejected) dialogue."""

    file: str
    max_tokens: int
    pairs: list[Preference]
    tokens: list[tuple[list[int], list[int]]]
    report: PairReport

    def to_row(self) -> dict[str, Any]:
        """The counts as metrics; the file by its name alone, since its folder differs between machines."""
        return {"file": Path(self.file).name, **self.report.to_row()}

    def announce(self, directory: StageDirectory) -> None:
        """Say which pairs were shortened or dropped and why."""
        limit = f"{self.max_tokens:,} tokens"
        announce_reductions(
            directory,
            self.file,
            rows=self.report.kept + self.report.dropped.total(),
            what="pairs",
            reasons={
                f"shortened: oldest turns left out to fit into {limit}": self.report.shortened,
                **{f"dropped: {reason}": count for reason, count in sorted(self.report.dropped.items())},
            },
        )


def prefers_unsafe(pair: Preference) -> bool:
    """Whether the preferred response is the unsafe one of a safe and an unsafe one (dropped in §3.2.1)."""
    return pair.chosen_safe is False and pair.rejected_safe is True


def encode_dialogue(
    prompt: Sequence[Message], answer: str, chat_format: ChatFormat, max_tokens: int
) -> list[int] | None:
    """Ids of prompt + answer, oldest turns dropped where too long; None where even that does not fit."""
    messages = (*prompt, Message("assistant", answer))
    ids = tokenize_dialogue(messages, chat_format, "last_answer").input_ids
    if len(ids) <= max_tokens:
        return ids
    fitted = fit_to_length(messages, chat_format, max_tokens)
    return None if fitted is None else tokenize_dialogue(fitted, chat_format, "last_answer").input_ids


def encode_pair(
    pair: Preference, chat_format: ChatFormat, max_tokens: int
) -> tuple[list[int], list[int], bool] | None:
    """Ids of the (chosen, rejected) dialogue with the same turns in both, and whether turns are left out.

    None where one cannot fit.
    """
    sides = [
        tokenize_dialogue((*pair.prompt, Message("assistant", answer)), chat_format, "last_answer").input_ids
        for answer in (pair.chosen, pair.rejected)
    ]
    longer = max((0, 1), key=lambda side: len(sides[side]))
    too_long = len(sides[longer]) > max_tokens
    if too_long:
        answers = (pair.chosen, pair.rejected)
        fitted = fit_to_length((*pair.prompt, Message("assistant", answers[longer])), chat_format, max_tokens)
        if fitted is None:
            return None
        sides = [
            tokenize_dialogue(
                (*fitted[:-1], Message("assistant", answer)), chat_format, "last_answer"
            ).input_ids
            for answer in answers
        ]
    return sides[0], sides[1], too_long


def encode_pairs(
    pairs: Iterable[Preference], chat_format: ChatFormat, max_tokens: int
) -> tuple[list[Preference], list[tuple[list[int], list[int]]], PairReport]:
    """The usable pairs with the token ids of (chosen, rejected) dialogue; both keep the same turns."""
    kept: list[Preference] = []
    tokens: list[tuple[list[int], list[int]]] = []
    report = PairReport()
    for pair in pairs:
        if prefers_unsafe(pair):
            report.dropped["preferred response is the unsafe one"] += 1
            continue
        encoded = encode_pair(pair, chat_format, max_tokens)
        if encoded is None:
            report.dropped[f"longer than {max_tokens} tokens"] += 1
            continue
        report.kept += 1
        chosen, rejected, shortened = encoded
        report.unrated += pair.rating is None
        report.shortened += shortened
        kept.append(pair)
        tokens.append((chosen, rejected))
    return kept, tokens, report


def read_pairs(files: Iterable[Path | str], chat_format: ChatFormat, max_tokens: int) -> list[EncodedPairs]:
    """Each file's usable pairs; raises UserInputError with file and line at the first bad row."""
    return [
        EncodedPairs(
            str(file), max_tokens, *encode_pairs(read_preferences(Path(file)), chat_format, max_tokens)
        )
        for file in files
    ]


def training_columns(
    pairs: Sequence[Preference],
    tokens: Sequence[tuple[list[int], list[int]]],
    *,
    margin_table: str | Mapping[str, float],
) -> dict[str, list[Any]]:
    """Columns of the training data set; a safety label is 1 (safe), 0 (unsafe) or -1 (none)."""

    def label(safe: bool | None) -> int:
        return UNLABELLED if safe is None else int(safe)

    return {
        "chosen_ids": [chosen for chosen, _ in tokens],
        "rejected_ids": [rejected for _, rejected in tokens],
        "margin": rating_margins([pair.rating for pair in pairs], table=margin_table).tolist(),
        "chosen_safe": [label(pair.chosen_safe) for pair in pairs],
        "rejected_safe": [label(pair.rejected_safe) for pair in pairs],
    }


def tokens_of(pairs: Sequence[tuple[list[int], list[int]]], layout: RowLayout) -> dict[str, int]:
    """How many tokens both dialogues of every pair have, and how many are `computed` where a pair shares its prompt."""
    return {
        "dialogues": sum(len(ids) for pair in pairs for ids in pair),
        "computed": sum(
            tree_size(tree, pair) for pair in pairs for tree in trees_of(pair, share=layout.share)
        ),
    }


def collate_pairs(
    rows: Sequence[Mapping[str, Any]], padding_id: int, layout: RowLayout = SEPARATE
) -> dict[str, torch.Tensor]:
    """B pairs as 2B packed dialogues, the chosen ones first.

    `margin` is float32 (B,), the `safe` labels int64 (2B,), also where a row has no rating or label.
    """
    packed = pack_dialogues(
        [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows], padding_id, layout
    )
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "rows": packed.rows,
        "ends": packed.ends,
        "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32),
        "safe": torch.tensor([row["chosen_safe"] for row in rows] + [row["rejected_safe"] for row in rows]),
    }
