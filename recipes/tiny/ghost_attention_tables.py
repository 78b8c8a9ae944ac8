"""Tables of docs/results/ghost-attention.md from runs of `ghost_attention.yaml`, one a seed or a sweep over seeds.

python recipes/tiny/ghost_attention_tables.py RUN [RUN ...]

Recall is what Table 30 of the paper counts: the share of dialogues whose attribute, stated in the first turn, is right
when it is asked for at a later one. Cells with slashes are the seeds; intervals are 95 %, over the dialogues of all
seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llama2_chat.evaluation.statistics import Interval, share_interval
from llama2_chat.jsonl import read_rows
from llama2_chat.recipes.tiny.tables import exit_code, parser_of, runs_of, summary_of, table
from llama2_chat.reward.metrics import paired_difference

BASELINE, GATT = "sft", "ghost_attention"
POLICIES = {
    BASELINE: "baseline (SFT)",
    GATT: "+ GAtt",
    "all_answers": "no zero loss",
    "every_turn": "no drop",
    "original_history": "original history",
}
"""Columns of Table 30's layout by stage."""
WITHOUT = {"without_hobby": "+ GAtt without hobbies", "unseen": "+ GAtt without hobbies and languages"}
"""Stages that are not instructed with all attributes."""
LAST = 20
SHOWN_TURNS = ("1", "2", "3", "4", "6", "10", "15", "19")


@cache
def summary(run: Path) -> dict[str, Any]:
    """`summary.json` of a run of this recipe."""
    return summary_of(run, "ghost-attention")


@cache
def kept(run: Path, policy: str) -> dict[tuple[int, str], list[bool]]:
    """By turn and attribute, for each held-out dialogue whether what is asked for was kept; the same order in all."""
    flags: dict[tuple[int, str], list[bool]] = {}
    for _, row in read_rows(run / "evaluation" / f"{policy}.samples.jsonl"):
        if row["set"] == "recall":
            flags.setdefault((row["turn"], row["attribute"]), []).append(row["kept"])
    return flags


def flags_at(runs: Sequence[Path], policy: str, turn: int, attributes: Sequence[str] = ()) -> list[bool]:
    """The flags of all runs at one turn, of all attributes or of those that are named."""
    return [
        flag
        for run in runs
        for (at, attribute), flags in sorted(kept(run, policy).items())
        if at == turn and (not attributes or attribute in attributes)
        for flag in flags
    ]


def turns_of(runs: Sequence[Path]) -> list[int]:
    """At which turns recall was measured."""
    return sorted({turn for turn, _ in kept(runs[0], BASELINE)})


def recall_table(runs: Sequence[Path]) -> str:
    """Table 30: turns down, policies across, a figure for each seed."""
    rows = {
        str(turn): [
            " / ".join(f"{share_interval(flags_at([run], policy, turn))['mean']:.2f}" for run in runs)
            for policy in POLICIES
        ]
        for turn in turns_of(runs)
    }
    return table("turn", list(POLICIES.values()), rows)


def last_turn_table(runs: Sequence[Path]) -> str:
    """Recall at the last turn with its interval, and each policy's less that of Ghost Attention with everything."""
    rows = {}
    whole = flags_at(runs, GATT, LAST)
    for policy, name in POLICIES.items():
        flags = flags_at(runs, policy, LAST)
        difference = paired_difference([float(flag) for flag in flags], [float(flag) for flag in whole])
        change = (
            ""
            if policy == GATT
            else f"{difference['difference']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
        )
        rows[name] = [_cell(share_interval(flags)), change]
    return table(f"turn {LAST}, {len(whole)} dialogues", ["recall", "less + GAtt"], rows)


def shown_table(runs: Sequence[Path]) -> str:
    """The language of the answers, which shows in every one: turns down, policies across, a figure for each seed."""
    rows = {
        turn: [
            " / ".join(f"{summary(run)['evaluation'][policy]['attribute_shown'][turn]:.2f}" for run in runs)
            for policy in POLICIES
        ]
        for turn in SHOWN_TURNS
    }
    return table("turn", list(POLICIES.values()), rows)


def unseen_table(runs: Sequence[Path]) -> str:
    """Each attribute at each turn, where it was trained and where not: all seeds together."""
    policies = {BASELINE: POLICIES[BASELINE], **WITHOUT, GATT: POLICIES[GATT]}
    rows = {}
    for group in (("hobby",), ("language",), ("name", "persona")):
        for turn in turns_of(runs):
            cells = [_cell(share_interval(flags_at(runs, policy, turn, group))) for policy in policies]
            rows[f"{' and '.join(group)}, turn {turn}"] = cells
    return table("", list(policies.values()), rows)


def skill_table(runs: Sequence[Path]) -> str:
    """What ordinary skill is left, and what the data maker kept."""
    rows = {}
    for policy, name in {**POLICIES, **WITHOUT}.items():
        found = [summary(run)["evaluation"][policy] for run in runs]
        stages = [summary(run)["stages"][policy] for run in runs]
        selections = [stage["selection"] for stage in stages if "selection" in stage]
        rows[name] = [
            " / ".join(f"{one['correctness_greedy']:.3f}" for one in found),
            " / ".join(f"{one['oracle_helpfulness']:.3f}" for one in found),
            " / ".join(f"{one['kept']} of {one['dialogues']}" for one in selections),
        ]
    return table("", ["greedy correctness", "true helpfulness at T = 1", "dialogues kept"], rows)


TABLES: Mapping[str, Callable[[Sequence[Path]], str]] = {
    "Recall when asked (layout of Table 30)": recall_table,
    "Recall at the last turn": last_turn_table,
    "Answers in the language asked for in the first turn": shown_table,
    "Attributes that were never trained": unseen_table,
    "Ordinary skill": skill_table,
}


def tables(runs: Sequence[Path]) -> Iterator[str]:
    """Every table with its title."""
    for title, made in TABLES.items():
        yield f"{title}\n\n{made(runs)}"


def _cell(interval: Interval) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directories that are named."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory of one seed, or of a sweep"
    )
    folders: list[Path] = parser.parse_args(arguments).runs
    return exit_code(
        lambda: print("\n\n".join(tables([run for folder in folders for run in runs_of(folder)])))
    )


if __name__ == "__main__":
    sys.exit(main())
