"""Who chooses between two answers: the test world's simulated annotator, a function, or people through a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

from llama2_chat.callables import load_callable
from llama2_chat.dialogue import RATINGS, Domain, Row, messages_to_rows
from llama2_chat.errors import DataFormatError, Llama2ChatError, UserInputError, did_you_mean
from llama2_chat.fields import check_choice, json_type, optional_choice, optional_flag, required
from llama2_chat.jsonl import read_rows
from llama2_chat.preferences.config import CallableAnnotator, FileAnnotator, PreferencesConfig
from llama2_chat.preferences.pairs import AnswerPair, Verdict
from llama2_chat.testbed.annotator import compare

_SIDES = ("a", "b")
_ANNOTATION = ("id", "preferred", "rating", "safe_a", "safe_b")
_SHOWN = ("prompt", "answer_a", "answer_b")
"""Fields of `to_annotate.jsonl` beside the id, which an annotation may repeat."""

LINE = '{"id": …, "preferred": "a" or "b", "rating": …, "safe_a": true or false, "safe_b": true or false}'


class Annotating(Protocol):
    """Judges pairs; the same pair gets the same verdict, whichever others are judged with it."""

    def annotate(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """One verdict for each pair."""
        ...


def annotator_for(config: PreferencesConfig, seed: int) -> Annotating:
    """The annotator that a configuration names; raises UserInputError where a function cannot be imported."""
    source = config.annotator
    if isinstance(source, CallableAnnotator):
        return FunctionAnnotator(load_callable(source), name=source.callable)
    if isinstance(source, FileAnnotator):
        return WrittenAnnotations(Path(source.file))
    return SimulatedAnnotator(config.domain, noise=source.testbed.noise, seed=seed)


class SimulatedAnnotator:
    """Goes by the testbed's truth with noise; every pair has random numbers of its own."""

    def __init__(self, domain: Domain, *, noise: float, seed: int) -> None:
        self.domain, self.noise, self.seed = domain, noise, seed

    def annotate(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """One verdict for each pair; raises UserInputError for a prompt that is not the testbed's."""
        return [self._verdict(pair) for pair in pairs]

    def _verdict(self, pair: AnswerPair) -> Verdict:
        rng = Random(f"annotator/{self.seed}/{pair.id}")
        found = compare(pair.prompt, *pair.answers, domain=self.domain, rng=rng, noise=self.noise)
        return Verdict(_SIDES.index(found.preferred), found.rating, (found.safe_a, found.safe_b))


class FunctionAnnotator:
    """A function of the user's own: list of `{"prompt", "answers"}` to a list of verdicts."""

    def __init__(self, function: Callable[[list[Row]], Iterable[Any]], *, name: str) -> None:
        self.function, self.name = function, name

    def annotate(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """One verdict for each pair: what one call of the function returns.

        Raises:
            UserInputError: the function fails, or returns anything but a verdict for each pair.
        """
        shown = [{"prompt": messages_to_rows(pair.prompt), "answers": list(pair.answers)} for pair in pairs]
        try:
            returned = self.function(shown)
        except Llama2ChatError:
            raise
        except Exception as error:
            raise UserInputError(
                f"{self.name}: failed on {len(pairs)} pairs: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(returned, list | tuple) or len(returned) != len(pairs):
            found = f"{len(returned)}" if isinstance(returned, list | tuple) else json_type(returned)
            raise UserInputError(
                f"{self.name}: must return a list of {len(pairs)} verdicts, one for each pair; it returned {found}"
            )
        return [self._checked(number, len(pairs), value) for number, value in enumerate(returned, start=1)]

    def _checked(self, number: int, count: int, value: Any) -> Verdict:
        place = f"{self.name}: pair {number} of {count}"
        if not isinstance(value, Mapping):
            raise UserInputError(f'{place}: {{"preferred": 0 or 1}} is wanted, found {json_type(value)}')
        allowed = ("preferred", "rating", "safe")
        if unknown := [str(key) for key in value if key not in allowed]:
            hint = did_you_mean(unknown[0], allowed)
            raise UserInputError(f'{place}: "{unknown[0]}" unknown{hint}; allowed are {", ".join(allowed)}')
        preferred, safe = value.get("preferred"), value.get("safe")
        if isinstance(preferred, bool) or preferred not in (0, 1):
            raise UserInputError(f"{place}: preferred must be 0 or 1, found {preferred!r:.80}")
        if safe is not None and not (
            isinstance(safe, list | tuple) and len(safe) == 2 and all(isinstance(one, bool) for one in safe)
        ):
            raise UserInputError(f"{place}: safe must be two of True and False, found {safe!r:.80}")
        try:
            rating = optional_choice(value, "rating", RATINGS)
        except ValueError as error:
            raise UserInputError(f"{place}: {error}") from None
        return Verdict(int(preferred), rating, None if safe is None else (safe[0], safe[1]))


class WrittenAnnotations:
    """What people wrote; every pair must be among it (`missing`)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.verdicts = read_annotations(file)

    def missing(self, pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
        """The pairs that nobody has judged yet."""
        return [pair for pair in pairs if pair.id not in self.verdicts]

    def annotate(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """One verdict for each pair."""
        return [self.verdicts[pair.id] for pair in pairs]


def read_annotations(file: Path) -> dict[str, Verdict]:
    """The verdicts of a file by id; empty where there is no file. A line without `preferred` is one yet to be judged.

    Raises:
        DataFormatError: a line is not of the form `LINE`, or two are for one id.
    """
    if not file.exists() or file.stat().st_size == 0:
        return {}
    found: dict[str, Verdict] = {}
    for line, row in read_rows(file):
        try:
            name, verdict = _annotation(row)
            if name in found:
                raise ValueError(f'the id "{name}" has an annotation already; keep one')
        except ValueError as error:
            raise DataFormatError(file, line, str(error)) from None
        if verdict is not None:
            found[name] = verdict
    return found


def _annotation(row: Row) -> tuple[str, Verdict | None]:
    if unknown := [key for key in row if key not in (*_ANNOTATION, *_SHOWN)]:
        hint = did_you_mean(unknown[0], _ANNOTATION)
        raise ValueError(f'"{unknown[0]}" unknown{hint}; a line is {LINE}')
    name = required(row, "id")
    if not isinstance(name, str):
        raise ValueError(f"id must be a string as in to_annotate.jsonl, found {json_type(name)}")
    if row.get("preferred") is None:
        return name, None
    labels = [optional_flag(row, "safe_a"), optional_flag(row, "safe_b")]
    if (labels[0] is None) != (labels[1] is None):
        raise ValueError("safe_a and safe_b go together; give both or neither")
    safe = None if labels[0] is None or labels[1] is None else (labels[0], labels[1])
    side = check_choice(row["preferred"], "preferred", _SIDES)
    return name, Verdict(_SIDES.index(side), optional_choice(row, "rating", RATINGS), safe)


def annotation_row(pair: AnswerPair, verdict: Verdict) -> Row:
    """A line that `read_annotations` reads."""
    row: Row = {"id": pair.id, "preferred": _SIDES[verdict.preferred]}
    if verdict.rating is not None:
        row["rating"] = verdict.rating
    if verdict.safe is not None:
        row |= {"safe_a": verdict.safe[0], "safe_b": verdict.safe[1]}
    return row
