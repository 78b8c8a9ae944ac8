"""Kinds of stages, their configuration classes, the event log, and what lost disks and memory look like."""

from __future__ import annotations

import datetime
import errno
import json
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

from llama2_chat.errors import UserInputError, disk_full, out_of_memory
from llama2_chat.pipeline.references import references_in_mapping
from llama2_chat.settings import RunSettings
from llama2_chat.stage import STAGE_KINDS, EventLog, StageDirectory, stage_kind

DATA_MAKERS = ["rejection_sampling", "ghost_attention", "context_distillation"]
KINDS = [
    *("pretrain", "sft", "reward", "preferences"),
    *("rejection_sampling", "ppo", "ghost_attention", "context_distillation"),
]


def test_real_kinds() -> None:
    assert [name for name in STAGE_KINDS if not name.startswith("fake_")] == KINDS
    assert {name for name in KINDS if STAGE_KINDS[name].produces == "reward_model"} == {"reward"}
    assert {name for name in KINDS if STAGE_KINDS[name].produces is None} == {"preferences"}
    assert {name for name in KINDS if STAGE_KINDS[name].makes} == {*DATA_MAKERS, "preferences"}
    assert set(STAGE_KINDS["preferences"].data_names("v1")) == {"v1", "v1.held_out", "v1.samples"}
    assert {name for name in KINDS if STAGE_KINDS[name].makes_base} == {"pretrain"}


@pytest.mark.parametrize("name", KINDS)
def test_configuration_of_each_kind(name: str) -> None:
    model = STAGE_KINDS[name].load_config_class()
    assert model.model_fields["kind"].default == name
    # A standalone configuration holds both in one mapping, so no name may stand for two things.
    assert not set(model.model_fields) & set(RunSettings.model_fields)
    if STAGE_KINDS[name].produces is not None:
        assert issubclass(model.model_fields["training"].annotation, BaseModel)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pretrain", {"text": "data"}),
        ("sft", {"model": "policy", "dialogues": "data", "held_out": "data"}),
        (
            "reward",
            {"model": "policy", "preferences": "data", "other_preferences": "data", "held_out": "data"},
        ),
        ("preferences", {"policies": "policy", "prompts": "data"}),
        (
            "rejection_sampling",
            {
                "policy": "policy",
                "helpfulness": "reward_model",
                "safety": "reward_model",
                "prompts": "data",
                "temperature_prompts": "data",
                "earlier_samples": "data",
                "base": "policy",
                "sft_dialogues": "data",
            },
        ),
    ],
)
def test_references_of_each_kind(name: str, expected: dict[str, str]) -> None:
    model = STAGE_KINDS[name].load_config_class()
    written = dict.fromkeys(model.model_fields, "x")
    found = {referring.field: referring.kind for referring in references_in_mapping(model, written)}
    assert found == expected


def test_unknown_kind() -> None:
    with pytest.raises(UserInputError, match=r'kind "rewrad" unknown .*"reward".*; one of pretrain, sft'):
        stage_kind("rewrad")


def test_event_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "deep" / "events.jsonl").within(stage="sft")
    log.write("started", text="[INST] é")
    with log.path.open("a") as stream:
        stream.write('{"half')
    log.within(part=2).write("finished", seconds=1.5)
    first, half, last = log.path.read_text(encoding="utf-8").splitlines()
    record = json.loads(first)
    moment = datetime.datetime.fromisoformat(record.pop("time"))
    assert abs((datetime.datetime.now(datetime.UTC) - moment).total_seconds()) < 60
    assert record == {"event": "started", "stage": "sft", "text": "[INST] é"}
    assert half == '{"half'
    assert {**json.loads(last), "time": 0} == {
        "time": 0,
        "event": "finished",
        "stage": "sft",
        "part": 2,
        "seconds": 1.5,
    }


def test_files_of_a_stage(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path, EventLog(tmp_path / "events.jsonl"))
    assert {
        directory.config_file.name,
        directory.metrics_file.name,
        directory.model.name,
        directory.dataset.name,
        directory.samples.name,
        directory.checkpoints.name,
        directory.started_file.name,
        directory.done_file.name,
    } == {
        "config.yaml",
        "metrics.jsonl",
        "model",
        "dataset.jsonl",
        "samples.jsonl",
        "checkpoints",
        "started.json",
        "done.json",
    }


def wrapped(error: BaseException) -> BaseException:
    """As libraries raise it: another error from the real one."""
    try:
        raise RuntimeError("could not save") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (wrapped(OSError(errno.ENOSPC, "x")), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("unexpected"), False),
    ],
)
def test_full_disks(error: BaseException, expected: bool) -> None:
    assert disk_full(error) is expected


def test_the_full_device_of_the_kernel() -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert disk_full(caught.value)


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


def test_lost_memory() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not out_of_memory(RuntimeError("memory"))
    assert not out_of_memory(subprocess.TimeoutExpired("x", 1))
