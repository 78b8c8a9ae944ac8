"""The architecture counted by hand, and the stage from text to a folder that loads alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat.errors import DataFormatError
from llama2_chat.jsonl import write_rows
from llama2_chat.pretrain.config import Architecture, PretrainConfig, PretrainTraining
from llama2_chat.pretrain.model import feed_forward_size, new_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.pretrain.train import read_texts, run_stage, to_sequences
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

torch.set_num_threads(1)
SMALL = Architecture(hidden_size=32, layers=2, attention_heads=4, key_value_heads=2, context_length=64)
SETTINGS = RunSettings(base_model=BaseModelSource(path="none"), seed=3, device="cpu")


def build(architecture: Architecture, seed: int = 0) -> torch.nn.Module:
    return new_model(architecture, vocabulary_size=300, begin_id=1, end_id=2, seed=seed)


def test_parameters_are_those_of_the_architecture() -> None:
    # per layer: q and o 32x32, k and v 32x16 (2 of 4 heads, 8 wide), feed-forward 3 of 32x88, 2 norms
    assert feed_forward_size(SMALL) == 88  # 8/3 x 32 = 85.3, in steps of 8
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 88 + 2 * 32
    expected = 2 * layer + 32 + 2 * 300 * 32  # last norm, embeddings and head
    assert sum(p.numel() for p in build(SMALL).parameters()) == expected


@pytest.mark.parametrize(("hidden", "expected"), [(96, 256), (128, 344), (4096, 10928)])
def test_feed_forward_width(hidden: int, expected: int) -> None:
    assert feed_forward_size(Architecture(hidden_size=hidden, attention_heads=2)) == expected


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (build(SMALL, seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one[name], other[name])
    assert one[name].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 36, "attention_heads": 8}, "hidden_size 36 must be a multiple"),
        ({"attention_heads": 4, "key_value_heads": 3}, "key_value_heads 3 must divide attention_heads 4"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_architectures_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Architecture(**sizes)


def test_long_documents_are_cut_and_nothing_is_lost() -> None:
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=1500, seed=0)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 600))
    text = " ".join(texts[:3])
    pieces = list(to_sequences([text], tokenizer, 16))
    assert all(len(piece.input_ids) == 16 for piece in pieces[:-1])
    ids = [token for piece in pieces for token in piece.input_ids]
    assert ids == [1, *tokenizer.encode(text), 2]
    assert all(all(piece.loss_mask) for piece in pieces)


def run(folder: Path, text: Path, **changes: object) -> tuple[dict[str, object], StageDirectory]:
    folder.mkdir(exist_ok=True)
    training = PretrainTraining(
        learning_rate=3e-3, batch_size=8, sequence_length=64, min_warmup_steps=5, checkpoint_steps=1000
    )
    config = PretrainConfig(text=str(text), architecture=SMALL, vocabulary_size=600, training=training)
    directory = StageDirectory(folder, EventLog(folder / "events.jsonl"))
    return run_stage(config.model_copy(update=changes), SETTINGS, directory), directory


def test_the_stage_makes_a_model_that_loads_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    write_rows(text, GENERATORS["pretraining_text"](rows=1500, seed=0))
    metrics, directory = run(tmp_path / "one", text)
    assert metrics["documents"] == 1500
    assert metrics["loss_last"] < 0.75 * metrics["loss_first"]
    model = AutoModelForCausalLM.from_pretrained(directory.model)
    assert len(AutoTokenizer.from_pretrained(directory.model)) == model.config.vocab_size == 600
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (2, 4)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, None)
    assert (directory.model / "README.md").exists()

    again, other = run(tmp_path / "two", text)
    assert again == metrics
    assert (other.model / "model.safetensors").read_bytes() == (
        directory.model / "model.safetensors"
    ).read_bytes()
    assert other.metrics_file.read_bytes() == directory.metrics_file.read_bytes()


@pytest.mark.parametrize("row", [{"txt": "a"}, {"text": 3}, {"text": None}, {"text": ["a"]}])
def test_rows_without_text_are_refused(tmp_path: Path, row: dict[str, object]) -> None:
    file = tmp_path / "text.jsonl"
    write_rows(file, [{"text": "good"}, row])
    with pytest.raises(DataFormatError, match=r'text\.jsonl:2: "text" must be a text; found'):
        list(read_texts(file))


def test_rows_longer_than_the_context_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"sequence_length 4096 exceeds architecture\.context_length 64"
    ):
        PretrainConfig(text="text.jsonl", architecture=SMALL)
