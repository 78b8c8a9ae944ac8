"""recipes/tiny/context_distillation.yaml: what docs/results/safety.md says of the filters, on each of three seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import Interval, mean_interval
from llama2_chat.recipes.tiny.distillation_tables import (
    START,
    WITH,
    WITHOUT,
    differences,
    interval,
    main,
    selection_of,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def whole_run(finished_run: Callable[..., Path]) -> Path:
    """A finished run of all seeds; with LLAMA2_CHAT_DISTILLATION_RUN one that is kept there."""
    return finished_run("context_distillation.yaml", kept="LLAMA2_CHAT_DISTILLATION_RUN")


def change(run: Path, ours: str, other: str, name: str) -> Interval:
    """Mean over prompts of ours less the other's, with its 95 % interval."""
    return mean_interval(differences(run, ours, other, name))


@pytest.mark.parametrize("arm", ["targeted", "without_templates"])
def test_targeted_distillation_makes_safer_and_refuses_no_more(run: Path, arm: str) -> None:
    """Violations: intervals apart. False refusals: not above what they were, outside the interval over prompts."""
    assert interval(run, arm, "violations")["high"] < interval(run, START, "violations")["low"]
    for name in ("borderline refused", "harmless refused"):
        assert change(run, arm, START, name)["low"] <= 0


def test_untargeted_distillation_refuses_what_is_harmless(run: Path) -> None:
    """More than before, and more than targeted: the intervals over prompts leave out 0."""
    for name in ("borderline refused", "harmless refused"):
        for other in (START, "targeted"):
            assert change(run, "untargeted", other, name)["low"] > 0
    assert change(run, "untargeted", START, "true helpfulness")["high"] < 0


def test_the_reward_models_filter_does_not_replace_the_choice_of_prompts(run: Path) -> None:
    """A safety reward model likes refusals of harmless questions: on all prompts its filter does not keep them out."""
    assert change(run, "all_prompts", START, "harmless refused")["low"] > 0


def test_answer_templates_score_higher_than_the_generic_preprompt(run: Path) -> None:
    """Fig. 16a, the same prompts; and the refusals that are learnt are worth more."""
    found = selection_of(run, "targeted")["by_preprompt"]
    assert found["none"]["safety"] < found["generic"]["safety"] < found["category"]["safety"]
    assert change(run, "targeted", "without_templates", "worth of refusals")["low"] > 0


def test_adversarial_prompts_in_rlhf_raise_safety_and_leave_helpfulness(run: Path) -> None:
    """Fig. 14."""
    assert change(run, WITH, WITHOUT, "R_s")["low"] > 0
    assert change(run, WITH, WITHOUT, "violations")["high"] < 0
    assert abs(change(run, WITH, WITHOUT, "true helpfulness")["mean"]) < 0.05


def test_tables_and_figures_are_made(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(whole_run), "--figures", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n\n") == 10
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"adversarial_prompts.png", "context_distillation.png"}
    assert max(sizes.values()) < 200_000
