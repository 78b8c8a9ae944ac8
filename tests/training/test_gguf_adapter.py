"""An adapter alone on a base that is a GGUF file, of the smallest Llama that can be written as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2_chat.errors import MissingFileError
from llama2_chat.lora import merged, with_adapter
from llama2_chat.models import load_base, load_policy, load_reward_model, reward_model_from_policy, save_model
from llama2_chat.settings import BaseModelSource, LoraConfig, RunSettings

gguf = pytest.importorskip("gguf")

SHAPES = {
    "token_embd": (40, 32),
    "output": (40, 32),
    "output_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_gate": (48, 32),
    "blk.0.ffn_up": (48, 32),
    "blk.0.ffn_down": (32, 48),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
}


class NoTokenizer:
    """Its folder is asked for no tokenizer."""

    def save(self, folder: Path) -> None:
        pass


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    folder = tmp_path / "base"
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "small.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(40)])
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", generator.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return RunSettings(base_model=BaseModelSource(path=str(folder), gguf_file="small.gguf"), device="cpu")


@pytest.mark.parametrize("kind", ["policy", "reward model"])
def test_the_file_is_found_again_by_its_name(kind: str, settings: RunSettings, tmp_path: Path) -> None:
    source = settings.base_model
    policy = kind == "policy"
    model = (
        load_base(settings)
        if policy
        else reward_model_from_policy(source.path, settings, gguf_file=source.gguf_file)
    )
    adapted = with_adapter(model, LoraConfig(rank=2, save="adapter_only"), 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "run" / "stages" / "01-first"
    whole = merged(adapted, folder / "adapter")
    save_model(whole, NoTokenizer(), folder / "model", settings=settings, card="", adapter=folder / "adapter")
    named = json.loads((folder / "model" / "base.json").read_text())
    assert (named["path"], named["gguf_file"]) == (source.path, "small.gguf")

    load = load_policy if policy else load_reward_model
    again = load(folder / "model", settings)
    assert {name: t.numpy().tobytes() for name, t in again.state_dict().items()} == {
        name: t.numpy().tobytes() for name, t in whole.state_dict().items()
    }
    Path(source.path, "small.gguf").unlink()
    with pytest.raises(MissingFileError, match=r"is not there: .*base/small\.gguf"):
        load(folder / "model", settings)
