"""Which stages a vLLM server may sample for, and what a recipe that wants one is told before it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.fingerprints import fingerprint_of
from llama2_chat.pipeline.problems import validated
from llama2_chat.pipeline.sampling_backends import sampling_problems
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.settings import BaseModelSource, RunSettings, StrictModel
from llama2_chat.stage import STAGE_KINDS

STAGE = {"policy": "p", "helpfulness": "h", "prompts": ["q"]}


def problems_of(kind: type[StrictModel], sampling: dict) -> list[str]:
    problems: list[str] = []
    validated(kind, {"sampling": sampling}, "stages.it", problems)
    return [problem for problem in problems if problem.startswith("stages.it.sampling")]


def rejection(**vllm) -> RejectionSamplingConfig:
    return RejectionSamplingConfig(**STAGE, sampling={"backend": "vllm", "vllm": vllm})


def test_only_rejection_sampling_takes_a_server() -> None:
    classes = {name: kind.load_config_class() for name, kind in STAGE_KINDS.items()}
    classes["evaluation"] = EvaluationConfig
    sampling = {name: kind for name, kind in classes.items() if "sampling" in kind.model_fields}
    assert set(sampling) == {
        "preferences",
        "rejection_sampling",
        "ppo",
        "ghost_attention",
        "context_distillation",
        "evaluation",
    }
    for name, kind in sampling.items():
        found = problems_of(kind, {"backend": "vllm"})
        assert problems_of(kind, {"backend": "transformers"}) == []
        if name == "rejection_sampling":
            assert found == []
        else:
            (problem,) = found
            assert problem.startswith("stages.it.sampling.backend: vllm samples for rejection_sampling alone")
            assert "transformers, or leave the key out" in problem


@pytest.mark.parametrize(
    ("sampling", "parts"),
    [
        ({"backend": "vlm"}, ["sampling.backend", "'transformers' or 'vllm'"]),
        ({"vllm": {}}, ["backend is transformers; write backend: vllm"]),
        (
            {"backend": "vllm", "max_new_tokens": 64, "vllm": {"max_model_len": 64}},
            ["max_model_len 64 leaves no room for a prompt and max_new_tokens 64"],
        ),
        ({"backend": "vllm", "vllm": {"pyton": "x"}}, ["sampling.vllm.pyton", 'did you mean "python"']),
        ({"backend": "vllm", "vllm": {"kv_cache_gib": 0}}, ["sampling.vllm.kv_cache_gib", "greater than 0"]),
    ],
)
def test_mistakes_in_the_settings(sampling: dict, parts: list[str]) -> None:
    (problem,) = problems_of(RejectionSamplingConfig, sampling)
    for part in parts:
        assert part in problem


def test_a_missing_environment_is_seen_before_anything_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = sampling_problems(rejection(), "stages.v1")
    assert problem.startswith("stages.v1.sampling.vllm.python: no interpreter ")
    assert str(tmp_path / ".venv-vllm" / "bin" / "python") in problem
    assert "make vllm-env" in problem
    assert sampling_problems(rejection(python=sys.executable), "stages.v1") == []
    assert sampling_problems(RejectionSamplingConfig(**STAGE), "stages.v1") == []


def test_what_a_server_costs_is_no_part_of_what_it_samples() -> None:
    settings = RunSettings(base_model=BaseModelSource(path="b"))
    inputs = {"model:base": "0", "model:p": "1", "model:h": "2", "data:q": "3"}

    def fingerprint(**vllm) -> str:
        return fingerprint_of(rejection(**vllm), settings, inputs)

    same = fingerprint(python="a", kv_cache_gib=1, start_seconds=2, timeout_seconds=3)
    assert same == fingerprint(python="b", kv_cache_gib=2, start_seconds=3, timeout_seconds=4)
    others = {fingerprint(dtype="float16"), fingerprint(max_model_len=1024)}
    others.add(fingerprint_of(RejectionSamplingConfig(**STAGE), settings, inputs))
    assert len(others | {same}) == 4
