"""Tables and figures of docs/results/safety.md from a run of `context_distillation.yaml`.

python recipes/tiny/distillation_tables.py RUN [--figures FOLDER]

First every seed alone, with 95 % intervals over prompts; then what each way to distil changes, prompt by prompt,
against the policy that all start from; what was kept; the preprompts compared (Fig. 16a); last RLHF with and without
adversarial prompts (Fig. 14). The figures are `context_distillation.png` and `adversarial_prompts.png`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.evaluation.statistics import Interval, mean, mean_interval, share_interval
from llama2_chat.recipes.tiny.ppo_tables import Measure, Run
from llama2_chat.recipes.tiny.tables import (
    DIFFERENCE_HEAD,
    difference_cells,
    exit_code,
    parser_of,
    runs_of,
    summary_of,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE = "context-distillation"
START = "sft"
MIX = "mixed_in_alone"
ARMS = ("targeted", "without_templates", "without_reward_model", "all_prompts", "untargeted")
WITHOUT, WITH = RLHF = ("rlhf_without_adversarial", "rlhf_with_adversarial")

MEASURES = {
    "violations": Measure("safety", lambda row: float(not row["oracle_safe"]), is_share=True),
    "borderline refused": Measure("borderline", lambda row: float(row["refused"]), is_share=True),
    "harmless refused": Measure("helpful", lambda row: float(row["refused"])),
    "true helpfulness": Measure("helpful", lambda row: float(row["oracle_helpfulness"])),
    "worth of refusals": Measure("safety", lambda row: float(row["oracle_helpfulness"])),
    "R_s": Measure("safety", lambda row: float(row["scores"]["safety"])),
    "R_h": Measure("helpful", lambda row: float(row["scores"]["helpfulness"])),
}
"""Worth of refusals: the oracle's helpfulness of answers to unsafe prompts, most where a refusal names the reason."""

COMPARED = ("violations", "borderline refused", "harmless refused", "true helpfulness", "worth of refusals")
_DRAWN = ("violations", "borderline refused", "harmless refused")


def points(run: Path, policy: str, name: str) -> dict[str, float]:
    """A measure of a policy for each held-out prompt, the mean over its samples."""
    return Run(run).points(policy, MEASURES[name])


def interval(run: Path, policy: str, name: str) -> Interval:
    """A measure's mean over prompts with its 95 % interval."""
    found = list(points(run, policy, name).values())
    if MEASURES[name].is_share:
        return share_interval([point == 1.0 for point in found])
    return mean_interval(found)


def differences(run: Path, ours: str, other: str, name: str) -> list[float]:
    """A measure of one policy less another's, prompt by prompt."""
    left, right = (points(run, policy, name) for policy in (ours, other))
    return [left[prompt] - right[prompt] for prompt in left]


def seed_table(run: Path, policies: Sequence[str], names: Sequence[str]) -> str:
    """Policies of one run, with 95 % intervals over prompts."""
    rows = {
        spoken(policy): [cell(interval(run, policy, name), name) for name in names] for policy in policies
    }
    return table(title_of(run), names, rows)


def cell(found: Interval, name: str) -> str:
    """A mean with its interval."""
    style = ".2f" if name.startswith("R_") else ".3f"
    return f"{found['mean']:{style}} ({found['low']:{style}} to {found['high']:{style}})"


def difference_rows(
    runs: Sequence[Path], pairs: Sequence[tuple[str, str]], names: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """For each pair of policies and each measure: every seed's difference, the mean, both intervals."""
    for ours, other in pairs:
        for name in names:
            by_seed = [differences(run, ours, other, name) for run in runs]
            yield f"{spoken(ours)}: {name}", difference_cells(by_seed)


def selection_table(runs: Sequence[Path]) -> str:
    """What each arm was given and kept, all seeds, and the shares that the safety model takes for unsafe."""
    names = ("prompts", "kept", "unsafe_original", "unsafe_preprompted", "unsafe_selected")
    rows = {}
    for arm in ARMS:
        found = [selection_of(run, arm) for run in runs]
        rows[spoken(arm)] = [
            " / ".join(f"{one[name]:.3f}" if name.startswith("unsafe") else str(one[name]) for one in found)
            for name in names
        ]
    return table("selection", [spoken(name) for name in names], rows)


def preprompt_table(runs: Sequence[Path]) -> str:
    """Fig. 16a: the same prompts without a preprompt, with the generic one, with the answer template too."""
    found = [selection_of(run, "targeted")["by_preprompt"] for run in runs]
    rows = {
        name: [
            " / ".join(f"{one[name]['safety']:.2f}" for one in found),
            " / ".join(f"{one[name]['unsafe']:.3f}" for one in found),
        ]
        for name in ("none", "generic", "category")
    }
    return table("preprompt", ["mean safety score", "share unsafe"], rows)


def selection_of(run: Path, arm: str) -> Mapping[str, Any]:
    """The `selection` of a stage's metrics."""
    selection: Mapping[str, Any] = summary_of(run)["stages"][arm]["selection"]
    return selection


def title_of(run: Path) -> str:
    """`seed 0`."""
    return f"seed {summary_of(run)['seed']}"


def spoken(name: str) -> str:
    """A stage's name as words."""
    return name.replace("_", " ")


def tables(runs: Sequence[Path]) -> str:
    """All tables, one after the other."""
    parts = [seed_table(run, (START, MIX, *ARMS), list(MEASURES)) for run in runs]
    for other in (START, MIX):
        arms = [(arm, other) for arm in ARMS]
        changes = dict(difference_rows(runs, arms, COMPARED))
        parts.append(table(f"less {spoken(other)}", DIFFERENCE_HEAD, changes))
    parts += [selection_table(runs), preprompt_table(runs)]
    parts += [seed_table(run, RLHF, list(MEASURES)) for run in runs]
    adversarial = difference_rows(runs, [(WITH, WITHOUT)], list(MEASURES))
    parts.append(table(f"less {spoken(WITHOUT)}", DIFFERENCE_HEAD, dict(adversarial)))
    return "\n\n".join(parts)


def write_figures(runs: Sequence[Path], folder: Path) -> None:
    """Fig. 16 with what the arms come to, and Fig. 14; scores of the first run, rates of all."""
    from llama2_chat.report.distillation_figures import panels_of  # matplotlib, which `--help` can do without
    from llama2_chat.report.drawing import panels
    from llama2_chat.report.run_record import read_run

    folder.mkdir(parents=True, exist_ok=True)
    stage = read_run(runs[0]).stage("targeted")
    assert stage is not None
    drawn = {panel.name: panel for panel in panels_of(stage)}
    with panels(folder / "context_distillation.png", 1, 3, (12.5, 3.8)) as ((first, second, third),):
        for axes, name in ((first, "before_and_after"), (second, "preprompts")):
            drawn[name].draw(axes)
            axes.set_title(drawn[name].title)
        _draw_rates(third, runs)
    with panels(folder / "adversarial_prompts.png", 1, 2, (8.4, 4.0)) as ((first, second),):
        _draw_scores(first, runs[0], "R_s", "Safety RM, unsafe prompts")
        _draw_scores(second, runs[0], "R_h", "Helpfulness RM, harmless prompts")


def _draw_rates(axes: Axes, runs: Sequence[Path]) -> None:
    """Rates of the policies: a dot for each seed, a line through the means."""
    from llama2_chat.report.drawing import COLOURS, INK

    policies = (START, MIX, *ARMS)
    for place, name in enumerate(_DRAWN):
        shift = 0.2 * (place - 1)
        for y, policy in enumerate(policies):
            rates = [100 * mean(list(points(run, policy, name).values())) for run in runs]
            label = name if y == 0 else None
            axes.plot(
                rates, [y + shift] * len(rates), "o", ms=4, alpha=0.6, color=COLOURS[place], label=label
            )
            axes.plot(mean(rates), y + shift, "|", ms=11, mew=2, color=COLOURS[place])
    axes.set_yticks(range(len(policies)), [spoken(policy) for policy in policies])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_xlim(left=-2)
    axes.set_xlabel("% of held-out prompts (dots: seeds, bars: means)")
    axes.set_title("Violations and false refusals")
    axes.legend(loc="center right")


def _draw_scores(axes: Axes, run: Path, name: str, title: str) -> None:
    """Fig. 14: each prompt's score after RLHF with adversarial prompts against without."""
    from llama2_chat.report.drawing import COLOURS, SOFT

    without, with_them = (points(run, policy, name) for policy in RLHF)
    xs, ys = [without[prompt] for prompt in without], [with_them[prompt] for prompt in without]
    ends = [min(*xs, *ys), max(*xs, *ys)]
    axes.plot(ends, ends, color=SOFT, linestyle=":", linewidth=1)
    axes.scatter(xs, ys, s=10, color=COLOURS[0 if name == "R_s" else 1], alpha=0.55, linewidths=0)
    axes.set_xlabel("RLHF without adversarial prompts")
    axes.set_ylabel("with adversarial prompts")
    axes.set_title(title)


def show(run: Path, figures: Path | None) -> None:
    """Print the tables of a run directory, and draw its figures if a folder is named.

    Raises:
        UserInputError: no run of this recipe is finished there.
    """
    runs = runs_of(run)
    for one in runs:
        summary_of(one, RECIPE)
    print(tables(runs))
    if figures is not None:
        write_figures(runs, figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directory that is named, and draw its figures if a folder is."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help=f"run directory of {RECIPE.replace('-', '_')}.yaml"
    )
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figures there")
    given = parser.parse_args(arguments)
    return exit_code(lambda: show(given.run, given.figures))


if __name__ == "__main__":
    sys.exit(main())
