"""The stage with a policy and reward models that are functions of the text: no training, answers known in advance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2_chat.dialogue import Message
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.engine import Response
from llama2_chat.jsonl import write_rows
from llama2_chat.rejection_sampling import build, sample
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory

LONG = "too long for the policy"
"""A prompt that begins so leaves no room for an answer."""


def number(*parts: Any) -> float:
    """In [0, 1), a function of the parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def answer_to(question: str, index: int, temperature: float, seed: int) -> Answer:
    """One of a few words; hotter sampling gives more different ones, and more that are cut off."""
    draw = number(question, index, seed)
    status = "complete"
    if draw < 0.1 * temperature:
        status = "cut_off"
    elif draw > 0.95:
        status = "empty"
    text = "" if status == "empty" else f"word {int(12 * temperature * draw)}"
    return Answer(text, status, Response([], [], "stop"))  # type: ignore[arg-type]


class Rewards:
    """Scores by the text, differently in every version; counts what it was asked."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.scored: list[tuple[str, str]] = []

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> torch.Tensor:
        self.scored += [(dialogue[-2].content, dialogue[-1].content) for dialogue in dialogues]
        return torch.tensor([self.score(d[-2].content, d[-1].content) for d in dialogues])

    def score(self, question: str, answer: str) -> float:
        return 6 * number(self.version, question, answer) - 3


class World:
    """Files and stages in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = monkeypatch
        self.helpfulness, self.safety = Rewards("helpful 1"), Rewards("safe 1")
        self.settings = RunSettings(base_model=BaseModelSource(path="base"), seed=5, device="cpu")
        self.trained_on: list[str] = []
        monkeypatch.setattr(sample, "open_engine", lambda *_: nullcontext((Engine(), Format())))
        monkeypatch.setattr(sample, "sample_answers", sample_answers)
        monkeypatch.setattr(
            sample.RewardScorer,
            "from_pretrained",
            lambda helpfulness, safety, **options: RewardScorer(
                self.helpfulness, self.safety if safety else None, **options_of(options)
            ),
        )
        monkeypatch.setattr(build, "fine_tune", self.fine_tune)

    def fine_tune(self, start: str, settings: RunSettings, directory: StageDirectory, **_: Any) -> dict:
        self.trained_on.append(directory.dataset.read_text())
        return {}

    def prompts(self, name: str, questions: Sequence[str], **fields: Any) -> str:
        file = self.folder / name
        write_rows(file, ({"prompt": [{"role": "user", "content": q}], **fields} for q in questions))
        return str(file)

    def directory(self, name: str) -> StageDirectory:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    def run(self, name: str, prompts: str, **changes: Any) -> tuple[StageDirectory, dict]:
        """The stage's folder and its metrics."""
        directory = self.directory(name)
        values = {
            "policy": f"{self.folder}/01-sft/model",
            "helpfulness": "h",
            "safety": "s",
            "prompts": [prompts],
            "samples_per_prompt": 4,
            "sampling": {"temperature": 1.0, "max_new_tokens": 8},
            **changes,
        }
        return directory, build.run_stage(RejectionSamplingConfig(**values), self.settings, directory)


class Engine:
    """A policy that can take 100 tokens."""

    class model:  # noqa: N801
        class config:  # noqa: N801
            max_position_embeddings = 100


class Format:
    """A word is a token."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return [0] * (101 if messages[-1].content.startswith(LONG) else 10)


def sample_answers(engine, chat_format, prompts, *, samples_per_prompt, sampling, seed) -> list[list[Answer]]:
    return [
        [
            answer_to(messages[-1].content, index, sampling.temperature, seed)
            for index in range(samples_per_prompt)
        ]
        for messages in prompts
    ]


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return {"safety_threshold": options["safety_threshold"]}


def rows_of(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def question_of(row: dict[str, Any]) -> str:
    return row.get("prompt", row.get("messages"))[-1 if "prompt" in row else -2]["content"]
