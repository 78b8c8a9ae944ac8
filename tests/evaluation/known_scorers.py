"""Reward models whose answers are known beforehand, over pairs of words; they go through the whole evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llama2_chat.chat_format import Segment
from llama2_chat.dialogue import RATINGS, Message, Preference
from llama2_chat.jsonl import write_rows
from llama2_chat.reward.scoring import RewardModel

END = 2


class WordFormat:
    """Every word is a token, every message ends with one more."""

    stop_id = END

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        return [
            Segment(
                [*(self.words.setdefault(w, 10 + len(self.words)) for w in m.content.split()), END],
                m.role == "assistant",
            )
            for m in messages
        ]


class KnownScorer(RewardModel):
    """Scores a dialogue's words by a given function instead of a network."""

    def __init__(self, name: str, score: Callable[[list[str]], float], *, max_tokens: int = 1000) -> None:
        self.name, self.max_tokens, self.chat_format = name, max_tokens, WordFormat()
        self._score = score

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Raw scores, float32 (B,)."""
        names = {number: word for word, number in self.chat_format.words.items()}
        return torch.tensor([self._score([names[token] for token in row if token != END]) for row in rows])


def word_pairs(rows: int, seed: int, *, source: str | None = None) -> list[Preference]:
    """Pairs of answers of 1 to 30 words; the preferred ones hold the word `good`, unsafe ones `bad`."""
    rng = random.Random(seed)
    pairs = []
    for number in range(rows):
        chosen, rejected = ([f"w{rng.randrange(1000)}" for _ in range(rng.randint(0, 29))] for _ in range(2))
        safe = rng.choice([(True, True), (True, False), (False, False)])
        answers = [
            " ".join([*words, *([] if ok else ["bad"])])
            for words, ok in zip(([*chosen, "good"], [*rejected, "other"]), safe, strict=True)
        ]
        prompt = (Message("user", f"question {seed} {number}"),)
        pairs.append(Preference(prompt, *answers, rng.choice(RATINGS), *safe, "safety", source))
    return pairs


def write_pairs(file: Path, pairs: Sequence[Preference]) -> Path:
    write_rows(file, (pair.to_row() for pair in pairs))
    return file
