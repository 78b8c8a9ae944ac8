"""The compact form of RLHF-V1, V2, … in a recipe (§3.2.3): what is given once and what one version has differently.

A section holds the fields of its kind of stage, which are checked where they come to stand: in the stages that
`iterations.py` makes of it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llama2_chat.settings import ModelReference, RewardReference, StrictModel

Fields = dict[str, Any]
"""Fields of a kind of stage, or some of them."""

FILLED_IN = {
    "preferences": ("kind", "policies", "domain", "iteration"),
    "reward": ("kind", "domain"),
    "rejection_sampling": ("kind", "policy", "helpfulness", "safety", "earlier_samples", "iteration"),
    "ghost_attention": ("kind", "policy"),
    "ppo": ("kind", "policy", "helpfulness", "safety"),
    "context_distillation": ("kind", "policy", "safety"),
}
"""By section, which is named as the kind of stage whose fields it holds: those that follow from the schedule."""


class _Section(BaseModel):
    """Keys of the schedule beside fields of a kind of stage."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    @property
    def fields(self) -> Fields:
        """The stage's fields."""
        return dict(self.model_extra or {})


class _BothDomains(_Section):
    """Fields for both domains, and what one of them has differently."""

    helpfulness: Fields | None = Field(
        default_factory=dict, description="Fields of this domain; null: none of it"
    )
    safety: Fields | None = Field(default_factory=dict, description="Fields of this domain; null: none of it")

    def of_domain(self, domain: str) -> Fields | None:
        """What the domain has differently; None where it is left out."""
        found: Fields | None = getattr(self, domain)
        return found


class PreferencesSection(_BothDomains):
    """New pairs that each version begins with: fields of the kind `preferences`."""

    variants: int = Field(2, ge=1, description="So many of the last policies answer")


class RewardSection(_BothDomains):
    """Reward models trained anew on all pairs so far: what differs from the reward stages at the start."""


class GhostAttentionSection(_Section):
    """Ghost Attention once: fields of the kind `ghost_attention`."""

    after: int = Field(3, ge=1, description="The version whose last policy it starts from")


class PpoSection(_Section):
    """PPO on top of rejection sampling: fields of the kind `ppo`."""

    first: int = Field(5, ge=1, alias="from", description="The first version that has it")


class VersionOverrides(StrictModel):
    """What one version has differently."""

    preferences: Fields | None = Field(default_factory=dict, description="null: no new pairs in this version")
    reward: Fields | None = Field(default_factory=dict, description="null: the reward models so far")
    rejection_sampling: Fields = Field(default_factory=dict)
    ghost_attention: Fields = Field(default_factory=dict)
    ppo: Fields = Field(default_factory=dict)


class IterationsConfig(StrictModel):
    """RLHF versions, each from the last policy before it: pairs, reward models, rejection sampling, PPO."""

    start: ModelReference = Field(description="The policy that V1 samples from: a stage, or `base`")
    helpfulness: RewardReference = Field(
        description="Helpfulness reward model at the start, or a custom reward"
    )
    safety: RewardReference | None = Field(
        None, description="Safety reward model at the start, or a custom reward; null: R_c = R_h"
    )
    count: int = Field(5, ge=1, le=99, description="The last version")
    preferences: PreferencesSection | None = None
    reward: RewardSection | None = Field(
        default_factory=RewardSection,
        description="How reward models are trained on the new pairs; null: they are not",
    )
    rejection_sampling: Fields = Field(description="Fields of the kind `rejection_sampling`")
    ghost_attention: GhostAttentionSection | None = None
    ppo: PpoSection | None = None
    context_distillation: Fields | None = Field(
        None, description="After the last version: fields of the kind `context_distillation`"
    )
    overrides: dict[str, VersionOverrides] = Field(
        default_factory=dict, description="v1, v2, …: what that version has differently"
    )

    def of_version(self, number: int) -> VersionOverrides:
        """What this version has differently; nothing for most."""
        return self.overrides.get(f"v{number}", VersionOverrides())
