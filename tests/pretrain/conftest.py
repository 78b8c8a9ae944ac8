"""Testbed text in files, and the stage run on it with a model that trains in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2_chat.jsonl import write_rows
from llama2_chat.pretrain.config import Architecture, PretrainConfig, PretrainTraining
from llama2_chat.pretrain.train import run_stage
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft import trainer as sft_trainer
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.generators import GENERATORS

torch.set_num_threads(1)

SMALL = Architecture(hidden_size=32, layers=2, attention_heads=4, key_value_heads=2, context_length=64)
TRAINING = {
    "learning_rate": 3e-3,
    "batch_size": 8,
    "sequence_length": 64,
    "min_warmup_steps": 5,
    "checkpoint_steps": 1000,
}

Stage = Callable[..., tuple[dict[str, Any], StageDirectory]]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """1,500 documents of the testbed."""
    return [row["text"] for row in GENERATORS["pretraining_text"](rows=1500, seed=0)]


@pytest.fixture
def text_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes documents into a file of that name."""

    def write(name: str, documents: list[str]) -> Path:
        write_rows(tmp_path / name, [{"text": document} for document in documents])
        return tmp_path / name

    return write


@pytest.fixture
def pretrain(tmp_path: Path) -> Stage:
    """A function that runs the stage in a folder of that name and returns metrics and folder."""

    def run(name: str, text: Any, *, training: dict[str, Any] | None = None, **changes: Any) -> Any:
        config = PretrainConfig(
            text=text,
            architecture=SMALL,
            training=PretrainTraining(**TRAINING | (training or {})),
            **{"vocabulary_size": 600, **changes},
        )
        (tmp_path / name).mkdir(exist_ok=True)
        directory = StageDirectory(tmp_path / name, EventLog(tmp_path / name / "events.jsonl"))
        settings = RunSettings(base_model=BaseModelSource(path="none"), seed=3, device="cpu")
        return run_stage(config, settings, directory), directory

    return run


@pytest.fixture
def trainer_of(pretrain: Stage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that takes what `pretrain` takes and returns the stage's trainer before its first step."""

    class Stopped(Exception):  # noqa: N818
        pass

    def make(*args: Any, **kwargs: Any) -> Any:
        made: list[Any] = []

        def stop(trainer: Any, *_: object, **__: object) -> None:
            made.append(trainer)
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(sft_trainer, "run_trainer", stop)
            with pytest.raises(Stopped):
                pretrain(*args, **kwargs)
        return made[0]

    return make
