"""Tables of docs/results/ppo.md from runs of `ppo_ablation.yaml`, one run a seed.

python recipes/tiny/ppo_tables.py RUN [RUN ...]

First every seed alone, with 95 % intervals over prompts; then the means over seeds; then what each policy of PPO
changes, prompt by prompt, against rejection sampling and against PPO with all its ingredients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Message
from llama2_chat.evaluation.statistics import Interval, mean, mean_interval, share_interval
from llama2_chat.jsonl import read_rows
from llama2_chat.recipes.tiny.tables import (
    DIFFERENCE_HEAD,
    difference_cells,
    exit_code,
    parser_of,
    summary_of,
    table,
)
from llama2_chat.testbed.oracle import grade

START, FULL = "rejection_sampling", "ppo"
FIRST = ("sft", START, FULL)
"""Policies that lead the tables; PPO's other runs follow in the recipe's order."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """What is read from a row of a policy's held-out samples, and in which of the sets of prompts."""

    of: str
    read: Callable[[Row], float]
    is_share: bool = False
    """Whether a prompt counts 0 or 1."""


def _correct(row: Row) -> float:
    messages = tuple(Message(message["role"], message["content"]) for message in row["prompt"])
    return float(bool(grade(messages, row["response"]).correct))


MEASURES = {
    "true helpfulness": Measure("helpful", lambda row: float(row["oracle_helpfulness"])),
    "violations": Measure("safety", lambda row: float(not row["oracle_safe"]), is_share=True),
    "greedy correctness": Measure("greedy", _correct, is_share=True),
    "R_h": Measure("helpful", lambda row: float(row["scores"]["helpfulness"])),
    "R_s": Measure("safety", lambda row: float(row["scores"]["safety"])),
}
"""R_h is the helpfulness score of answers to harmless prompts, R_s the safety score of answers to unsafe ones."""

SUMMARISED = {"independent_reward_mean": "independent RM", "kl_to_sft_nats": "KL to SFT, nats"}
"""Fields of the evaluation in `summary.json`."""

TRAINED = {"kl_nats_last": "KL to the start, nats", "score_last": "R_c"}
"""Metrics of PPO's own stage, means over the last tenth of its iterations."""

COMPARED = ("true helpfulness", "greedy correctness", "violations", "R_h")


@cache
def samples(file: Path) -> list[Row]:
    """All rows of a policy's held-out samples."""
    return [row for _, row in read_rows(file)]


@dataclass(frozen=True)
class Run:
    """A finished run of one seed."""

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        return summary_of(self.folder, "ppo-ablation")

    @property
    def policies(self) -> list[str]:
        """Names of the policies that are compared."""
        stages = self.summary["stages"]
        return [*FIRST, *(n for n, stage in stages.items() if stage["kind"] == "ppo" and n not in FIRST)]

    def points(self, policy: str, measure: Measure) -> dict[str, float]:
        """A number for each held-out prompt, the mean over its samples; a prompt that comes twice counts once.

        The same prompt gets the same samples, which say nothing new.
        """
        by_prompt: dict[str, list[float]] = {}
        for row in samples(self.folder / "evaluation" / f"{policy}.samples.jsonl"):
            if row["set"] == measure.of:
                by_prompt.setdefault(json.dumps(row["prompt"]), []).append(measure.read(row))
        return {prompt: mean(values) for prompt, values in by_prompt.items()}

    def interval(self, policy: str, name: str) -> Interval:
        """A measure's mean over prompts and its 95 % interval."""
        measure = MEASURES[name]
        points = list(self.points(policy, measure).values())
        if measure.is_share:
            return share_interval([point == 1.0 for point in points])
        return mean_interval(points)

    def evaluated(self, policy: str, field: str) -> float:
        """A field of the policy's evaluation."""
        value: float = self.summary["evaluation"][policy][field]
        return value

    def trained(self, policy: str, field: str) -> float | None:
        """A metric of the policy's stage; None where the stage is none of PPO."""
        value: float | None = self.summary["stages"][policy].get(field)
        return value

    def differences(self, ours: str, other: str, name: str) -> list[float]:
        """A measure of one policy less another's, prompt by prompt."""
        left, right = (self.points(policy, MEASURES[name]) for policy in (ours, other))
        return [left[prompt] - right[prompt] for prompt in left]


COLUMNS = [*MEASURES, *SUMMARISED.values(), *TRAINED.values()]


def seed_table(run: Run) -> str:
    """Every policy of one seed, with 95 % intervals over prompts."""
    rows = {}
    for policy in run.policies:
        cells = []
        for name in MEASURES:
            found, style = run.interval(policy, name), _style(name)
            cells.append(f"{found['mean']:{style}} ({found['low']:{style}} to {found['high']:{style}})")
        cells += [f"{run.evaluated(policy, field):.2f}" for field in SUMMARISED]
        trained = [run.trained(policy, field) for field in TRAINED]
        rows[_spoken(policy)] = cells + ["" if value is None else f"{value:.2f}" for value in trained]
    return table(f"seed {run.summary['seed']}", COLUMNS, rows)


def mean_table(runs: Sequence[Run]) -> str:
    """Means over seeds."""
    rows = {}
    for policy in runs[0].policies:
        cells = [
            f"{mean([float(run.interval(policy, name)['mean']) for run in runs]):{_style(name)}}"
            for name in MEASURES
        ]
        cells += [f"{mean([run.evaluated(policy, field) for run in runs]):.2f}" for field in SUMMARISED]
        for field in TRAINED:
            values = [value for run in runs if (value := run.trained(policy, field)) is not None]
            cells.append(f"{mean(values):.2f}" if values else "")
        rows[_spoken(policy)] = cells
    return table("mean over seeds", COLUMNS, rows)


def difference_table(runs: Sequence[Run], other: str) -> str:
    """Every run of PPO less `other`: each seed's, the mean, and its intervals over prompts and over seeds."""
    return table(f"less {_spoken(other)}", DIFFERENCE_HEAD, dict(_differences(runs, other)))


def _differences(runs: Sequence[Run], other: str) -> Iterator[tuple[str, list[str]]]:
    for policy in runs[0].policies[FIRST.index(FULL) :]:
        for name in COMPARED if policy != other else ():
            by_seed = [run.differences(policy, other, name) for run in runs]
            yield f"{_spoken(policy)}: {name}", difference_cells(by_seed)


def tables(runs: Sequence[Run]) -> str:
    """All tables, one after the other."""
    parts = [seed_table(run) for run in runs]
    parts += [mean_table(runs), *(difference_table(runs, other) for other in (START, FULL))]
    return "\n\n".join(parts)


def _style(name: str) -> str:
    return ".2f" if name.startswith("R_") else ".3f"


def _spoken(stage: str) -> str:
    return stage.replace("_", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directories that are named."""
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory of one seed")
    folders: list[Path] = parser.parse_args(arguments).runs
    return exit_code(lambda: print(tables([Run(folder) for folder in folders])))


if __name__ == "__main__":
    sys.exit(main())
