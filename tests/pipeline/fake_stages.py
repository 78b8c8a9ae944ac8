"""Stage kinds that take no time, for tests of everything around a stage.

`FAKE_ACTION=STAGE_FOLDER:STEP:ACTION` makes a stage misbehave at a step, so that its configuration is the
same with and without the accident. Also a driver: `python fake_stages.py ARGUMENTS` is `llama2-chat
ARGUMENTS` with these kinds.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from llama2_chat import interruption
from llama2_chat.files import atomic_path, read_json, remove, write_json, write_text
from llama2_chat.settings import DataReference, DialoguesReference, ModelReference, RunSettings, StrictModel
from llama2_chat.stage import STAGE_KINDS, MadeData, Metrics, StageDirectory, StageKind


class FakeTraining(StrictModel):
    """A nested mapping, as every real stage has one."""

    learning_rate: float = Field(1e-3, gt=0.0)
    steps: int = Field(7, ge=1)
    epochs: float = Field(1.0, gt=0.0)
    max_steps: int | None = None


class FakePolicyConfig(StrictModel):
    """A policy made of a model and data."""

    kind: Literal["fake_policy"] = "fake_policy"
    model: ModelReference
    dialogues: list[DataReference] = Field(min_length=1)
    helpfulness: ModelReference | None = None
    training: FakeTraining = FakeTraining()


class FakeMakerConfig(FakePolicyConfig):
    """A policy that makes data first."""

    kind: Literal["fake_maker"] = "fake_maker"  # type: ignore[assignment]
    sft_dialogues: list[DialoguesReference] = Field(default_factory=list)


class FakeRewardConfig(StrictModel):
    """A reward model made of a policy and data."""

    kind: Literal["fake_reward"] = "fake_reward"
    model: ModelReference
    preferences: list[DataReference] = Field(min_length=1)
    training: FakeTraining = FakeTraining()


class FakeBaseConfig(StrictModel):
    """A base model made of data alone."""

    kind: Literal["fake_base"] = "fake_base"
    text: DataReference
    training: FakeTraining = FakeTraining()


Config = FakePolicyConfig | FakeRewardConfig | FakeBaseConfig
KINDS = {
    "fake_base": StageKind(
        "fake_base", "fake_stages:FakeBaseConfig", "fake_stages:run_stage", makes_base=True
    ),
    "fake_policy": StageKind("fake_policy", "fake_stages:FakePolicyConfig", "fake_stages:run_stage"),
    "fake_maker": StageKind(
        "fake_maker",
        "fake_stages:FakeMakerConfig",
        "fake_stages:run_stage",
        makes={
            "": MadeData("dataset.jsonl", "dialogues"),
            "others": MadeData("others.jsonl", "dialogues"),
            "samples": MadeData("samples.jsonl", "samples"),
        },
    ),
    "fake_reward": StageKind(
        "fake_reward", "fake_stages:FakeRewardConfig", "fake_stages:run_stage", produces="reward_model"
    ),
}
_CHECKPOINT_STEPS = 2


def run_stage(config: Config, settings: RunSettings, directory: StageDirectory) -> Metrics:
    """A chain of numbers that depends on configuration, seed, input model and data, with checkpoints."""
    value = chain(config.training, _start(config, settings), directory)
    with atomic_path(directory.model) as temporary:
        temporary.mkdir()
        (temporary / "weights.txt").write_text(f"{value}\n")
    if config.kind == "fake_maker":
        write_text(directory.dataset, json.dumps({"value": value}) + "\n")
        write_text(directory.path / "others.jsonl", json.dumps({"value": value + 1}) + "\n")
    remove(directory.checkpoints)
    return {"final": value}


def chain(training: FakeTraining, start: int, directory: StageDirectory) -> int:
    """The last of `training.steps` numbers; each but the first follows from the one before."""
    checkpoint = directory.checkpoints / "state.json"
    step, value = read_json(checkpoint) if checkpoint.exists() else (0, start)
    lines = directory.metrics_file.read_text().splitlines() if directory.metrics_file.exists() else []
    with atomic_path(directory.metrics_file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines[:step]))
    while step < training.steps:
        _misbehave(directory, step)
        value = zlib.crc32(f"{value}/{training.learning_rate}".encode())
        with directory.metrics_file.open("a") as stream:
            stream.write(json.dumps({"step": step, "value": value}) + "\n")
        step += 1
        if step % _CHECKPOINT_STEPS == 0 or interruption.requested():
            write_json(checkpoint, [step, value])
            interruption.raise_if_requested()
    return int(value)


def _start(config: Config, settings: RunSettings) -> int:
    """A number that depends on every input's contents."""
    data = [getattr(config, "text", None), *getattr(config, "dialogues", getattr(config, "preferences", []))]
    data += getattr(config, "sft_dialogues", [])
    inputs = [Path(file).read_bytes() for file in data if file is not None]
    for model in (getattr(config, "model", None), getattr(config, "helpfulness", None)):
        if model is not None:
            inputs += [file.read_bytes() for file in sorted(Path(model).iterdir())]
    return zlib.crc32(b"\0".join(inputs) + str(settings.seed).encode())


def _misbehave(directory: StageDirectory, step: int) -> None:
    folder, _, rest = os.environ.get("FAKE_ACTION", "::").partition(":")
    at, _, action = rest.partition(":")
    if directory.path.name != folder or str(step) != at:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), signal.Signals[action])
        time.sleep(0)  # the handler runs between two byte codes
    elif action == "twice":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    elif action == "wait":
        (directory.path.parent.parent / "waiting").touch()
        for _ in range(600):
            time.sleep(0.05)
            interruption.raise_if_requested()
    elif action == "full_disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif action == "bug":
        raise RuntimeError("the fake stage has a bug")


if __name__ == "__main__":
    # The kinds name this module as `fake_stages`; run as a script it is `__main__`.
    STAGE_KINDS.update(KINDS)
    from llama2_chat.cli import main, stages

    for kind in KINDS:
        main.app.command(kind.replace("_", "-"))(stages._command(kind, "A fake stage."))
    sys.exit(main.run_command(sys.argv[1:]))
