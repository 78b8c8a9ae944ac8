"""OpenAssistant's exported trees: one conversation tree a line; people ranked the replies to each question.

Ranks are an order, so two replies are rated by how many places lie between them. The kinds have units of their
own, since one tree gives many pairs, fewer questions and still fewer dialogues.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from llama2_chat.data_import import report as reasons
from llama2_chat.data_import.candidates import Candidate, Format, Turn, holds_chat_tag, pair_faults
from llama2_chat.data_import.report import Kind
from llama2_chat.dialogue import Rating, Role, Row
from llama2_chat.fields import check_choice, check_count, check_text, json_type, optional_flag, required

_EXPECTED = (
    "OpenAssistant's trees are JSONL, one tree a line: message_tree_id, tree_state and prompt, a message with "
    "message_id, role, text, review_result and replies"
)
_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
_RATINGS: dict[int, Rating] = {1: "slightly_better", 2: "better"}
_READY = "ready_for_export"


@dataclass(eq=False)
class _Message:
    """One message of a tree; `faults` are its own and those of every message above it."""

    id: str
    role: Role
    text: str
    rank: int | None
    by_model: bool
    parent: _Message | None
    faults: tuple[str, ...]
    replies: list[_Message] = field(default_factory=list)

    def turns(self) -> tuple[Turn, ...]:
        """From the tree's first message to this one."""
        turns: list[Turn] = []
        message: _Message | None = self
        while message is not None:
            turns.append((message.role, message.text))
            message = message.parent
        return tuple(reversed(turns))


def rating_of(ranks: tuple[int, int]) -> Rating:
    """The degree of preference between two ranks that differ: 1, 2, or more places apart."""
    return _RATINGS.get(abs(ranks[0] - ranks[1]), "significantly_better")


def _candidates(row: Row, kind: Kind) -> Iterable[Candidate]:
    try:
        messages = _messages(row)
    except ValueError as error:
        raise ValueError(f"{error}; {_EXPECTED}") from None
    if kind == "dialogues":
        return _dialogues(messages[0])
    prompts = [message for message in messages if message.role == "user"]
    if kind == "prompts":
        return (Candidate(message.faults, prompt=message.turns()) for message in prompts)
    return (_pair(*pair) for message in prompts for pair in combinations(message.replies, 2))


def _pair(first: _Message, second: _Message) -> Candidate:
    """Two replies to one question."""
    found = {
        **dict.fromkeys((*first.faults, *second.faults), True),
        reasons.IDENTICAL: pair_faults(first.text, second.text)[reasons.IDENTICAL],
        reasons.NO_RANK: first.rank is None or second.rank is None,
        reasons.EQUAL_RANKS: first.rank is not None and first.rank == second.rank,
    }
    faults = tuple(reason for reason, applies in found.items() if applies)
    if faults or first.rank is None or second.rank is None:
        return Candidate(faults)
    chosen, rejected = (first, second) if first.rank < second.rank else (second, first)
    return Candidate(
        prompt=first.turns()[:-1],
        chosen=chosen.text,
        rejected=rejected.text,
        rating=rating_of((first.rank, second.rank)),
    )


def _dialogues(root: _Message) -> Iterator[Candidate]:
    """Each way through the tree that takes the best reply to every question, to its last usable answer.

    At an answer the ways part: every question that follows it and was answered is followed.
    """
    if not root.replies:
        yield Candidate((*root.faults, reasons.UNANSWERED))
        return
    waiting = [_best_reply(root)]
    while waiting:
        answer, faults = waiting.pop()
        if faults:
            yield Candidate(faults)
            continue
        following = [_best_reply(question) for question in answer.replies if question.replies]
        usable = [(reply, faults) for reply, faults in following if not faults]
        yield from (Candidate(faults) for _, faults in following if faults)
        if not usable:
            yield Candidate(prompt=answer.turns()[:-1], chosen=answer.text, id=answer.id)
        waiting += reversed(usable)


def _best_reply(question: _Message) -> tuple[_Message, tuple[str, ...]]:
    """The best-ranked reply of those that can be imitated, and what speaks against it where none can.

    A single reply needs no rank.
    """
    usable = [reply for reply in question.replies if not _faults_of_answer(reply)] or question.replies
    ranked = [(reply.rank, reply) for reply in usable if reply.rank is not None]
    best = min(ranked, key=lambda item: item[0])[1] if ranked else usable[0]
    faults = _faults_of_answer(best)
    if not ranked and len(usable) > 1:
        faults = (*faults, reasons.NO_BEST_REPLY)
    return best, faults


def _faults_of_answer(reply: _Message) -> tuple[str, ...]:
    return (*reply.faults, reasons.WRITTEN_BY_A_MODEL) if reply.by_model else reply.faults


def _messages(row: Row) -> list[_Message]:
    """The messages of a tree, each before its replies, the replies to one message in the file's order."""
    state = check_text(required(row, "tree_state"), "tree_state")
    unfinished = () if state == _READY else (reasons.UNFINISHED_TREE,)
    found: list[_Message] = []
    waiting: list[tuple[Any, _Message | None]] = [(required(row, "prompt"), None)]
    # A stack of its own: a deep tree would exhaust Python's.
    while waiting:
        value, parent = waiting.pop()
        message = _message(value, parent, unfinished)
        found.append(message)
        if parent is not None:
            parent.replies.append(message)
        replies = value.get("replies") or []
        if not isinstance(replies, list):
            raise ValueError(f"message {message.id}: replies must be a list, found {json_type(replies)}")
        waiting += ((reply, message) for reply in reversed(replies))
    return found


def _message(value: Any, parent: _Message | None, unfinished: tuple[str, ...]) -> _Message:
    if not isinstance(value, dict):
        raise ValueError(f"a message must be a JSON object, found {json_type(value)}")
    identity = check_text(required(value, "message_id", "message."), "message_id")
    try:
        role = _ROLES[check_choice(required(value, "role"), "role", tuple(_ROLES))]
        text = check_text(required(value, "text"), "text")
        rank = value.get("rank")
        if rank is not None:
            check_count(rank, "rank")
        flags = {name: optional_flag(value, name) for name in ("deleted", "review_result", "synthetic")}
    except ValueError as error:
        raise ValueError(f"message {identity}: {error}") from None
    own = {
        reasons.ROLES_DO_NOT_ALTERNATE: role == (parent.role if parent else "assistant"),
        reasons.ANOTHER_PARENT: parent is not None and value.get("parent_id") not in (None, parent.id),
        reasons.DELETED: flags["deleted"] is True,
        reasons.NOT_ACCEPTED: flags["review_result"] is not True,
        reasons.EMPTY_PROMPT if role == "user" else reasons.EMPTY_ANSWER: not text.strip(),
        reasons.CHAT_TAG: holds_chat_tag(text),
    }
    faults = (
        *(parent.faults if parent else unfinished),
        *(reason for reason, applies in own.items() if applies),
    )
    return _Message(
        identity, role, text, rank, flags["synthetic"] is True, parent, tuple(dict.fromkeys(faults))
    )


OASST = Format(
    "oasst",
    _candidates,
    _EXPECTED,
    lambda _: "helpfulness",
    units={"preferences": "pairs", "dialogues": "dialogues", "prompts": "prompts"},
)
