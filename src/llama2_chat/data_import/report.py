"""What an import did: how much was read, how much is usable, and why the rest was dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llama2_chat.dialogue import Domain

Kind = Literal["dialogues", "preferences", "prompts"]
"""What a file of rows holds, and what an importer can make."""

Label = Literal["safe", "unsafe"]
"""What a labelled set says of a prompt or of an answer."""

Split = Literal["train", "held_out"]
"""The two parts of a file that share no first user message."""

KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS: tuple[Label, ...] = get_args(Label)
SPLITS: tuple[Split, ...] = get_args(Split)

IDENTICAL = "chosen and rejected are identical"
PROMPTS_DIFFER = "the prompts of chosen and rejected differ"
EMPTY_ANSWER = "an empty last answer"
EMPTY_PROMPT = "an empty prompt"
ROLES_DO_NOT_ALTERNATE = "roles do not alternate from a user to an assistant turn"
CHAT_TAG = "a chat tag in the text"
NO_WINNER = "the annotators prefer neither answer"
NO_RANK = "a reply has no rank"
EQUAL_RANKS = "both replies have the same rank"
NO_BEST_REPLY = "several replies and no rank says which is best"
UNANSWERED = "a question without an answer"
UNFINISHED_TREE = "a tree that is not ready for export"
DELETED = "a deleted message"
NOT_ACCEPTED = "a message that reviewers did not accept"
WRITTEN_BY_A_MODEL = "an answer that a model wrote"
ANOTHER_LABEL = "another label than the one asked for"
ANOTHER_PARENT = "a reply to another message than it stands under"


@dataclass
class ImportReport:
    """What an import did so far.

    `dropped` counts every reason found; a row that is odd in several ways counts under each of them, so the
    number of rows dropped is `read - imported`. Where a part of the file was asked for, `imported` counts the
    usable rows of both parts and `in_split` those of the part.
    """

    read: int = 0
    imported: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    domain: Domain | None = None
    unit: str = "rows"
    """What `read` and `imported` count, in the plural."""
    label: Label | None = None
    """Only rows with this label are usable."""
    split: Split | None = None
    held_out_share: float | None = None
    in_split: int = 0

    def to_row(self) -> dict[str, Any]:
        """As JSON; label and split only where there are any."""
        row: dict[str, Any] = {
            "read": self.read,
            "imported": self.imported,
            "domain": self.domain,
            "dropped": dict(sorted(self.dropped.items())),
        }
        if self.label is not None:
            row["label"] = self.label
        if self.split is not None:
            row |= {
                "split": self.split,
                "held_out_share": self.held_out_share,
                "in_split": self.in_split,
            }
        return row

    def __str__(self) -> str:
        domain = f" as {self.domain} data" if self.domain else ""
        domain += f" labelled {self.label}" if self.label else ""
        kept = "imported" if self.split is None else "usable"
        summary = (
            f"{self.read} {self.unit} read, {self.imported} {kept}{domain}, "
            f"{self.read - self.imported} dropped"
        )
        reasons = [f"{reason}: {count}" for reason, count in sorted(self.dropped.items())]
        if reasons:
            summary += f" ({'; '.join(reasons)})"
        if self.split is not None:
            summary += f"; split {self.split} (held-out share {self.held_out_share:g}): {self.in_split}"
        return summary
