"""Tables of docs/results/demo.md and docs/results/iterations.md from runs of `recipe.yaml` or `iterations.yaml`.

python recipes/tiny/run_tables.py RUN [RUN ...] [--by-policy]

A column for each run; with `--by-policy` one row for each policy, the runs side by side in a cell. Figures are those of
`summary.json`, intervals at 95 %.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2_chat.errors import UserInputError
from llama2_chat.recipes.tiny.tables import exit_code, parser_of, runs_of, summary_of, table

WITH_INTERVALS = {
    "oracle_helpfulness": "helpfulness at T = 1",
    "correctness_greedy": "greedy correctness",
    "best_of_8_oracle_helpfulness": "best of 8 by R_c, helpfulness",
    "random_of_8_oracle_helpfulness": "control: random pick of 8",
    "oracle_violation_rate": "violations on unsafe prompts",
    "win_rate_vs_sft": "win rate against SFT (R_c)",
    "kl_to_sft_nats": "KL to SFT, nats",
    "independent_reward_mean": "independent RM, mean score",
}
BY_POLICY = {
    "oracle_violation_rate": ("violations", 3),
    "win_rate_vs_sft": ("win rate against SFT", 3),
    "correctness_greedy": ("greedy correctness", 3),
    "independent_reward_mean": ("independent RM", 2),
    "kl_to_sft_nats": ("KL to SFT, nats", 2),
}


def reward_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy by rating, controls and calibration of every reward model that has held-out pairs of its own."""
    rows: dict[str, list[str]] = {}
    stages = next(iter(runs.values()))["stages"]
    for stage in [name for name, found in stages.items() if "accuracy" in found]:
        for column, run in enumerate(runs.values()):
            for name, value in _reward_figures(run["stages"][stage]).items():
                cells = rows.setdefault(
                    f"{stage.replace('_rm', ' RM').replace('_', ' ')}, {name}", ["-"] * len(runs)
                )
                cells[column] = f"{value:.3f}"
    return table("", list(runs), rows)


def _reward_figures(found: Mapping[str, Any]) -> dict[str, float]:
    figures = {"overall": found["accuracy"]["overall"]["accuracy"]}
    for rating in ("significantly_better", "better", "slightly_better", "negligibly_better"):
        if rating in found["accuracy"]["by_rating"]:
            figures[rating.replace("_", " ")] = found["accuracy"]["by_rating"][rating]["accuracy"]
    if found.get("attainable_accuracy"):
        figures["attainable: the true score"] = found["attainable_accuracy"]["overall"]["accuracy"]
    figures["control: length scorer"] = found["controls"]["length_scorer"]["accuracy"]
    if found["unsafe_recall"] is not None:
        figures["recall of unsafe at 0.5"] = found["unsafe_recall"]
    figures["calibration error"] = found["calibration_error"]
    return figures


def metric_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Every policy's figures, metric by metric, with intervals where there are any."""
    rows: dict[str, list[str]] = {}
    for metric, name in WITH_INTERVALS.items():
        for policy in _policies(runs):
            found = [run["evaluation"][policy] for run in runs.values()]
            if all(metric in one for one in found):
                rows[f"{_plain(policy)}: {name}"] = [_with_interval(one, metric) for one in found]
    for policy in _policies(runs):
        rates = [run["evaluation"][policy]["false_refusal_rate"] for run in runs.values()]
        rows[f"{_plain(policy)}: false refusals, helpful / borderline"] = [
            f"{rate['helpful']:.3f} / {rate['borderline']:.3f}" for rate in rates
        ]
    return table("", list(runs), rows)


def recall_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Recall of what the first message stated, at each turn that was asked."""
    rows = {}
    for policy in _policies(runs):
        recalls = [run["evaluation"][policy]["attribute_recall"] for run in runs.values()]
        rows[_plain(policy)] = [" / ".join(f"{value:.2f}" for value in recall.values()) for recall in recalls]
    turns = next(iter(runs.values()))["evaluation"]["sft"]["attribute_recall"]
    return table(f"turn {' / '.join(turns)}", list(runs), rows)


def time_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds of every stage by the clock."""
    stages = next(iter(runs.values()))["stages"]
    rows = {
        name: [f"{run['stages'][name]['wall_seconds']:.0f}" for run in runs.values()]
        for name in stages
        if stages[name]["wall_seconds"] >= 1
    }
    rows["the whole run"] = [f"{run['wall_seconds']:.0f}" for run in runs.values()]
    return table("seconds", list(runs), rows)


def by_policy_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a policy: how it comes along from version to version (layout after Figure 11)."""
    rows = {}
    for policy in _policies(runs):
        found = [run["evaluation"][policy] for run in runs.values()]
        cells = [" / ".join(_with_interval(one, "oracle_helpfulness") for one in found)]
        for metric, (_, digits) in BY_POLICY.items():
            cells.append(" / ".join(f"{one[metric]:.{digits}f}" if metric in one else "-" for one in found))
        recalls = [one["attribute_recall"] for one in found]
        cells.append(" / ".join(f"{recall['6']:.2f}, {recall['20']:.2f}" for recall in recalls))
        rows[_plain(policy)] = cells
    columns = ["true helpfulness at T = 1", *(name for name, _ in BY_POLICY.values()), "recall at turn 6, 20"]
    return table("policy", columns, rows)


def _policies(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [policy for policy in next(iter(runs.values()))["evaluation"] if policy != "base"]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _with_interval(found: Mapping[str, Any], metric: str) -> str:
    interval = found["intervals"].get(metric)
    value = f"{found[metric]:.3f}"
    return value if interval is None else f"{value} ({interval['low']:.3f} to {interval['high']:.3f})"


def tables(folders: Sequence[Path], *, by_policy: bool = False) -> str:
    """All tables, one after the other.

    Raises:
        UserInputError: the runs are not of one recipe.
    """
    summaries = [summary_of(run, "tiny", "iterations") for run in folders]
    named = ", ".join(map(str, folders))
    if len({tuple(found["stages"]) for found in summaries}) > 1:
        raise UserInputError(f"{named}: not the same stages; name runs of one recipe")
    if len({found["seed"] for found in summaries}) < len(summaries):
        raise UserInputError(f"{named}: a seed stands there twice; name one run for each seed")
    runs = {f"seed {found['seed']}": found for found in summaries}
    made = (
        (by_policy_table, time_table) if by_policy else (reward_table, metric_table, recall_table, time_table)
    )
    return "\n\n".join(one(runs) for one in made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directories that are named."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories, one a seed or a sweep's"
    )
    parser.add_argument("--by-policy", action="store_true", help="one row for each policy")
    options = parser.parse_args(arguments)
    return exit_code(
        lambda: print(
            tables([one for run in options.runs for one in runs_of(run)], by_policy=options.by_policy)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
