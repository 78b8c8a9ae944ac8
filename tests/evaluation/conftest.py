"""Small reward model folders: the embedded base under random scalar heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2_chat.models import reward_model_from_policy, save_model
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import load_tokenizer

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"


@pytest.fixture(scope="session")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plain/model` and `margin/model`, which differ in their heads."""
    root = tmp_path_factory.mktemp("reward_models")
    for seed, name in enumerate(("plain", "margin")):
        settings = RunSettings(base_model=BaseModelSource(path=str(BASE)), seed=seed, device="cpu")
        tokenizer = load_tokenizer(BASE)
        model = reward_model_from_policy(BASE, settings)
        model.config.pad_token_id = tokenizer.padding_id
        save_model(model, tokenizer, root / name / "model", settings=settings, card="")
    return root
