"""What a configuration's way of sampling wants of the machine."""

from __future__ import annotations

from llama2_chat.settings import SamplingConfig, StrictModel, VllmConfig


def sampling_problems(config: StrictModel, key: str) -> list[str]:
    """A vLLM server is to sample, and its environment is not there."""
    sampling = getattr(config, "sampling", None)
    if not isinstance(sampling, SamplingConfig) or sampling.backend != "vllm":
        return []
    problem = (sampling.vllm or VllmConfig()).missing_environment()
    prefix = f"{key}." if key else ""
    return [] if problem is None else [f"{prefix}sampling.vllm.python: {problem}"]
