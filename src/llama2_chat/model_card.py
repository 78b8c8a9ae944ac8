"""The README.md that every model folder carries: how the model was made and from what."""

from __future__ import annotations

from pathlib import Path

import yaml

from llama2_chat.settings import RunSettings, StrictModel


def model_card(stage: str, config: StrictModel, settings: RunSettings) -> str:
    """Markdown with the front matter of the Hugging Face hub; only names of inputs, no absolute paths."""
    front = yaml.safe_dump({"library_name": "transformers", "tags": ["llama2-chat", stage]}, sort_keys=False)
    described = yaml.safe_dump(_without_folders(config.model_dump(mode="json")), sort_keys=False)
    lora = getattr(getattr(config, "training", None), "lora", None)
    alone = "This folder holds a LoRA adapter; its base is the model that `base.json` names.\n\n"
    origin = "Trained from scratch" if stage == "pretrain" else f"Made from {_origin(config, settings)}"
    return (
        f"---\n{front}---\n\n# {stage}\n\n"
        f"{origin} by llama2-chat, stage kind `{stage}`, "
        f"chat format `{settings.chat_format}`, seed {settings.seed}, {settings.precision}.\n\n"
        f"{alone if lora is not None and lora.save == 'adapter_only' else ''}"
        "The model inherits the licences of its base model and of the data named below.\n\n"
        f"## Configuration\n\n```yaml\n{described}```\n"
    )


def _origin(config: StrictModel, settings: RunSettings) -> str:
    """The base model; where a recipe has several, the model that this stage itself names."""
    start = getattr(config, "model", getattr(config, "policy", None))
    if settings.models and start is not None:
        return f"the model `{_without_folders(start)}`"
    return f"the base model `{Path(settings.base_model.path).name}`"


def _without_folders(value: object) -> object:
    """Paths say where they lie inside a run, not where this machine keeps the run."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        parts = Path(value).parts
        starts = [place for place, part in enumerate(parts) if part in ("stages", "data")]
        return "/".join(parts[starts[-1] :]) if starts else parts[-1]
    return value
