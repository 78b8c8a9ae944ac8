"""Compliance at each turn as numbers and as Markdown: policies side by side, per constraint and overall."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2_chat.evaluation.instructions import Obeyed, constraints_of, flags_by_turn
from llama2_chat.evaluation.statistics import Interval, mean, mean_interval, share_interval
from llama2_chat.reward.metrics import paired_difference

Figures = Mapping[str, Any]
OVERALL = "overall"


def compliance_figures(by_policy: Mapping[str, Sequence[Obeyed]]) -> dict[str, Any]:
    """The figures of every policy on the same tasks; the first is the one that the others are compared with.

    Returns:
        `models`; `conversations`; `constraints`: how many conversations each was due in; `compliance`: for each policy
        `overall` and each constraint, by turn, `{mean, count, low, high}` (share of conversations, Wilson);
        `all_turns`: the mean over conversations of the share of their turns at which all was kept; `difference`: by
        turn, a policy's less the first's on the same conversations; `counts`: turns at which the oldest turns were left
        out (`shortened_turns`, by turn `shortened_at`), questions too long for the context (`too_long_turns`),
        answers that were cut off, empty or held a chat tag (`incomplete_answers`).
    """
    first = next(iter(by_policy))
    names = constraints_of([one for obeyed in by_policy.values() for one in obeyed])
    flags = {name: flags_by_turn(obeyed) for name, obeyed in by_policy.items()}
    return {
        "models": list(by_policy),
        "conversations": len(by_policy[first]),
        "constraints": {name: len(_due(by_policy[first], name)) for name in names},
        "compliance": {
            policy: {
                OVERALL: _shares(flags[policy]),
                **{name: _shares(flags_by_turn(obeyed, name)) for name in names},
            }
            for policy, obeyed in by_policy.items()
        },
        "all_turns": {name: _all_turns(found) for name, found in flags.items()},
        "difference": {
            name: {str(turn): _difference(found[turn], flags[first].get(turn, {})) for turn in found}
            for name, found in flags.items()
            if name != first
        },
        "counts": {name: _counts(obeyed) for name, obeyed in by_policy.items()},
    }


def _due(obeyed: Sequence[Obeyed], constraint: str) -> list[int]:
    return [n for n, one in enumerate(obeyed) if any(constraint in found for found in one.kept.values())]


def _shares(by_turn: Mapping[int, Mapping[int, bool]]) -> dict[str, Interval]:
    return {str(turn): share_interval(list(flags.values())) for turn, flags in by_turn.items()}


def _all_turns(by_turn: Mapping[int, Mapping[int, bool]]) -> Interval | None:
    shares: dict[int, list[float]] = {}
    for flags in by_turn.values():
        for number, flag in flags.items():
            shares.setdefault(number, []).append(float(flag))
    return mean_interval([mean(found) for found in shares.values()]) if shares else None


def _difference(ours: Mapping[int, bool], theirs: Mapping[int, bool]) -> dict[str, Any]:
    both = [number for number in ours if number in theirs]
    return paired_difference([float(ours[n]) for n in both], [float(theirs[n]) for n in both])


def _counts(obeyed: Sequence[Obeyed]) -> dict[str, Any]:
    at: dict[int, int] = {}
    for one in obeyed:
        for turn in one.shortened_at:
            at[turn] = at.get(turn, 0) + 1
    return {
        "shortened_turns": sum(at.values()),
        "shortened_at": {str(turn): count for turn, count in sorted(at.items())},
        "too_long_turns": sum(len(one.too_long) for one in obeyed),
        "incomplete_answers": sum(one.incomplete for one in obeyed),
    }


def compliance_markdown(figures: Figures, pictures: Mapping[str, str] | None = None) -> str:
    """All tables; `pictures` are figures' paths by their titles."""
    return "\n".join(_lines(figures, pictures or {})) + "\n"


def _lines(figures: Figures, pictures: Mapping[str, str]) -> Iterator[str]:
    models = figures["models"]
    yield f"# Instructions kept, turn by turn: {', '.join(models)}"
    yield ""
    yield (
        f"{figures['conversations']} conversations; the instruction stands in the first turn alone, answers are "
        "greedy. Share of conversations that keep it, in per cent, with 95 % intervals."
    )
    columns = [*models, *(f"{name} less {models[0]}" for name in models[1:])]
    yield from ("", "## Overall", "", f"| turn | conversations | {' | '.join(columns)} |")
    yield "|---" * (2 + len(columns)) + "|"
    overall = {name: figures["compliance"][name][OVERALL] for name in models}
    for turn in overall[models[0]]:
        cells = [_share(overall[name].get(turn)) for name in models]
        cells += [_signed(figures["difference"][name].get(turn)) for name in models[1:]]
        yield f"| {turn} | {overall[models[0]][turn]['count']} | {' | '.join(cells)} |"
    means = [_share(figures["all_turns"][name]) for name in models]
    yield f"| mean of all | {figures['conversations']} | {' | '.join([*means, *([''] * (len(models) - 1))])} |"
    for title, picture in pictures.items():
        yield from ("", f"![{title}]({picture})")
    yield from _by_constraint(figures)
    yield from ("", "## Counts", "", f"| | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|")
    rows = {
        "shortened_turns": "turns at which the oldest turns were left out",
        "too_long_turns": "questions too long for the context",
        "incomplete_answers": "answers cut off, empty or with a chat tag",
    }
    for key, words in rows.items():
        yield f"| {words} | {' | '.join(str(figures['counts'][name][key]) for name in models)} |"


def _by_constraint(figures: Figures) -> Iterator[str]:
    """A table for each constraint, turns across."""
    for constraint, count in figures["constraints"].items():
        found = {name: figures["compliance"][name][constraint] for name in figures["models"]}
        turns = list(dict.fromkeys(turn for by_turn in found.values() for turn in by_turn))
        yield from ("", f"## `{constraint}`, {count} conversations", "", f"| turn | {' | '.join(turns)} |")
        yield "|---" * (1 + len(turns)) + "|"
        for name, by_turn in found.items():
            yield f"| {name} | {' | '.join(_share(by_turn.get(turn)) for turn in turns)} |"


def _share(row: Interval | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row['mean']:.0f} ({100 * max(row['low'], 0):.0f}–{100 * min(row['high'], 1):.0f})"


def _signed(row: Mapping[str, Any] | None) -> str:
    if row is None or row["difference"] is None:
        return "–"
    return f"{100 * row['difference']:+.0f} ({100 * row['low']:+.0f} to {100 * row['high']:+.0f})"
