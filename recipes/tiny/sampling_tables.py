"""Tables of docs/results/sampling.md from a run of `sampling.yaml`, a column for each seed.

python recipes/tiny/sampling_tables.py RUN

The reward models choose, the oracle judges: the true helpfulness of the best of n is what the oracle says of the
answer that R_c puts first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.jsonl import read_rows
from llama2_chat.recipes.tiny.tables import exit_code, parser_of, runs_of, summary_of, table
from llama2_chat.testbed.oracle import grade

if TYPE_CHECKING:
    from torch import Tensor

SEARCHES = ("sft", "rejection_sampling", "ppo")
RARE = ("opposites", "translate")
POLICIES = ("sft", "v1", "v2_last", "v2_pool", "rejection_sampling", "ppo")


def searched(run: Path, policy: str) -> dict[float, tuple[Tensor, Tensor]]:
    """Rewards and true scores (P, K) of a stage's temperature search, by temperature."""
    import torch  # which `--help` can do without

    (folder,) = run.glob(f"stages/*-temperature_of_{policy}")
    found = json.loads((folder / "temperature.json").read_text(encoding="utf-8"))
    count, samples = found["prompts"] * found["samples_per_prompt"], found["samples_per_prompt"]
    rows = (row for _, row in read_rows(folder / "temperature_samples.jsonl"))
    tables = {}
    for entry in found["temperatures"]:
        pairs = [(_reward(row), _truth(row)) for row in islice(rows, count)]
        columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)]
        tables[entry["temperature"]] = (columns[0].view(-1, samples), columns[1].view(-1, samples))
    return tables


def _reward(row: Mapping[str, Any]) -> float:
    """R_c, 0 for an answer that may not be kept."""
    return float(row["scores"]["combined"]) if row["status"] == "complete" else 0.0


def _truth(row: Mapping[str, Any]) -> float:
    return grade(row["prompt"], row["response"]).helpfulness


def best_of_table(runs: Sequence[Path]) -> str:
    """Figure 7 at temperature 1: R_c of the best and the middle of n, and the true score of the best."""
    from llama2_chat.rejection_sampling.best_of import (
        expected_maximum,
        expected_median,
        sample_counts,
        true_score_of_best,
    )

    rows: dict[str, list[str]] = {}
    for policy in SEARCHES:
        tables = [searched(run, policy)[1.0] for run in runs]
        for n in sample_counts(tables[0][0].shape[1]):
            rows[f"{policy}, n = {n}"] = [
                " / ".join(f"{expected_maximum(rewards, size=n).mean():.3f}" for rewards, _ in tables),
                " / ".join(f"{expected_median(rewards, size=n).mean():.3f}" for rewards, _ in tables),
                " / ".join(_with_interval(true_score_of_best(*both, size=n)) for both in tables),
            ]
    return table("", ["highest R_c", "median R_c", "true helpfulness of the highest"], rows)


def temperature_table(runs: Sequence[Path]) -> str:
    """Figure 8: the best of 16 at each temperature, as R_c and as the truth, and where each is highest."""
    from llama2_chat.rejection_sampling.best_of import expected_maximum, true_score_of_best

    rows: dict[str, list[str]] = {}
    temperatures = list(searched(runs[0], SEARCHES[0]))
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "R_c": lambda rewards, truths: expected_maximum(rewards, size=rewards.shape[1]),
        "truth": lambda rewards, truths: true_score_of_best(rewards, truths, size=rewards.shape[1]),
    }
    for name, measure in measures.items():
        for policy in SEARCHES:
            by_run = [
                [measure(*both).mean().item() for both in searched(run, policy).values()] for run in runs
            ]
            best = [f"{temperatures[means.index(max(means))]:g}" for means in by_run]
            cells = [" / ".join(f"{seed:.3f}" for seed in column) for column in zip(*by_run, strict=True)]
            rows[f"{policy}: {name}"] = [*cells, " / ".join(best)]
    return table("best of 16", [*(f"T = {value:g}" for value in temperatures), "best T"], rows)


def forgetting_table(runs: Sequence[Path]) -> str:
    """Greedy correctness in the skills that became rare, and in all others."""
    rows: dict[str, list[str]] = {}
    for policy in POLICIES:
        found = [_evaluation(run)[policy] for run in runs]
        families = [row["correctness_greedy_by_family"] for row in found]
        rest = [[value for name, value in one.items() if name not in RARE] for one in families]
        rows[policy] = [
            *(" / ".join(f"{one[name]:.3f}" for one in families) for name in RARE),
            " / ".join(f"{sum(one) / len(one):.3f}" for one in rest),
        ]
    return table("greedy correctness", [*RARE, "mean of the other families"], rows)


def policy_table(runs: Sequence[Path]) -> str:
    """True helpfulness and violations with intervals."""
    rows = {}
    for policy in POLICIES:
        found = [_evaluation(run)[policy] for run in runs]
        rows[policy] = [
            " / ".join(_interval(one, name) for one in found)
            for name in ("oracle_helpfulness", "oracle_violation_rate")
        ]
    return table("", ["true helpfulness at T = 1", "violations"], rows)


def _interval(found: Mapping[str, Any], name: str) -> str:
    interval = found["intervals"][name]
    return f"{found[name]:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _evaluation(run: Path) -> dict[str, Any]:
    evaluation: dict[str, Any] = summary_of(run)["evaluation"]
    return evaluation


def _with_interval(values_P: Tensor) -> str:
    from llama2_chat.rejection_sampling.best_of import bootstrap_interval

    low, high = bootstrap_interval(values_P.unsqueeze(1), seed=0)
    return f"{values_P.mean():.3f} ({low.item():.3f} to {high.item():.3f})"


def tables(runs: Sequence[Path]) -> str:
    """All tables, one after the other."""
    made = (best_of_table, temperature_table, policy_table, forgetting_table)
    return "\n\n".join(one(runs) for one in made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directory that is named."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of sampling.yaml")
    run: Path = parser.parse_args(arguments).run
    return exit_code(lambda: print(tables(runs_of(run))))


if __name__ == "__main__":
    sys.exit(main())
