"""What a stage's result depends on, as one hash: its configuration, its inputs, the run's settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llama2_chat.files import read_json, sha256_of
from llama2_chat.pipeline.custom_rewards import identities
from llama2_chat.pipeline.references import Referring, references, resolve
from llama2_chat.pipeline.run_directory import FORMAT_VERSION
from llama2_chat.settings import RunSettings, SamplingConfig, StrictModel
from llama2_chat.stage import STAGE_KINDS

_HASHED_WHOLE = 64 * 2**20
_NO_PART: dict[str, Any] = {"training": {"lora": {"save"}}}
"""Of a stage's configuration: what does not change what it makes."""


def fingerprint_of(config: StrictModel, settings: RunSettings, inputs: dict[str, str]) -> str:
    """Hash of a configuration whose references stand for `inputs` (`model:NAME`, `data:NAME` → hash).

    The device and the trackers are left out: where a stage runs and who watches is no part of what it is. So is the
    base model of a stage that makes one, how a server that samples is started and waited for, and whether a model is
    written whole or as an adapter.
    """
    kind = STAGE_KINDS.get(getattr(config, "kind", ""))

    def input_of(referring: Referring, name: str) -> str:
        return inputs[f"{'data' if referring.kind == 'data' else 'model'}:{name}"]

    return _hash(
        {
            "format": FORMAT_VERSION,
            "config": resolve(config, input_of).model_dump(mode="json", exclude=_NO_PART)
            | identities(config)
            | _sampling_identity(config),
            "settings": settings.model_dump(
                mode="json", exclude={"device", "base_model", "models", "report_to"}
            ),
            "base": None if kind is not None and kind.makes_base else inputs["model:base"],
        }
    )


def _sampling_identity(config: StrictModel) -> dict[str, Any]:
    """`sampling` with what of vLLM's settings bears on the samples, where a server samples; else nothing."""
    sampling = getattr(config, "sampling", None)
    if not isinstance(sampling, SamplingConfig) or sampling.vllm is None:
        return {}
    return {
        "sampling": sampling.model_dump(mode="json")
        | {"vllm": sampling.vllm.model_dump(mode="json", include={"dtype", "max_model_len"})}
    }


def fingerprint_of_files(config: StrictModel, settings: RunSettings) -> str:
    """The same for a standalone configuration, whose references are paths.

    A model that a stage made stands for that stage's fingerprint, so that a stage run alone into its place
    in a run directory counts as done there.
    """
    inputs = {"model:base": fingerprint_of_model(settings.base_model.path)}
    for referring in references(config):
        for path in referring.names:
            if referring.kind == "data":
                inputs[f"data:{path}"] = sha256_of(Path(path))
            else:
                done = Path(path).parent / "done.json"
                made = Path(path).name == "model" and done.is_file()
                named = next((one for one in settings.models.values() if one.path == path), None)
                inputs[f"model:{path}"] = (
                    read_json(done)["fingerprint"] if made
                    else fingerprint_of_model(path) if named is None or path == settings.base_model.path
                    else fingerprint_of_source(path, named.gguf_file)
                )  # fmt: skip
    return fingerprint_of(config, settings, inputs)


def fingerprint_of_model(path: str) -> str:
    """Hash of a model folder's contents; of large files only name and size. A hub id stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return _hash(path)
    parts = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = file.stat().st_size
        parts.append([file.name, size, sha256_of(file) if size <= _HASHED_WHOLE else None])
    return _hash(parts)


def fingerprint_of_source(path: str, gguf_file: str | None) -> str:
    """Hash of a named model: its folder's, and which GGUF file of it is meant."""
    content = fingerprint_of_model(path)
    return content if gguf_file is None else _hash([content, gguf_file])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
