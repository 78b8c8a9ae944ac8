"""Values that the paper ties to the size of the model, held against a recipe: warnings, never errors."""

from __future__ import annotations

from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.reward.config import RewardConfig

_SMALLEST = 5e9
"""Below this the paper has no model to speak of."""
_BETWEEN_13B_AND_34B = 20e9
_BETWEEN_34B_AND_70B = 50e9


def paper_warnings(recipe: Recipe, parameters: int | None) -> list[str]:
    """Settings that the paper gives to models of another size; nothing where the size is not known.

    Only the paper's own values for other sizes are told: any other value is somebody's decision.
    Source: §3.2.3 (the coefficient β of the KL penalty), §3.2.2 (learning rate of reward models).
    """
    if parameters is None or parameters < _SMALLEST:
        return []
    small_beta, large_beta = 0.01, 0.005
    small_rate, large_rate = 1e-5, 5e-6
    beta, other_beta = (
        (small_beta, large_beta) if parameters < _BETWEEN_13B_AND_34B else (large_beta, small_beta)
    )
    rate, other_rate = (
        (small_rate, large_rate) if parameters < _BETWEEN_34B_AND_70B else (large_rate, small_rate)
    )
    size = f"a base of {parameters / 1e9:.0f} billion parameters"
    warnings = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, PpoConfig) and stage.kl_coefficient == other_beta:
            warnings.append(
                f"warning: stages.{name}.kl_coefficient: {other_beta:g} with {size}; the paper has 0.01 for 7B and "
                f"13B, 0.005 for 34B and 70B; set {beta:g}"
            )
        if isinstance(stage, RewardConfig) and stage.training.learning_rate == other_rate:
            warnings.append(
                f"warning: stages.{name}.training.learning_rate: {other_rate:g} with {size}; the paper has 5e-6 for "
                f"70B, 1e-5 otherwise; set {rate:g}"
            )
    return warnings
