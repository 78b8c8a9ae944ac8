"""PandaLM's human judgments: one JSON array; three annotators compare two models' answers to one instruction.

Their agreement is a degree of preference (Wang et al. 2023, arXiv 2306.05087, section on the test set). A row on
which their votes balance names no better answer, so it is dropped: which answer to call chosen would be made up,
and half of such rows would count as a reward model's mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama2_chat.data_import.candidates import Candidate, Format, holds_chat_tag, pair_faults
from llama2_chat.data_import.json_array import read_array
from llama2_chat.data_import.report import CHAT_TAG, EMPTY_PROMPT, NO_WINNER, Kind
from llama2_chat.dialogue import Rating, Row
from llama2_chat.fields import check_text, json_type, required

_TEXTS = ("instruction", "input", "response1", "response2")
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")
_EXPECTED = (
    f"PandaLM's human judgments are one JSON array of objects with {', '.join((*_TEXTS, *_ANNOTATORS))}"
)

_RATINGS: dict[tuple[int, int], Rating] = {
    (3, 0): "significantly_better",
    (2, 0): "better",
    (2, 1): "slightly_better",
    (1, 0): "negligibly_better",
}
"""By (votes for the preferred answer, votes for the other); the rest of the three votes are ties."""


def rating_of(votes: tuple[int, int, int]) -> tuple[int, Rating] | None:
    """The preferred answer (1 or 2) and the degree of preference; None where the votes balance."""
    preferred = 1 if votes.count(1) > votes.count(2) else 2
    rating = _RATINGS.get((votes.count(preferred), votes.count(3 - preferred)))
    return None if rating is None else (preferred, rating)


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    """One pair, whatever the kind: row n of one kind and row n of another come from the same judgment."""
    try:
        instruction, input_, *answers = (check_text(required(row, name), name) for name in _TEXTS)
        votes = (_vote(row, "annotator1"), _vote(row, "annotator2"), _vote(row, "annotator3"))
    except ValueError as error:
        raise ValueError(f"{error}; {_EXPECTED}") from None
    judged = rating_of(votes)
    prompt = "\n\n".join(part for text in (instruction, input_) if (part := text.strip()))
    found = {
        **pair_faults(*answers),
        EMPTY_PROMPT: not prompt,
        CHAT_TAG: holds_chat_tag(instruction, input_, *answers),
        NO_WINNER: judged is None,
    }
    faults = tuple(reason for reason, applies in found.items() if applies)
    if faults or judged is None:
        yield Candidate(faults)
        return
    preferred, rating = judged
    chosen, rejected = answers if preferred == 1 else reversed(answers)
    yield Candidate(prompt=(("user", prompt),), chosen=chosen, rejected=rejected, rating=rating)


def _vote(row: Row, name: str) -> int:
    vote = required(row, name)
    if isinstance(vote, bool) or not isinstance(vote, int) or vote not in (0, 1, 2):
        found = vote if isinstance(vote, int | float) and not isinstance(vote, bool) else json_type(vote)
        raise ValueError(f"{name} must be 0 (a tie), 1 or 2 (the better response), found {found}")
    return vote


PANDALM = Format("pandalm", _candidates, _EXPECTED, lambda _: "helpfulness", read=read_array, numbered="row")
