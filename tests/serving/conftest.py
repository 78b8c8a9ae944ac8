"""Small reward models in both chat formats, and the real server as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_server import LIMITS, Client, Running, Start, save_reward_model

from llama2_chat import RewardScorer
from llama2_chat.serving.limits import Limits
from llama2_chat.serving.scoring import ScoringEngine
from llama2_chat.serving.service import ScoringService

torch.set_num_threads(1)  # these models are too small to share between threads


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`helpful/`, `safe/` (llama2) and `chatml/`."""
    folder = tmp_path_factory.mktemp("reward_models")
    save_reward_model(folder / "helpful", seed=1)
    save_reward_model(folder / "safe", seed=2)
    save_reward_model(folder / "chatml", seed=3, chatml=True)
    return folder


@pytest.fixture(scope="session")
def offline(models: Path) -> RewardScorer:
    """What every answer of the server is compared with."""
    return RewardScorer.from_pretrained(models / "helpful", models / "safe", device="cpu")


@pytest.fixture(scope="module")
def start(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts `llama2-chat serve` with more arguments and waits until it is ready."""
    running: list[Running] = []

    def make(*arguments: str, **environment: str) -> Running:
        errors = tmp_path_factory.mktemp("server") / "stderr"
        command = [sys.executable, "-m", "llama2_chat.cli.main", "serve", "--port", "0", "--device", "cpu"]
        command += ["--helpfulness", str(models / "helpful"), "--safety", str(models / "safe"), *arguments]
        with errors.open("w") as stream:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stream, text=True, env=os.environ | environment
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, errors.read_text())
        running.append(Running(process, found[1], errors))
        return running[-1]

    yield make
    for server in running:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def serve(offline: RewardScorer) -> Iterator[Callable[..., Client]]:
    services: list[ScoringService] = []

    def make(scorer: RewardScorer = offline, limits: Limits = LIMITS, **more: Any) -> Client:
        services.append(ScoringService(ScoringEngine(scorer, name="rm"), limits, **more))
        return Client(services[-1])

    yield make
    for service in services:
        service.close()
