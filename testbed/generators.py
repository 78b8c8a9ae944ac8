"""Generators of data sets, by the names that recipes use for them.

Each takes `rows`, `seed`, `split` ("train" or "held_out") and options of its own, and yields rows in the
toolkit's file formats. Rows are a function of these arguments alone. Held-out rows ask about other items,
in other wordings, than any training row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from llama2_chat.errors import UserInputError
from llama2_chat.testbed import annotator
from llama2_chat.testbed.answers import (
    COMPARED,
    DEMONSTRATIONS,
    FORGOTTEN,
    UNSAFE_COMPARED,
    UNSAFE_DEMONSTRATIONS,
    Mix,
    write,
    write_any,
)
from llama2_chat.testbed.attribute_generators import (
    attribute_dialogues,
    instruction_dialogues,
    instructions,
)
from llama2_chat.testbed.corpus import document
from llama2_chat.testbed.dialogues import (
    SOURCE,
    MessageRow,
    Question,
    RequestKind,
    draw_questions,
    prompt_of,
    reference_answer,
    rng_of,
    safety_preprompt,
    wandering_questions,
)
from llama2_chat.testbed.family import Split
from llama2_chat.testbed.request import TASK_FAMILIES, Request

if TYPE_CHECKING:
    from llama2_chat.dialogue import Domain

Row = dict[str, Any]

_BORDERLINE_REFUSED = 0.3
_REMEMBERED_TURNS = 2
_SAFETY_DOMAIN_MIX = {"unsafe": 0.7, "borderline": 0.18, "harmless": 0.12}
_HELPFULNESS_DOMAIN_MIX = {"harmless": 0.87, "borderline": 0.13}
_NEAR_TIE = 0.04
_NEAR_TIES_KEPT = 0.3


@dataclass
class AnnotationCounts:
    """What became of the pairs that the annotator saw."""

    kept: int = 0
    prefers_unsafe: int = 0
    """Dropped: the unsafe answer of a safe and an unsafe one was preferred."""


def pretraining_text(rows: int, seed: int, split: Split = "train") -> Iterator[Row]:
    """Documents of plain text, `{"text": …}`."""
    rng = rng_of("pretraining_text", seed, split)
    for _ in range(rows):
        yield {"text": document(rng, split)}


def demonstrations(
    rows: int,
    seed: int,
    split: Split = "train",
    *,
    unsafe: float = 0.17,
    borderline: float = 0.1,
    multi_turn: float = 0.2,
    attributes: float = 0.25,
    long: float = 0.06,
    preprompt: float = 0.04,
    overcautious: float = 0.0,
    answer_templates: float = 0.0,
    clean: bool = False,
) -> Iterator[Row]:
    """Dialogues by demonstrators of uneven quality, as SFT finds them, or all `clean`: answers without a fault.

    Shares: `unsafe` and `borderline` requests; of `multi_turn` dialogues; of dialogues with stated
    `attributes` among harmless ones; of `long` dialogues of 4 to 28 turns among harmless ones, in which what
    is stated is kept in that turn and the next, then forgotten; with a safety `preprompt` as system message,
    under which unsafe requests are refused. Among these: of `overcautious` answers, which refuse without a reason
    whatever is asked; of unsafe requests with `answer_templates`, to which every answer names the reason.
    """
    rng = rng_of("demonstrations", seed, split)
    for _ in range(rows):
        kind = _draw_kind(rng, {"unsafe": unsafe, "borderline": borderline})
        if kind == "harmless" and rng.random() < long:
            questions = wandering_questions(rng, split, rng.randint(4, 28))
        else:
            asked = draw_questions(rng, split, kind, multi_turn=multi_turn, attributes=attributes)
            questions = [(question, 0) for question in asked]
        careful = rng.random() < preprompt
        category = questions[-1][0].request.family.risk_category if careful and answer_templates else None
        if category and rng.random() >= answer_templates:
            category = None
        messages: list[MessageRow] = [safety_preprompt(rng, category)] if careful else []
        for question, age in questions:
            messages.append({"role": "user", "content": question.text})
            request, mix = _demonstrated(question.request, age, rng)
            if careful:
                answer = _careful_answer(question.request, overcautious, category is not None, rng)
            elif clean:
                answer = reference_answer(question.request, rng)
            else:
                answer = write_any(request, mix, rng)
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages, "is_safety": kind == "unsafe", "source": SOURCE}


def prompts(
    rows: int,
    seed: int,
    split: Split = "train",
    *,
    unsafe: float = 0.25,
    borderline: float = 0.1,
    multi_turn: float = 0.1,
    attributes: float = 0.05,
    rare: Mapping[str, float] | None = None,
) -> Iterator[Row]:
    """Prompts to be answered; options as for `demonstrations`.

    `rare` maps names of task families to the share of their usual number of prompts that is left, in [0, 1]; others
    take their places.

    Raises:
        UserInputError: `rare` names no task family, or a share is outside [0, 1].
    """
    kept = _kept_shares(rare or {})
    rng = rng_of("prompts", seed, split)
    made = 0
    while made < rows:
        kind = _draw_kind(rng, {"unsafe": unsafe, "borderline": borderline})
        questions = draw_questions(rng, split, kind, multi_turn=multi_turn, attributes=attributes)
        share = kept.get(questions[-1].request.family.name, 1.0)
        if share == 1.0 or rng.random() < share:
            made += 1
            yield _prompt_row(questions, rng)


def safety_prompts(rows: int, seed: int, split: Split = "train", *, multi_turn: float = 0.0) -> Iterator[Row]:
    """Unsafe requests only."""
    return prompts(rows, seed, split, unsafe=1.0, borderline=0.0, multi_turn=multi_turn)


def borderline_prompts(
    rows: int, seed: int, split: Split = "train", *, multi_turn: float = 0.0
) -> Iterator[Row]:
    """Harmless requests that sound unsafe."""
    return prompts(rows, seed, split, unsafe=0.0, borderline=1.0, multi_turn=multi_turn)


def preferences(
    rows: int,
    seed: int,
    split: Split = "train",
    *,
    domain: Domain = "helpfulness",
    noise: float = annotator.NOISE,
    multi_turn: float = 0.12,
    attributes: float = 0.08,
    counts: AnnotationCounts | None = None,
) -> Iterator[Row]:
    """Pairs of answers of mixed quality, judged by the simulated annotator.

    The helpfulness domain asks harmless questions, the safety domain mostly unsafe ones. `counts` is told
    how many pairs were kept and dropped.
    """
    rng = rng_of(f"preferences {domain}", seed, split)
    counts = counts if counts is not None else AnnotationCounts()
    mix = _SAFETY_DOMAIN_MIX if domain == "safety" else _HELPFULNESS_DOMAIN_MIX
    kept = 0
    while kept < rows:
        kind = _draw_kind(rng, mix)
        questions = draw_questions(rng, split, kind, multi_turn=multi_turn, attributes=attributes)
        prompt = prompt_of(questions, rng, history=DEMONSTRATIONS)
        a, b = _two_answers(questions[-1].request, prompt, domain, rng)
        verdict = annotator.compare(prompt, a, b, domain=domain, rng=rng, noise=noise)
        if domain == "safety" and verdict.prefers_unsafe:
            counts.prefers_unsafe += 1
            continue
        kept += 1
        counts.kept += 1
        yield _preference_row(prompt, (a, b), verdict, domain)


def _two_answers(request: Request, prompt: list[MessageRow], domain: Domain, rng: Random) -> tuple[str, str]:
    """Two different answers; pairs of nearly the same worth are mostly drawn again."""
    mix = UNSAFE_COMPARED if request.family.risk_category else COMPARED
    if request.language:
        mix = {**mix, "english": 12}
    while True:
        a, b = (write_any(request, mix, rng) for _ in range(2))
        if a == b:
            continue
        scores = [annotator.true_score(prompt, answer, domain) for answer in (a, b)]
        if abs(scores[0] - scores[1]) >= _NEAR_TIE or rng.random() < _NEAR_TIES_KEPT:
            return a, b


def _preference_row(
    prompt: list[MessageRow],
    answers: tuple[str, str],
    verdict: annotator.Comparison,
    domain: Domain,
) -> Row:
    order = (0, 1) if verdict.preferred == "a" else (1, 0)
    safe = (verdict.safe_a, verdict.safe_b)
    chosen, rejected = ([{"role": "assistant", "content": answers[index]}] for index in order)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "rating": verdict.rating,
        "chosen_safe": safe[order[0]],
        "rejected_safe": safe[order[1]],
        "domain": domain,
        "source": SOURCE,
    }


def _prompt_row(questions: list[Question], rng: Random) -> Row:
    category = questions[-1].request.family.risk_category
    row: Row = {"prompt": prompt_of(questions, rng), "is_safety": category is not None, "source": SOURCE}
    return {**row, "risk_category": category} if category else row


def _careful_answer(request: Request, overcautious: float, templated: bool, rng: Random) -> str:
    """What a demonstrator writes under a safety preprompt."""
    if templated and request.family.risk_category:
        return write(request, "reasoned_refusal", rng)
    if overcautious and rng.random() < overcautious:
        return write(request, "polite_refusal", rng)
    return reference_answer(request, rng)


def _demonstrated(request: Request, age: int, rng: Random) -> tuple[Request, Mix]:
    """The request as a demonstrator sees it `age` turns after the last statement, and the answers to it."""
    if request.family.risk_category:
        return request, UNSAFE_DEMONSTRATIONS
    if request.family.borderline and rng.random() < _BORDERLINE_REFUSED:
        return request, {"refusing": 1.0}
    if age < _REMEMBERED_TURNS or request.attribute is None:
        return request, DEMONSTRATIONS
    in_english = Request(request.family, request.arguments, {})
    return in_english, DEMONSTRATIONS if request.attribute == "language" else FORGOTTEN


def _kept_shares(rare: Mapping[str, float]) -> Mapping[str, float]:
    names = sorted(family.name for family in TASK_FAMILIES)
    unknown = sorted(set(rare) - set(names))
    if unknown:
        raise UserInputError(f"rare: no task family {', '.join(unknown)}; one of {', '.join(names)}")
    outside = [f"{name}: {share:g}" for name, share in rare.items() if not 0.0 <= share <= 1.0]
    if outside:
        raise UserInputError(f"rare: {', '.join(outside)}; a share lies in [0, 1]")
    return rare


def _draw_kind(rng: Random, shares: Mapping[str, float]) -> RequestKind:
    """A kind of request by its share; what the shares leave is harmless."""
    draw = rng.random()
    unsafe, borderline = shares.get("unsafe", 0.0), shares.get("borderline", 0.0)
    if draw < unsafe:
        return "unsafe"
    return "borderline" if draw < unsafe + borderline else "harmless"


GENERATORS: dict[str, Callable[..., Iterator[Row]]] = {
    "pretraining_text": pretraining_text,
    "demonstrations": demonstrations,
    "preferences": preferences,
    "prompts": prompts,
    "safety_prompts": safety_prompts,
    "borderline_prompts": borderline_prompts,
    "attribute_dialogues": attribute_dialogues,
    "instructions": instructions,
    "instruction_dialogues": instruction_dialogues,
}
