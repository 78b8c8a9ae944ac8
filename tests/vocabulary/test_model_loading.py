"""A model folder that is not whole, or is of another sort, is refused with a message that says what is wrong.

transformers itself makes up the weights that a folder lacks and warns: what is then sampled from is another model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2_chat.errors import UserInputError
from llama2_chat.models import chat_format_of, load_policy, load_reward_model
from llama2_chat.settings import BaseModelSource, RunSettings

SETTINGS = RunSettings(base_model=BaseModelSource(path="unused"), device="cpu")
CONFIG = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy (embeddings tied, as in the tiny base) and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=True)).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)).save_pretrained(folder / "reward")
    return folder


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def _of_another_size(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 12}))


@pytest.mark.parametrize("sort", ["policy", "reward"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_config, "model_type"),
        (_broken_config, "not a valid JSON file"),
        (_cut_short, "file not fully covered"),
        (_without_a_tensor, "it lacks the tensor model.layers.0.mlp.up_proj.weight and 1 more"),
        (_of_another_size, "is (8, 8), config.json says (8, 12): they belong to different models"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    whole: Path, tmp_path: Path, sort: str, damage: Callable[[Path], None], says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole / sort, folder)
    damage(folder)
    load = load_policy if sort == "policy" else load_reward_model
    with pytest.raises(UserInputError) as error:
        load(folder, SETTINGS)
    assert str(error.value).startswith(f"{folder}: cannot be loaded as a {sort}")
    assert says in str(error.value)
    assert "copy or make the model again" in str(error.value)


def test_the_chat_format_of_a_folder_without_a_configuration(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole / "policy", folder)
    _without_config(folder)
    with pytest.raises(UserInputError, match="cannot be loaded as a policy"):
        chat_format_of(folder)


def test_a_reward_model_is_no_policy(whole: Path) -> None:
    with pytest.raises(UserInputError, match="a reward model, where a policy is wanted"):
        load_policy(whole / "reward", SETTINGS)


def test_a_whole_folder_is_loaded_as_it_is(whole: Path) -> None:
    policy = load_policy(whole / "policy", SETTINGS)
    stored = load_file(whole / "policy" / "model.safetensors")
    assert torch.equal(policy.state_dict()["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert load_reward_model(whole / "reward", SETTINGS).config.num_labels == 1
