"""Anthropic HH-RLHF: each row holds two texts, `chosen` and `rejected`, which share all but the last answer.

Turns begin with "\\n\\nHuman:" and "\\n\\nAssistant:". The set gives neither a degree of preference nor safety
labels, so preferences carry no rating and no labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llama2_chat.data_import.candidates import Candidate, Format, Turn, holds_chat_tag, pair_faults
from llama2_chat.data_import.report import CHAT_TAG, PROMPTS_DIFFER, ROLES_DO_NOT_ALTERNATE, Kind
from llama2_chat.dialogue import Domain, Role, Row

_EXPECTED = 'a row of HH-RLHF holds two texts, "chosen" and "rejected"'
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_DOMAINS: dict[str, Domain] = {"harmless": "safety", "helpful": "helpfulness"}


def split_turns(text: str) -> tuple[Turn, ...]:
    """The turns of an HH-RLHF text, contents stripped; whatever stands before the first turn is left out."""
    parts = _TURN.split(text)
    return tuple(
        (_ROLES[speaker], content.strip()) for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    """One pair, whatever the kind: row n of one kind and row n of another come from the same pair."""
    chosen, rejected = (_text_of(row, key) for key in ("chosen", "rejected"))
    if faults := _faults(chosen, rejected):
        yield Candidate(faults)
        return
    turns = split_turns(chosen)
    yield Candidate(prompt=turns[:-1], chosen=turns[-1][1], rejected=split_turns(rejected)[-1][1])


def _faults(chosen: str, rejected: str) -> tuple[str, ...]:
    """Every reason to drop a pair; none if it can be used."""
    (chosen_prompt, _, chosen_answer), (rejected_prompt, _, rejected_answer) = (
        text.rpartition(_ANSWER) for text in (chosen, rejected)
    )
    found = {
        **pair_faults(chosen_answer, rejected_answer),
        PROMPTS_DIFFER: chosen_prompt != rejected_prompt,
        ROLES_DO_NOT_ALTERNATE: not (_alternates(chosen) and _alternates(rejected)),
        CHAT_TAG: holds_chat_tag(chosen, rejected),
    }
    return tuple(reason for reason, applies in found.items() if applies)


def _alternates(text: str) -> bool:
    """Whether `text` is turns only, from a human's to an assistant's, strictly in turn."""
    before, *rest = _TURN.split(text)
    speakers = rest[::2]
    turns = len(speakers) // 2
    return not before.strip() and turns > 0 and speakers == ["Human", "Assistant"] * turns


def _domain_of(file: Path) -> Domain | None:
    """The domain that the published name of a set says: `harmless-base/train.jsonl.gz`."""
    for name in (file.name, file.absolute().parent.name):
        for word, domain in _DOMAINS.items():
            if word in name.lower():
                return domain
    return None


def _text_of(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = f"{key} is not a string" if key in row else f"{key} is missing"
        raise ValueError(f"{found}; {_EXPECTED}")
    return value


HH_RLHF = Format("hh-rlhf", _candidates, _EXPECTED, _domain_of)
