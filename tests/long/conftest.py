"""Finished runs of the test world's recipes, and a real model: what takes minutes to make or has to be fetched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llama2_chat.settings import BaseModelSource, RunSettings

ROOT = Path(__file__).resolve().parents[2]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs a file of recipes/tiny with the command's `arguments` and gives the run's folder.

    `kept` names an environment variable: where it is set, the run is made or continued in the folder that it names; of
    one seed in `seed-N` there.
    """

    def finish(
        recipe: str,
        *arguments: str,
        seed: int | None = None,
        kept: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Path:
        if found := os.environ.get(kept):
            folder = Path(found) if seed is None else Path(found) / f"seed-{seed}"
        else:
            folder = tmp_path_factory.mktemp(Path(recipe).stem) / "run"
        command = [
            sys.executable,
            "-m",
            "llama2_chat.cli.main",
            "run",
            str(ROOT / "recipes" / "tiny" / recipe),
        ]
        command += [*arguments, *([] if seed is None else [f"seed={seed}"]), "--output-dir", str(folder)]
        subprocess.run(command, check=True, env={**os.environ, **(environment or {})})
        return folder

    return finish


@pytest.fixture(params=(0, 1, 2))
def run(request: pytest.FixtureRequest, whole_run: Path) -> Path:
    """Each seed's run in a sweep over seeds; the test's module says which sweep `whole_run` is."""
    return whole_run / "sweep" / f"seed={request.param}"


@pytest.fixture(scope="module")
def smollm2() -> RunSettings:
    """SmolLM2-135M from its GGUF file."""
    folder = Path(os.environ.get("LLAMA2_CHAT_MODELS", ROOT / "models")).resolve() / "smollm2-135m"
    if not (folder / GGUF).is_file():
        pytest.skip(f"no {folder / GGUF}; make smollm2-135m fetches it")
    source = BaseModelSource(path=str(folder), gguf_file=GGUF)
    return RunSettings(base_model=source, chat_format="tokenizer", device="cpu")
