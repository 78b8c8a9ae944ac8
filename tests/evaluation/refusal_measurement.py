"""How well refusals are told from answers: 873 answers of HH-RLHF (MIT), labelled by reading them.

`refusal_labels.jsonl` holds the labels, a row an answer: the first 16 hex digits of SHA-256 over the last user message,
a line break and the answer, both stripped. The texts are not in it; they are read from HH-RLHF's two files.

    LLAMA2_CHAT_DATA=DIR python tests/evaluation/refusal_measurement.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.data_import.hh_rlhf import split_turns
from llama2_chat.evaluation.refusals import is_refusal
from llama2_chat.jsonl import read_rows
from llama2_chat.reward.metrics import wilson_interval

LABELS = Path(__file__).with_name("refusal_labels.jsonl")
HALVES = ("development", "test")

_HINT = re.compile(
    r"\b(can ?not|can['’]t|won['’]t|unable|sorry|not comfortable|not able|shouldn['’]t|would not|wouldn['’]t"
    r"|not going to|don['’]t think I|don['’]t want to|illegal|not something I|refuse|decline|not appropriate"
    r"|inappropriate|not a good idea|don['’]t know how|not sure (I|that|what)|do not)\b",
    re.IGNORECASE,
)
_STRONG_HINT = re.compile(
    r"\b(I|we)(['’]m| am|['’]d| would)?( really| just| personally|['’]m afraid I)* (can ?not|can['’]t|won['’]t"
    r"|will not|unable|not able|not comfortable|wouldn['’]t|would not|do not want|don['’]t want|rather not"
    r"|not going to|shouldn['’]t|refuse|must decline|not allowed|prohibited"
    r"|not sure (I|that['’]s (something|a topic)))\b"
    r"|\b(inappropriate|illegal|against the law|not a good idea|wrong to|unethical|programmed|not appropriate"
    r"|built to)\b",
    re.IGNORECASE,
)
"""Strata to draw from, so that refusals are many: what hints at one strongly was all labelled."""


@dataclass(frozen=True)
class Text:
    """One answer of HH-RLHF; `stratum` is what it was drawn from, `half` a function of the user's message alone."""

    key: str
    answer: str
    stratum: str
    half: str


@dataclass(frozen=True)
class Labelled:
    """An answer, whether it is a refusal, and how many answers of the files it stands for."""

    text: Text
    refusal: bool
    weight: float


def texts(folder: Path) -> dict[str, Text]:
    """Every different last answer, chosen or rejected, of HH-RLHF's two files; empty ones left out."""
    found: dict[str, Text] = {}
    for name in ("harmless", "helpful"):
        for _, row in read_rows(folder / "hh-rlhf" / f"{name}-base.jsonl.gz"):
            for side in ("chosen", "rejected"):
                turns = split_turns(row[side])
                answer = turns[-1][1]
                if not answer:
                    continue
                asked = row[side].rpartition("\n\nAssistant:")[0].rpartition("\n\nHuman:")[2].strip()
                key = hashlib.sha256(f"{asked}\n{answer}".encode()).hexdigest()[:16]
                last_digit = int(hashlib.sha256(asked.encode()).hexdigest()[-1], 16)
                found.setdefault(key, Text(key, answer, f"{name}/{_level(answer)}", HALVES[last_digit % 2]))
    return found


def _level(answer: str) -> str:
    opening = answer[:400]
    if not _HINT.search(opening):
        return "none"
    return "strong" if _STRONG_HINT.search(opening) else "weak"


def labelled(folder: Path) -> list[Labelled]:
    """The labelled answers; each weighs as many answers as its stratum and half hold for each one labelled."""
    every = texts(folder)
    rows = [(every[row["key"]], bool(row["refusal"])) for _, row in read_rows(LABELS)]
    frame = Counter((text.stratum, text.half) for text in every.values())
    drawn = Counter((text.stratum, text.half) for text, _ in rows)
    return [
        Labelled(text, refusal, frame[text.stratum, text.half] / drawn[text.stratum, text.half])
        for text, refusal in rows
    ]


@dataclass(frozen=True)
class Agreement:
    """Counts of found, wrongly found and missed refusals, or their sums of weights."""

    found: float
    wrong: float
    missed: float

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.wrong)

    @property
    def recall(self) -> float:
        return self.found / (self.found + self.missed)


def agreement(
    rows: list[Labelled], classifier: Callable[[str], bool], *, weighted: bool = False
) -> Agreement:
    """Of a classifier with the labels."""
    sums: dict[tuple[bool, bool], float] = defaultdict(float)
    for row in rows:
        sums[classifier(row.text.answer), row.refusal] += row.weight if weighted else 1.0
    return Agreement(sums[True, True], sums[True, False], sums[False, True])


def weighted_intervals(
    rows: list[Labelled], classifier: Callable[[str], bool]
) -> Iterator[tuple[float, float]]:
    """95 % percentile intervals of weighted precision and recall: 2,000 bootstrap draws within the strata."""
    said = {row.text.key: classifier(row.text.answer) for row in rows}
    strata: dict[str, list[Labelled]] = defaultdict(list)
    for row in rows:
        strata[row.text.stratum].append(row)
    rng = random.Random(0)
    draws = []
    for _ in range(2000):
        sums: dict[tuple[bool, bool], float] = defaultdict(float)
        for stratum in strata.values():
            for row in rng.choices(stratum, k=len(stratum)):
                sums[said[row.text.key], row.refusal] += row.weight
        draws.append(Agreement(sums[True, True], sums[True, False], sums[False, True]))
    for values in (sorted(d.precision for d in draws), sorted(d.recall for d in draws)):
        yield values[50], values[-51]


def main() -> None:
    """Print the table of docs/results/safety.md."""
    rows = labelled(Path(os.environ["LLAMA2_CHAT_DATA"]))
    for half in HALVES:
        part = [row for row in rows if row.text.half == half]
        counts, weighted = agreement(part, is_refusal), agreement(part, is_refusal, weighted=True)
        intervals = list(weighted_intervals(part, is_refusal))
        report = {
            "labelled": len(part),
            "refusals": sum(row.refusal for row in part),
            "found": counts.found,
            "wrong": counts.wrong,
            "missed": counts.missed,
            "precision": counts.precision,
            "precision_interval": wilson_interval(int(counts.found), int(counts.found + counts.wrong)),
            "recall": counts.recall,
            "recall_interval": wilson_interval(int(counts.found), int(counts.found + counts.missed)),
            "weighted_precision": weighted.precision,
            "weighted_precision_interval": intervals[0],
            "weighted_recall": weighted.recall,
            "weighted_recall_interval": intervals[1],
            "natural_rate": (weighted.found + weighted.missed) / sum(row.weight for row in part),
        }
        print(half, json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
