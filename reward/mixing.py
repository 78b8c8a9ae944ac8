"""The data mix of a reward model: all pairs of its own domain and a share drawn from the others (§3.2.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llama2_chat.dialogue import Preference
from llama2_chat.reward.config import number_to_draw
from llama2_chat.reward.data import EncodedPairs


@dataclass(frozen=True, slots=True)
class DrawnPairs:
    """Which of a file's usable pairs are trained on."""

    source: EncodedPairs
    places: list[int]
    """Of the pairs in `source.pairs`, in order, each at most once."""

    @property
    def pairs(self) -> list[Preference]:
        """The drawn pairs."""
        return [self.source.pairs[place] for place in self.places]

    @property
    def tokens(self) -> list[tuple[list[int], list[int]]]:
        """Token ids of their (chosen, rejected) dialogues."""
        return [self.source.tokens[place] for place in self.places]

    def to_row(self, all_drawn: int) -> dict[str, Any]:
        """The file's counts as metrics, with what was drawn of the kept ones and its share among `all_drawn`."""
        drawn = len(self.places)
        return {**self.source.to_row(), "drawn": drawn, "share": drawn / max(all_drawn, 1)}


@dataclass(frozen=True, slots=True)
class Mix:
    """A training set: every pair of the stage's own files, and those drawn from the others."""

    own: list[DrawnPairs]
    others: list[DrawnPairs]
    share: float | None
    """Of the whole, what was asked to come from the others; None where no others are named."""

    @property
    def files(self) -> list[DrawnPairs]:
        """Own files, then the others."""
        return [*self.own, *self.others]

    @property
    def size(self) -> int:
        """Pairs in the whole."""
        return sum(len(file.places) for file in self.files)

    @property
    def drawn_share(self) -> float:
        """Of the whole, what does come from the others."""
        return sum(len(file.places) for file in self.others) / max(self.size, 1)

    def to_row(self) -> dict[str, Any]:
        """As metrics: the share asked for and the one that resulted; nothing where no others are named."""
        if self.share is None:
            return {}
        return {"other_share": {"asked": self.share, "drawn": self.drawn_share}}

    def shortfall(self) -> str | None:
        """What to tell the user where the others could not fill their share, else None."""
        own, others = (sum(len(f.source.pairs) for f in files) for files in (self.own, self.others))
        if self.share is None or own == 0:
            return None
        wanted = number_to_draw(own, self.share)
        if 0 < wanted <= others:
            return None
        why = (
            f"the other files hold {others:,} usable pairs, fewer than the {wanted:,}"
            if wanted
            else f"{own:,} own pairs are too few for a single one more"
        )
        return (
            f"other_share: {why} that a share of {self.share:g} takes; they make up {self.drawn_share:.4g} of the "
            "training set. Name further files in other_preferences, or set other_share to what is meant"
        )


def mix(
    own: Sequence[EncodedPairs], others: Sequence[EncodedPairs], *, share: float | None, seed: int
) -> Mix:
    """All usable pairs of `own`, and as many of `others` as make up `share` of the whole.

    These are drawn uniformly and without replacement from all usable pairs of the other files together. Where they
    hold too few, all are taken. The same seed and files give the same pairs.

    Args:
        share: From 0 to 1, both excluded; None where there are no others.

    Source: §3.2.2: an equal part of other data for the helpfulness reward model, 10 % for the safety reward model.
    """
    whole = [DrawnPairs(file, list(range(len(file.pairs)))) for file in own]
    if share is None:
        return Mix(whole, [], None)
    ends = list(accumulate(len(file.pairs) for file in others))
    available = ends[-1] if ends else 0
    wanted = min(available, number_to_draw(sum(len(file.pairs) for file in own), share))
    drawn = sorted(random.Random(f"{seed} other_preferences").sample(range(available), wanted))
    parts = []
    for file, end in zip(others, ends, strict=True):
        start = end - len(file.pairs)
        parts.append(DrawnPairs(file, [place - start for place in drawn if start <= place < end]))
    return Mix(whole, parts, share)
