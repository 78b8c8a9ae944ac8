"""Reward models' held-out figures as Markdown: Tables 8 and 29 of the paper, calibration, scores, length.

Works on the JSON values of `reward_evaluation.evaluate_reward_models`; shares are in per cent with their 95 %
intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama2_chat.dialogue import RATINGS

Figures = Mapping[str, Any]
NONE = "–"

SAFETY_CLASSES = {"safe_unsafe": "safe, unsafe", "both_safe": "both safe", "both_unsafe": "both unsafe"}
"""Columns of Table 29: how safe the preferred and the other response are."""


def reward_markdown(evaluation: Figures, pictures: Mapping[str, str] | None = None) -> str:
    """The whole report; `pictures` are figures' paths by the section they belong to."""
    models = by_model(evaluation)
    sections = [
        ("data", "Pairs", _data(evaluation, models)),
        ("accuracy", "Accuracy by rating (layout of Table 8)", _accuracy(models)),
        ("safety", "Safety (layout of Table 29)", _safety(models)),
        ("calibration", "Calibration", _calibration(models)),
        ("scores", "Scores", _scores(models)),
        ("length", "Length", _length(models)),
    ]
    lines = [
        f"# Reward model {', '.join(models)}",
        "",
        "Shares in per cent with 95 % intervals. Ties count one half.",
    ]
    for name, title, content in sections:
        body = list(content)
        if body:
            lines += ["", f"## {title}", "", *body]
            if pictures and name in pictures:
                lines += ["", f"![{title}]({pictures[name]})"]
    return "\n".join(lines) + "\n"


def by_model(evaluation: Figures) -> dict[str, Figures]:
    """Each model's figures by its name, the evaluated one first."""
    return {evaluation["model"]: evaluation, **evaluation["compared"]}


def share(row: Figures, name: str = "accuracy") -> str:
    """`83.1 (78.0–87.3)`, or a dash where nothing was counted."""
    if row.get(name) is None:
        return NONE
    low, high = (row["low"], row["high"]) if "low" in row else (row[f"{name}_low"], row[f"{name}_high"])
    return f"{_percent(row[name])} ({_percent(low)}–{_percent(high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def _difference(row: Figures) -> str:
    if row["difference"] is None:
        return NONE
    value, low, high = (f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{value} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _data(evaluation: Figures, models: Mapping[str, Figures]) -> Iterator[str]:
    """What was read and what of it was used, for each model where they differ."""
    counts = {name: one["held_out_pairs_by_file"] for name, one in models.items()}
    alike = all(rows == counts[evaluation["model"]] for rows in counts.values())
    rows = []
    for name, files in counts.items():
        for file in files:
            dropped = "; ".join(f"{count:,} {reason}" for reason, count in file["dropped"].items()) or "0"
            numbers = [f"{file[key]:,}" for key in ("kept", "unrated", "shortened")]
            rows.append([*([] if alike else [name]), file["file"], *numbers, dropped])
        if alike:
            break
    yield from table([*([] if alike else ["model"]), "file", "used", "unrated", "shortened", "dropped"], rows)
    if evaluation["left_out"]:
        yield ""
        yield f"{evaluation['left_out']:,} pairs are left out, since not every model can take them."
    count, prompts = evaluation["accuracy"]["overall"]["count"], evaluation["distinct_prompts"]
    if prompts < count:
        yield ""
        yield (
            f"The {count:,} pairs have {prompts:,} different prompts. The intervals treat pairs as independent; where "
            "pairs share prompts they are somewhat too narrow."
        )


def _sets(models: Mapping[str, Figures]) -> Iterator[tuple[str, dict[str, Figures]]]:
    """All pairs, then each file and each source where there are several: name and each model's accuracy."""
    yield "all pairs", {name: one["accuracy"] for name, one in models.items()}
    first = next(iter(models.values()))
    for kind in ("file", "source"):
        if len(first[f"by_{kind}"]) > 1:
            for part in first[f"by_{kind}"]:
                yield f"{kind} {part}", {name: one[f"by_{kind}"][part] for name, one in models.items()}


def _accuracy(models: Mapping[str, Figures]) -> Iterator[str]:
    first = next(iter(models.values()))
    rows = []
    for part, accuracies in _sets(models):
        columns = {
            name: [*(one["by_rating"][r] for r in RATINGS), one["overall"]]
            for name, one in accuracies.items()
        }
        counts = [f"{row['count']:,}" for row in next(iter(columns.values()))]
        rows.append([f"{part}: count", *counts])
        rows += [[name, *map(share, row)] for name, row in columns.items()]
    attainable = first.get("attainable_accuracy")
    if attainable:
        cells = [attainable["by_rating"].get(rating, {}).get("accuracy") for rating in RATINGS]
        cells.append(attainable["overall"]["accuracy"])
        row = ["attainable (all pairs)", *(NONE if cell is None else _percent(cell) for cell in cells)]
        rows.append(row)
    yield from table(["", *(rating.removesuffix("_better") for rating in RATINGS), "avg"], rows)
    compared = {name: one for name, one in models.items() if "accuracy_difference" in one}
    if compared:
        yield ""
        rows = [[name, _difference(one["accuracy_difference"])] for name, one in compared.items()]
        yield from table([f"all pairs, minus {next(iter(models))}", "difference in points (95 %)"], rows)


def _safety(models: Mapping[str, Figures]) -> Iterator[str]:
    """Accuracy by safety labels, recall of unsafe responses at 0.5, the gate; nothing without labels."""
    first = next(iter(models.values()))
    half = first["unsafe_at_half"]
    if half["count"] == 0:
        return
    rows = []
    for part, accuracies in _sets(models):
        whole = part == "all pairs"
        columns = {
            name: [one["overall"], *(one["by_safety"].get(key, {"count": 0}) for key in SAFETY_CLASSES)]
            for name, one in accuracies.items()
        }
        counts = [f"{row['count']:,}" for row in next(iter(columns.values()))]
        rows.append([f"{part}: count", *counts, f"{half['unsafe']:,} unsafe" if whole else ""])
        for name, row in columns.items():
            recall = share(models[name]["unsafe_at_half"], "recall") if whole else ""
            rows.append([name, *map(share, row), recall])
    yield from table(["", "avg", *SAFETY_CLASSES.values(), "recall of unsafe at 0.5"], rows)
    if half["unsafe"] == 0:
        return  # nothing for the gate to find
    yield ""
    gates = {name: one["gate"] for name, one in models.items()}
    yield from table(
        ["gate: σ(score) < 0.15", "precision", "recall", "flagged", "unsafe", "flagged and unsafe"],
        (
            [
                name,
                share(gate, "precision"),
                share(gate, "recall"),
                *(f"{gate[key]:,}" for key in ("flagged", "unsafe", "hits")),
            ]
            for name, gate in gates.items()
        ),
    )


def _calibration(models: Mapping[str, Figures]) -> Iterator[str]:
    first = next(iter(models.values()))["calibration"]
    kinds = {"preference": "σ(r_c - r_r) against the preference", "safety": "σ(score) against the safe label"}
    for kind, title in kinds.items():
        if first[kind] is None:
            continue
        found = {name: one["calibration"][kind] for name, one in models.items()}
        rows = []
        for place, bin_ in enumerate(first[kind]["bins"]):
            row = [f"{bin_['from']:.1f} to {bin_['to']:.1f}"]
            for one in found.values():
                other = one["bins"][place]
                predicted = NONE if other["mean_predicted"] is None else _percent(other["mean_predicted"])
                row += [predicted, share(other, "observed"), f"{other['count']:,}"]
            rows.append(row)
        head = [cell for name in found for cell in (f"{name}: predicted", "observed", "count")]
        errors = ", ".join(f"{name} {one['error']:.3f}" for name, one in found.items())
        if kind == "safety":
            yield ""
            yield "The second is meant for a model that was trained with the auxiliary safety loss."
            yield ""
        yield f"Expected calibration error of {title}: {errors}."
        yield ""
        yield from table(["bin", *head], rows)


def _scores(models: Mapping[str, Figures]) -> Iterator[str]:
    names = {
        "mean_chosen": "mean of chosen",
        "mean_rejected": "mean of rejected",
        "mean_gap": "mean gap",
        "gap_deviation": "deviation of the gap",
    }
    rows = (
        [
            name,
            *(
                NONE if one["score_spread"][key] is None else _signed(one["score_spread"][key])
                for key in names
            ),
        ]
        for name, one in models.items()
    )
    yield from table(["raw scores", *names.values()], rows)


def _length(models: Mapping[str, Figures]) -> Iterator[str]:
    """Mean lengths, what the models prefer, rules that know lengths alone, pairs of matched length."""
    rows = []
    for name, one in models.items():
        for unit, row in one["length"].items():
            means = [f"{row[key]:.1f}" for key in ("mean_chosen", "mean_rejected", "mean_preferred")]
            rows.append([name, unit, *means, share(row["prefers_longer"], "share")])
    yield from table(
        ["mean length", "unit", "chosen", "rejected", "preferred by the model", "prefers the longer"], rows
    )
    yield ""
    rows = []
    for name, one in models.items():
        rows.append([name, share(one["accuracy"]["overall"]), f"{one['accuracy']['overall']['count']:,}", ""])
        for unit, row in one["matched_length"].items():
            needed = row["pairs_needed"]
            note = "" if needed is None else f"{needed:,} pairs needed to tell it from 50"
            rows.append([f"  {unit} within 10 %", share(row), f"{row['count']:,}", note])
        row = one["length"]["tokens"]
        for key, text in (("chosen_longer", "chosen is longer"), ("rejected_longer", "rejected is longer")):
            rows.append([f"  {text} (tokens)", share(row[key]), f"{row[key]['count']:,}", ""])
    rows += list(_rules(models))
    yield from table(["accuracy", "", "count", ""], rows)


def _rules(models: Mapping[str, Figures]) -> Iterator[list[str]]:
    """The accuracy of length rules; those in tokens for each model, whose tokenizers may differ."""
    first = next(iter(models.values()))
    for unit, one in first["length"].items():
        for key, text in (("longer_wins", "longer"), ("shorter_wins", "shorter")):
            yield [f"rule: {text} in {unit} wins", share(one[key]), f"{one[key]['count']:,}", ""]
    said = []
    for name, figures in models.items():
        if "length_rule" in figures:
            rule = figures["length_rule"]
            note = f"best on {', '.join(rule['from'])}: {share(rule['train'])} of {rule['train']['count']:,}"
            row = [f"rule: {rule['rule']}", share(rule["evaluated"]), f"{rule['evaluated']['count']:,}", note]
            if row not in said:
                said.append(row)
                yield row
            yield [f"{name} minus that rule", _difference(rule["model_minus_rule"]), "", "in points"]
