"""The pipeline as a figure: one row for each stage in order, one lane for each model that later stages use.

A lane runs from the row that makes a model to the last row that uses it, with a dot at every row that does;
so the figure stays narrow however many stages there are, and no line crosses a box.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama2_chat.pipeline.custom_rewards import custom_reward_names
from llama2_chat.report.drawing import COLOURS
from llama2_chat.report.markup import Html, element, joined
from llama2_chat.report.measures import duration
from llama2_chat.report.run_record import RunRecord, StageRecord

_ROW, _BOX, _LANE, _WIDTH = 66, 50, 16, 560
_POLICY, _REWARD, _GREY = COLOURS[0], COLOURS[1], "#8b949e"


@dataclass
class Lane:
    """The life of one model: the row that makes it, the rows that use it, and its column."""

    name: str
    made: int
    used: list[int]
    reward_model: bool
    column: int = 0


def draw_pipeline(run: RunRecord) -> Html:
    """The stages with their inputs, outputs and times; models flow down the lanes on the left."""
    names = _row_names(run)
    lanes = _lanes(run, names)
    left = 14 + _LANE * (1 + max((lane.column for lane in lanes), default=0)) + 12
    height = _ROW * len(names) + 4
    # Lines first, from the outermost lane in, so that dots lie on top of what crosses them.
    lanes.sort(key=lambda lane: -lane.column)
    parts = [_draw_lane(lane, left) for lane in lanes]
    parts += [_draw_dots(lane, left) for lane in lanes]
    parts += [_draw_row(run, name, row, left) for row, name in enumerate(names)]
    return element(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label="The pipeline as run"
    )


def _row_names(run: RunRecord) -> list[str]:
    """The base model first, unless a stage makes it."""
    base = run.recipe.get("base_model")
    path = base.get("path") if isinstance(base, dict) else base
    stages = [stage.name for stage in run.stages]
    return stages if path in stages else ["base", *stages]


def _lanes(run: RunRecord, names: list[str]) -> list[Lane]:
    """One lane for each model that a later stage uses, each in the first column that is free."""
    rows = {name: row for row, name in enumerate(names)}
    rows.setdefault("base", 0)
    lanes: dict[str, Lane] = {}
    for stage in run.stages:
        for used in stage.inputs:
            source = names[rows[used.name]] if used.name in rows and not used.is_data else None
            if source is None or rows[source] >= rows[stage.name]:
                continue
            maker = run.stage(source)
            lane = lanes.setdefault(
                source, Lane(source, rows[source], [], bool(maker and maker.makes_reward_model))
            )
            if rows[stage.name] not in lane.used:
                lane.used.append(rows[stage.name])
    for lane in sorted(lanes.values(), key=lambda lane: lane.made):
        taken = {
            other.column
            for other in lanes.values()
            if other is not lane and other.made < lane.made < max(other.used)
        }
        lane.column = next(column for column in range(len(lanes) + 1) if column not in taken)
    return list(lanes.values())


def _draw_lane(lane: Lane, left: int) -> Html:
    """The lane in its model's colour; where it is used a dot, and a grey line from there into the row."""
    colour = _REWARD if lane.reward_model else _POLICY
    x = left - 12 - _LANE * (lane.column + 1)
    top, bottom = _middle(lane.made) + 9, _middle(lane.used[-1]) - 9
    line = f"M{left} {top} H{x + 7} Q{x} {top} {x} {top + 7} V{bottom}"
    parts = [element("path", d=line, fill="none", stroke=colour, stroke_width=2)]
    for y in (_middle(row) - 9 for row in lane.used):
        parts += [
            element("path", d=f"M{x} {y} H{left - 7}", fill="none", stroke=_GREY, stroke_width=1.5),
            element("path", d=f"M{left - 8} {y - 4} L{left - 1} {y} L{left - 8} {y + 4} Z", fill=_GREY),
        ]
    return joined(parts)


def _draw_dots(lane: Lane, left: int) -> Html:
    colour = _REWARD if lane.reward_model else _POLICY
    x = left - 12 - _LANE * (lane.column + 1)
    return joined(element("circle", cx=x, cy=_middle(row) - 9, r=4, fill=colour) for row in lane.used)


def _draw_row(run: RunRecord, name: str, row: int, left: int) -> Html:
    y = row * _ROW + (_ROW - _BOX) / 2
    stage = run.stage(name)
    colour = _POLICY
    if stage is not None and not stage.makes_policy:
        colour = _REWARD if stage.makes_reward_model else _GREY
    waiting = stage is not None and not stage.done
    box = element(
        "rect",
        x=left,
        y=y,
        width=_WIDTH - left - 2,
        height=_BOX,
        rx=5,
        fill="#fff" if waiting else "#f5f7f9",
        stroke=colour,
        stroke_opacity="0.55",
        stroke_dasharray="4 3" if waiting else None,
    )
    room = int((_WIDTH - left - 26) / 6.6)
    if stage is None:
        title, kind, right, below = "base", "base model", "", _base_name(run)
    else:
        title, kind = f"{stage.number}  {name}", stage.kind.replace("_", " ")
        right = duration(stage.seconds) if stage.seconds is not None else "not done"
        below = f"{_inputs_text(stage)} → {_output_text(stage)}"
    heading = element(
        "text",
        element("tspan", _cut(title, room - 30), font_weight="600", fill="#1f2328"),
        element("tspan", kind if kind != name.replace("_", " ") else "", dx=10, fill="#636c76", font_size=13),
        x=left + 12,
        y=y + 21,
        font_size=15,
    )
    time = element("text", right, x=_WIDTH - 14, y=y + 21, font_size=13, fill="#636c76", text_anchor="end")
    detail = element("text", _cut(below, room), x=left + 12, y=y + 40, font_size=13, fill="#4a525a")
    return joined([box, heading, time, detail])


def _inputs_text(stage: StageRecord) -> str:
    """Data to train on and custom rewards by name; models are seen in the lanes."""
    data = [used.name for used in stage.inputs if used.is_data and used.field != "held_out"]
    data += custom_reward_names(stage.config)
    return ", ".join(dict.fromkeys(data)) if data else "no data of its own"


def _output_text(stage: StageRecord) -> str:
    selection = stage.metrics.get("selection")
    kept = selection.get("kept") if isinstance(selection, dict) else None
    made = f"{kept:,} kept answers → " if isinstance(kept, int) else ""
    if stage.makes_policy:
        return f"{made}policy"
    result = "reward model" if stage.makes_reward_model else "preference pairs"
    domain = stage.config.get("domain")
    return f"{domain} {result}" if domain else result


def _base_name(run: RunRecord) -> str:
    base = run.recipe.get("base_model")
    path = str(base.get("path", "") if isinstance(base, dict) else base)
    # The folder's name says enough; where it lay does not belong in a report that is mailed.
    return path.rstrip("/").rsplit("/", 1)[-1] if path.startswith("/") else path


def _middle(row: int) -> float:
    return row * _ROW + _ROW / 2


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
