"""Kinds of the names that `iterations` are written out in, as fakes that take no time, and a recipe of two versions.

Also a driver: `python fake_versions.py ARGUMENTS` is `llama2-chat ARGUMENTS` with these kinds.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

from fake_stages import FakeTraining, chain
from pydantic import Field

from llama2_chat.files import atomic_path, remove, sha256_of, write_text
from llama2_chat.pipeline.references import references
from llama2_chat.settings import (
    DataReference,
    ModelReference,
    PreferencesReference,
    RewardReference,
    RunSettings,
    SamplesReference,
    StrictModel,
)
from llama2_chat.stage import STAGE_KINDS, MadeData, Metrics, StageDirectory, StageKind

RECIPE = """\
name: versions
seed: 3
base_model: base_model
data:
  talks: talks.jsonl
  pairs: pairs.jsonl
stages:
  helpfulness_rm: {kind: reward, model: base, preferences: [pairs], domain: helpfulness}
  safety_rm: {kind: reward, model: base, preferences: [pairs], domain: safety, training: {steps: 3}}
iterations:
  start: base
  helpfulness: helpfulness_rm
  safety: safety_rm
  count: 2
  preferences: {prompts: [talks]}
  rejection_sampling: {prompts: [talks]}
  ppo: {from: 2, prompts: [talks]}
"""


class FakePairsConfig(StrictModel):
    """Pairs made of models and prompts."""

    kind: Literal["preferences"] = "preferences"
    policies: list[ModelReference]
    prompts: list[DataReference]
    domain: str
    iteration: int
    training: FakeTraining = FakeTraining()


class FakeRewardConfig(StrictModel):
    """A reward model made of pairs."""

    kind: Literal["reward"] = "reward"
    model: ModelReference
    preferences: list[PreferencesReference]
    held_out: list[PreferencesReference] = Field(default_factory=list)
    domain: str
    training: FakeTraining = FakeTraining()


class FakeSamplingConfig(StrictModel):
    """A policy made of all that rejection sampling has."""

    kind: Literal["rejection_sampling"] = "rejection_sampling"
    policy: ModelReference
    helpfulness: RewardReference
    safety: RewardReference | None = None
    prompts: list[DataReference]
    earlier_samples: list[SamplesReference] = Field(default_factory=list)
    iteration: int
    samples_per_prompt: int = 1
    training: FakeTraining = FakeTraining()


class FakePpoConfig(StrictModel):
    """A policy made of all that PPO has."""

    kind: Literal["ppo"] = "ppo"
    policy: ModelReference
    helpfulness: RewardReference
    safety: RewardReference | None = None
    prompts: list[DataReference]
    training: FakeTraining = FakeTraining()


def _kind(name: str, config: str, **fields: Any) -> StageKind:
    return StageKind(name, f"fake_versions:{config}", "fake_versions:run_stage", **fields)


KINDS = {
    "preferences": _kind(
        "preferences", "FakePairsConfig", produces=None, makes=STAGE_KINDS["preferences"].makes
    ),
    "reward": _kind("reward", "FakeRewardConfig", produces="reward_model"),
    "rejection_sampling": _kind(
        "rejection_sampling", "FakeSamplingConfig", makes={"samples": MadeData("samples.jsonl", "samples")}
    ),
    "ppo": _kind("ppo", "FakePpoConfig"),
}


def run_stage(config: Any, settings: RunSettings, directory: StageDirectory) -> Metrics:
    """A chain that starts from the contents of every input; what the kind makes says where the chain ended."""
    inputs = [sha256_of(Path(path)) for referring in references(config) for path in referring.names]
    value = chain(config.training, zlib.crc32(f"{inputs}/{settings.seed}".encode()), directory)
    kind = KINDS[config.kind]
    for number, made in enumerate(kind.makes.values()):
        write_text(directory.path / made.file, json.dumps({"value": value + number}) + "\n")
    if kind.produces:
        with atomic_path(directory.model) as temporary:
            temporary.mkdir()
            (temporary / "weights.txt").write_text(f"{value}\n")
    remove(directory.checkpoints)
    return {"final": value}


if __name__ == "__main__":
    from llama2_chat.cli import main

    STAGE_KINDS.update(KINDS)
    sys.exit(main.run_command(sys.argv[1:]))
