"""Which instruction a dialogue gets."""

from __future__ import annotations

from random import Random

import pytest

from llama2_chat.ghost_attention import build
from llama2_chat.ghost_attention.instructions import (
    UNGROUPED,
    Instruction,
    draw_instruction,
    read_grouped_dialogues,
    read_instructions,
)


def test_instructions_are_drawn_as_configured() -> None:
    by_group = {
        "persona": [Instruction(f"Act as {n}.", f"Figure: {n}.", "persona") for n in range(5)],
        "hobby": [Instruction("You enjoy maps.", "Hobby: maps.", "hobby")],
        UNGROUPED: [Instruction("Be brief.")],
    }
    rng = Random(0)
    drawn = [
        draw_instruction(by_group, rng, about="hobby", max_instructions=2, short_fraction=0.25)
        for _ in range(4000)
    ]
    assert all("hobby" in one.groups and len(set(one.groups)) == len(one.groups) for one in drawn)
    # One or two, equally often; the second is either of the other groups; either may stand first.
    assert sum(len(one.groups) == 2 for one in drawn) == pytest.approx(2000, abs=130)  # 4 standard errors
    assert sum("persona" in one.groups for one in drawn) == pytest.approx(1000, abs=110)
    assert sum(one.groups[0] != "hobby" for one in drawn) == pytest.approx(1000, abs=110)
    assert sum(one.is_short for one in drawn) == pytest.approx(1000, abs=110)
    for one in drawn:
        assert ("Hobby: maps." in one.text) == one.is_short
        assert ("You enjoy maps." in one.text) != one.is_short
    assert {one.text for one in drawn if one.groups == ("hobby", UNGROUPED)} == {
        "You enjoy maps. Be brief.",
        "Hobby: maps. Be brief.",
    }
    plain = draw_instruction(
        {UNGROUPED: [Instruction("Be brief.")]}, rng, about=None, max_instructions=9, short_fraction=1.0
    )
    assert (plain.text, plain.is_short) == ("Be brief.", False)


def test_dialogues_are_instructed_about_their_group(ghost_config, instructed_world) -> None:
    config = ghost_config()
    by_group = read_instructions(config.instructions)
    grouped = read_grouped_dialogues(config.dialogues, list(by_group))
    instructed = build.instruct(grouped, by_group, config, seed=1)
    assert sum(one.group == "persona" for one in grouped) == 40
    assert all("persona" in i.instruction.groups for g, i in zip(grouped, instructed, strict=True) if g.group)
    assert build.instruct(grouped, by_group, config, seed=1) == instructed
    assert build.instruct(grouped, by_group, config, seed=2) != instructed
