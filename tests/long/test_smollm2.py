"""A real model from a GGUF file: `make smollm2-135m` fetches it; without it these tests are skipped."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat.chat_format import build_chat_format
from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import Message
from llama2_chat.models import load_base, save_model
from llama2_chat.settings import RunSettings
from llama2_chat.tokenizers import load_tokenizer

pytestmark = pytest.mark.long

TURNS = [("user", "What is 2 plus 2?"), ("assistant", "It is 4."), ("user", "And 3 plus 3?")]


def test_prompts_are_those_of_the_models_own_template(smollm2: RunSettings) -> None:
    tokenizer = load_tokenizer(smollm2.base_model.path, smollm2.base_model.gguf_file)
    ours = build_chat_format("tokenizer", tokenizer).prompt_ids([Message(*turn) for turn in TURNS])
    theirs = tokenizer.hf.apply_chat_template(
        [{"role": role, "content": content} for role, content in TURNS],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert ours == theirs
    assert len(ours) > 40


def test_the_saved_folder_loads_alone_and_computes_the_same(smollm2: RunSettings, tmp_path: Path) -> None:
    model = load_base(smollm2)
    tokenizer = load_tokenizer(smollm2.base_model.path, smollm2.base_model.gguf_file)
    assert model.num_parameters() == 134_515_008
    save_model(model, tokenizer, tmp_path / "model", settings=smollm2, card="")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 216, 34, 2]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )
        # A real model: after "The capital of France is" comes " Paris".
        saved = AutoTokenizer.from_pretrained(tmp_path / "model")
        text = saved("The capital of France is", return_tensors="pt").input_ids
        assert saved.decode(again(input_ids=text).logits[0, -1].argmax()) == " Paris"


def test_the_recipe_fine_tunes_an_adapter(
    smollm2: RunSettings, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA2_CHAT_DATA", str(data_folder))
    monkeypatch.setenv("LLAMA2_CHAT_MODELS", str(Path(smollm2.base_model.path).parent))
    run = tmp_path / "run"
    small = ["data.demonstrations.limit=6", "stages.sft.training.batch_size=2"]
    assert run_command(["run", "smollm2-135m", *small, "--until", "sft", "--output-dir", str(run)]) == 0
    stage = run / "stages" / "01-sft"
    metrics = json.loads((stage / "done.json").read_text())["metrics"]
    assert metrics["loss_last"] < metrics["loss_first"]
    whole = AutoModelForCausalLM.from_pretrained(stage / "model")
    adapted = peft.PeftModel.from_pretrained(load_base(smollm2), stage / "adapter")
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 216, 34, 2]])
    with torch.no_grad():
        torch.testing.assert_close(
            whole(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
