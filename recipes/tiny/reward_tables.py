"""Tables of docs/results/reward.md from a run of `reward_models.yaml` or `reward_scaling.yaml`, all its seeds together.

python recipes/tiny/reward_tables.py RUN

Models that differ in one value are compared pair by pair. Two 95 % intervals are printed, because they answer two
questions: over pairs (would other held-out pairs give the same?) and over seeds (would another training run?).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import safe_open

from llama2_chat.dialogue import RATINGS, Message, Preference
from llama2_chat.evaluation.statistics import mean, mean_interval
from llama2_chat.jsonl import read_preferences
from llama2_chat.recipes.tiny.tables import (
    exit_code,
    parser_of,
    runs_of,
    seed_interval,
    summary_of,
    table,
)
from llama2_chat.reward.metrics import accuracy_row, safety_class

Column = tuple[str, Callable[[Preference], bool]]

SAFE_FLAGGED = 0.005
"""At which recall is compared: the share of the safe responses that are taken for unsafe."""
AVERAGE: Column = ("average", lambda pair: True)
RATING_COLUMNS: list[Column] = [
    (rating.replace("_", " "), lambda pair, r=rating: pair.rating == r) for rating in RATINGS
] + [AVERAGE]
SAFETY_COLUMNS: list[Column] = [
    AVERAGE,
    ("safe and unsafe", lambda pair: safety_class(pair) == "safe_unsafe"),
    ("both safe", lambda pair: safety_class(pair) == "both_safe"),
    ("both unsafe", lambda pair: safety_class(pair) == "both_unsafe"),
]


@dataclass(frozen=True)
class Scored:
    """The raw scores that one model gives to the held-out pairs of one seed."""

    pairs: list[Preference]
    chosen: list[float]
    rejected: list[float]

    def points(self, column: Column) -> list[float]:
        """1, 0.5 (a tie) or 0 for each pair of the column."""
        scores = zip(self.pairs, self.chosen, self.rejected, strict=True)
        return [1.0 if c > r else 0.5 if c == r else 0.0 for pair, c, r in scores if column[1](pair)]

    @property
    def distance(self) -> float:
        """Mean distance of the two scores of a pair."""
        return mean([abs(c - r) for c, r in zip(self.chosen, self.rejected, strict=True)])

    def scores_of(self, *, safe: bool) -> list[float]:
        """The scores of the responses that are (un)safe."""
        labels = [(pair.chosen_safe, pair.rejected_safe) for pair in self.pairs]
        scores = zip(self.chosen, self.rejected, strict=True)
        sides = [side for both in zip(labels, scores, strict=True) for side in zip(*both, strict=True)]
        return [score for label, score in sides if label is safe]

    def below_half(self, *, safe: bool) -> list[float]:
        """For each response that is (un)safe 1 if σ(score) is below 0.5, else 0."""
        return [float(score < 0) for score in self.scores_of(safe=safe)]

    def found_at(self, share: float) -> float:
        """The share of the unsafe responses below the threshold that `share` of the safe ones are below.

        It does not depend on where a model's zero lies.
        """
        safe = sorted(self.scores_of(safe=True))
        threshold = safe[math.floor(share * len(safe))]
        return mean([float(score < threshold) for score in self.scores_of(safe=False)])


@cache
def scored(run: Path, stage: str, domain: str) -> Scored:
    """What a stage's model says of the held-out pairs of a domain."""
    from llama2_chat.reward.scoring import RewardModel  # torch, which `--help` can do without

    (folder,) = run.glob(f"stages/*-{stage}/model")
    model = RewardModel.from_pretrained(folder, device="cpu")
    pairs = list(read_preferences(run / "data" / f"held_out_{domain}_pairs.jsonl"))

    # Both answers at once: they share their prompt, and equal ones tie.
    dialogues = [(*pair.prompt, Message("assistant", pair.chosen)) for pair in pairs]
    dialogues += [(*pair.prompt, Message("assistant", pair.rejected)) for pair in pairs]
    scores = model.score_messages(dialogues).tolist()
    return Scored(pairs, scores[: len(pairs)], scores[len(pairs) :])


def accuracy_cell(points: Sequence[float]) -> str:
    """Accuracy and its interval over pairs."""
    row = accuracy_row(points)
    return f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def accuracies(runs: Sequence[Path], stage: str, domain: str, columns: Sequence[Column]) -> list[str]:
    """A model's accuracy in each column, the pairs of all seeds together."""
    return [
        accuracy_cell([point for run in runs for point in scored(run, stage, domain).points(column)])
        for column in columns
    ]


def differences(
    runs: Sequence[Path], ours: str, other: str, domain: str, columns: Sequence[Column]
) -> Iterator[tuple[str, list[str]]]:
    """Accuracy of one model less another's, in points of a hundred: each seed's, then both intervals."""
    for column in columns:
        by_seed = [
            [
                100 * (a - b)
                for a, b in zip(
                    scored(run, ours, domain).points(column),
                    scored(run, other, domain).points(column),
                    strict=True,
                )
            ]
            for run in runs
        ]
        over_pairs = mean_interval([difference for seed in by_seed for difference in seed])
        yield (
            column[0],
            [
                " / ".join(f"{mean(seed):+.1f}" for seed in by_seed),
                f"{over_pairs['mean']:+.2f}",
                f"{over_pairs['low']:+.2f} to {over_pairs['high']:+.2f}",
                seed_interval([mean(seed) for seed in by_seed], "+.2f"),
            ],
        )


DIFFERENCE_HEAD = ["each seed", "mean", "over pairs", "over seeds"]


def margin_tables(runs: Sequence[Path]) -> str:
    """Table 28: accuracy by rating of the three margins; then what each margin changes."""
    stages = {name: f"helpfulness_{name}_margin" for name in ("no", "small", "large")}
    rows = {
        f"{name} margin": [
            *accuracies(runs, stage, "helpfulness", RATING_COLUMNS),
            f"{mean([scored(run, stage, 'helpfulness').distance for run in runs]):.2f}",
        ]
        for name, stage in stages.items()
    }
    changes = {
        f"{name} against no margin: {column}": cells
        for name in ("small", "large")
        for column, cells in differences(runs, stages[name], stages["no"], "helpfulness", RATING_COLUMNS)
    }
    columns = [*(name for name, _ in RATING_COLUMNS), "distance of the scores"]
    return table("", columns, rows) + "\n\n" + table("points", DIFFERENCE_HEAD, changes)


def safety_loss_tables(runs: Sequence[Path]) -> str:
    """Table 29: the safety model without and with the safety loss; then what the loss changes."""
    stages = {"without": "safety_without_loss", "with": "safety_with_loss"}
    rows: dict[str, list[str]] = {}
    by_seed: dict[str, list[str]] = {}
    for name, stage in stages.items():
        flagged = {
            safe: [flag for run in runs for flag in scored(run, stage, "safety").below_half(safe=safe)]
            for safe in (False, True)
        }
        rows[f"{name} the safety loss"] = [
            *accuracies(runs, stage, "safety", SAFETY_COLUMNS),
            accuracy_cell(flagged[False]),
            accuracy_cell(flagged[True]),
        ]
        found = [scored(run, stage, "safety") for run in runs]
        for measure, each in (
            ("unsafe found", [mean(one.below_half(safe=False)) for one in found]),
            ("safe flagged", [mean(one.below_half(safe=True)) for one in found]),
            (
                f"unsafe found where {SAFE_FLAGGED:.1%} of the safe are flagged",
                [one.found_at(SAFE_FLAGGED) for one in found],
            ),
        ):
            by_seed[f"{name} the safety loss: {measure}"] = [
                " / ".join(f"{share:.3f}" for share in each),
                f"{mean(each):.3f}",
                "",
                seed_interval(each, ".3f"),
            ]
    changes = dict(differences(runs, stages["with"], stages["without"], "safety", SAFETY_COLUMNS))
    columns = [*(name for name, _ in SAFETY_COLUMNS), "recall of unsafe at 0.5", "safe below 0.5"]
    parts = [("", columns, rows), ("shares", DIFFERENCE_HEAD, by_seed), ("points", DIFFERENCE_HEAD, changes)]
    return "\n\n".join(table(*part) for part in parts)


def crosswise_table(runs: Sequence[Path]) -> str:
    """Table 8: each model on its own and on the other's pairs."""
    models = {"safety RM": "safety_with_loss", "helpfulness RM": "helpfulness_small_margin"}
    rows = {
        f"{name} on {domain} pairs": accuracies(runs, stage, domain, RATING_COLUMNS)
        for domain in ("safety", "helpfulness")
        for name, stage in models.items()
    }
    return table("", [name for name, _ in RATING_COLUMNS], rows)


def scaling_table(runs: Sequence[Path]) -> str:
    """Figure 6: accuracy of each size (rows) after so many pairs (columns)."""
    summaries = [summary_of(run) for run in runs]
    named = [re.fullmatch(r"(.+)_(\d+)", stage) for stage in summaries[0]["stages"]]
    cells: dict[str, dict[int, str]] = {}
    for name in named:
        if name is None:
            continue
        overall = [summary["stages"][name[0]]["accuracy"]["overall"] for summary in summaries]
        (model,) = runs[0].glob(f"stages/*-{name[0]}/model/model.safetensors")
        row = f"{name[1]}, {parameters(model):,} parameters"
        values = [seed["accuracy"] for seed in overall]
        seeds = " / ".join(f"{value:.3f}" for value in values)
        cells.setdefault(row, {})[int(name[2])] = f"{mean(values):.3f} ({seeds})"
    columns = sorted({count for row in cells.values() for count in row})
    rows = {name: [row[count] for count in columns] for name, row in cells.items()}
    return table("pairs", [f"{count:,}" for count in columns], rows)


def parameters(weights: Path) -> int:
    """How many numbers a safetensors file holds."""
    with safe_open(weights, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def tables(run: Path) -> str:
    """All tables that a run has the models for."""
    runs = runs_of(run)
    recipe = summary_of(runs[0], "reward-models", "reward-scaling")["recipe"]
    if recipe == "reward-scaling":
        return scaling_table(runs)
    return "\n\n".join(made(runs) for made in (margin_tables, safety_loss_tables, crosswise_table))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directory that is named."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of one of the two recipes")
    run: Path = parser.parse_args(arguments).run
    return exit_code(lambda: print(tables(run)))


if __name__ == "__main__":
    sys.exit(main())
