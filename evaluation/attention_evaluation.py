"""The attention of one or several policies on the same dialogues: rows for each dialogue, and means over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.dialogue import Dialogue, Row
from llama2_chat.errors import ChatTagError, DataFormatError, UserInputError
from llama2_chat.evaluation.attention import (
    BinRule,
    TokenizedParts,
    attention_to_instruction,
    binned,
    bins_of,
    maximum_attention,
    tokenize_parts,
)
from llama2_chat.evaluation.statistics import Interval, mean_interval
from llama2_chat.fields import optional_text
from llama2_chat.jsonl import read_rows
from llama2_chat.models import load_policy
from llama2_chat.progress import track
from llama2_chat.settings import RunSettings
from llama2_chat.tokenizers import ChatTokenizer, load_tokenizer, same_tokens

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class BinSettings:
    """How neighbouring tokens are binned: at most `size` of one part, by their `rule`."""

    size: int = 8
    rule: BinRule = "mean"


def evaluate_attention(
    policies: Mapping[str, RunSettings],
    file: Path,
    *,
    bins: BinSettings,
    most: int | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Every policy's attention in the dialogues of `file`, whose answers are taken as they stand.

    Args:
        policies: By the name that tables show, settings whose base model is the policy; all must have the same tokens
            and chat format.
        most: Only the first so many dialogues.

    Returns:
        The figures over all dialogues, and one row for each dialogue that fits into every context (see
        `evaluation/README.md`).

    Raises:
        UserInputError: policies with different tokens, a row without an answer, or no dialogue that fits.
    """
    tokenizer, chat_format = _common_tokens(policies)
    dialogues = _read(file, chat_format, tokenizer, most)
    fitting = dialogues
    found: dict[str, list[Any]] = {}
    for name, settings in policies.items():
        source = settings.base_model
        model = load_policy(source.path, settings, gguf_file=source.gguf_file)
        context = int(getattr(model.config, "max_position_embeddings", 4096))
        fitting = {number: one for number, one in fitting.items() if _length(one) <= context}
        with track(f"{name}: attention", total=len(fitting), unit="dialogues") as progress:
            found[name] = []
            for number, one in fitting.items():
                spans = [(part.start, part.end) for part in one.answers]
                found[name].append((number, maximum_attention(model, one.input_ids, spans)))
                progress.advance(1)
    if not fitting:
        raise UserInputError(
            f"{file}: none of {len(dialogues)} dialogues fits into the context of every model"
        )
    maxima = {name: {n: a for n, a in rows if n in fitting} for name, rows in found.items()}
    rows = [
        _row(
            number, one, {name: by_dialogue[number] for name, by_dialogue in maxima.items()}, bins, tokenizer
        )
        for number, one in fitting.items()
    ]
    to_instruction = {
        name: [attention_to_instruction(by_dialogue[number], one) for number, one in fitting.items()]
        for name, by_dialogue in maxima.items()
    }
    evaluation = {
        "models": list(policies),
        "dialogues": len(rows),
        "too_long": len(dialogues) - len(rows),
        "bin_size": bins.size,
        "bin_rule": bins.rule,
        **_instruction_figures(to_instruction),
    }
    return evaluation, rows


def _length(dialogue: TokenizedParts) -> int:
    return len(dialogue.input_ids)


def _common_tokens(policies: Mapping[str, RunSettings]) -> tuple[ChatTokenizer, ChatFormat]:
    """The tokenizer and chat format that all policies share."""
    loaded = {
        name: load_tokenizer(settings.base_model.path, settings.base_model.gguf_file)
        for name, settings in policies.items()
    }
    first = next(iter(policies))
    tokenizer, chat_format = loaded[first], policies[first].chat_format
    for name, other in loaded.items():
        if policies[name].chat_format != chat_format or (name != first and not same_tokens(tokenizer, other)):
            raise UserInputError(
                f"{name}: other tokens or another chat format than {first}, so a token of one is none of the "
                "other's; compare policies of one family"
            )
    return tokenizer, build_chat_format(chat_format, tokenizer)


def _read(
    file: Path, chat_format: ChatFormat, tokenizer: ChatTokenizer, most: int | None
) -> dict[int, TokenizedParts]:
    """The dialogues by their line."""
    found: dict[int, TokenizedParts] = {}
    for line, row in read_rows(file):
        if most is not None and len(found) == most:
            break
        try:
            instruction = optional_text(row, "instruction")
            messages = Dialogue.from_row(row).messages
            found[line] = tokenize_parts(messages, chat_format, tokenizer, instruction=instruction)
        except ChatTagError as error:
            raise ChatTagError(f"{file}:{line}: {error}") from None
        except UserInputError:
            raise
        except ValueError as error:
            raise DataFormatError(file, line, str(error)) from None
    return found


def _row(
    line: int,
    dialogue: TokenizedParts,
    maxima: Mapping[str, Any],
    settings: BinSettings,
    tokenizer: ChatTokenizer,
) -> Row:
    bins = bins_of(dialogue, settings.size)
    return {
        "line": line,
        "tokens": [tokenizer.decode([token], keep_control=True) for token in dialogue.input_ids],
        "parts": [part.to_row() for part in dialogue.parts],
        "bins": [one.to_row() for one in bins],
        "binned": {name: _rounded(binned(a, dialogue, bins, settings.rule)) for name, a in maxima.items()},
        "maxima": {name: _rounded(a.tolist()) for name, a in maxima.items()},
    }


def _rounded(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else round(value, _DIGITS) for value in row] for row in rows]


def _instruction_figures(by_model: Mapping[str, Sequence[list[float] | None]]) -> dict[str, Any]:
    """Attention to the instruction by turn: each policy's mean, and each one's less the first's."""
    first = next(iter(by_model))
    marked = [row for row in by_model[first] if row is not None]
    if not marked:
        return {"with_instruction": 0}
    turns = range(max(map(len, marked)))

    def by_turn(rows: Sequence[Sequence[float]]) -> dict[str, Interval]:
        return {str(n + 1): mean_interval([row[n] for row in rows if len(row) > n]) for n in turns}

    rows = {name: [row for row in found if row is not None] for name, found in by_model.items()}
    return {
        "with_instruction": len(marked),
        "attention_to_instruction": {name: by_turn(found) for name, found in rows.items()},
        "difference": {
            name: by_turn(
                [
                    [ours - theirs for ours, theirs in zip(*pair, strict=True)]
                    for pair in zip(found, rows[first], strict=True)
                ]
            )
            for name, found in rows.items()
            if name != first
        },
    }


def attention_markdown(evaluation: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The figures as Markdown, with pictures by their titles."""
    models = evaluation["models"]
    lines = [
        f"{evaluation['dialogues']} dialogues; {evaluation['too_long']} too long for a model's context.",
        "",
        f"Neighbouring tokens are binned by {evaluation['bin_size']} ({evaluation['bin_rule']}).",
    ]
    if evaluation["with_instruction"]:
        lines += [
            "",
            "Maximum attention activation (over layers, heads and the tokens of an answer), mean over the "
            "instruction's tokens, and its mean over dialogues with 95 % interval:",
            "",
            f"| turn | {' | '.join(models)} | {' | '.join(f'{name} less {models[0]}' for name in models[1:])} |"
            if models[1:]
            else f"| turn | {models[0]} |",
            "|---" * (2 * len(models)) + "|",
        ]
        found, differences = evaluation["attention_to_instruction"], evaluation["difference"]
        for turn in found[models[0]]:
            cells = [_cell(found[name][turn]) for name in models]
            cells += [_cell(differences[name][turn], "+.3f") for name in models[1:]]
            lines.append(f"| {turn} | {' | '.join(cells)} |")
    for title, picture in (pictures or {}).items():
        lines += ["", f"![{title}]({picture})"]
    return "\n".join(lines) + "\n"


def _cell(interval: Interval, style: str = ".3f") -> str:
    if interval["count"] < 2:
        return f"{interval['mean']:{style}}"
    return f"{interval['mean']:{style}} ({interval['low']:{style}} to {interval['high']:{style}})"
