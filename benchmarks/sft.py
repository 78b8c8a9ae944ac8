"""Supervised fine-tuning: TRL's SFTTrainer at its best packing setting against ours, in turn, on the same dialogues.

    make smollm2-135m                                                (for its tokenizer)
    LLAMA2_CHAT_DATA=DIR python benchmarks/sft.py [--layers 8] [--dialogues 160] [--rounds 3]

HH-RLHF harmless dialogues in SmolLM2's template, packed into rows of 1,024 tokens, four rows a step, AdamW, float32 on
the CPU, random weights of SmolLM2-135M's shape. Each measurement is a process of its own and times `train()`. Printed
are medians: input tokens a second (no padding), peak memory, optimiser steps, and for ours the share of the machine's
matmul peak (best of five float32 products of 2048 x 2048) that the useful operations reach: 6 per weight and
token, attention within a dialogue, the head at trained positions only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from measuring import as_json, in_turn, layer_weights, matmul_peak, peak_memory
from smollm2_shape import smollm2_shape
from transformers import LlamaForCausalLM, Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from llama2_chat.chat_format import build_chat_format
from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.dialogue import Dialogue
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.packing import pack
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft.config import SftTraining
from llama2_chat.sft.trainer import PackedSftTrainer
from llama2_chat.tokenization import TokenizedDialogue, tokenize_dialogues
from llama2_chat.tokenizers import load_tokenizer
from llama2_chat.training import placeholder_tokenizer, trainer_arguments

ROW_TOKENS = 1024
ROWS_PER_STEP = 4
PEERS = ("trl-bfd", "trl-wrapped")
"""Best-fit packing keeps dialogues apart by their positions; "wrapped" cuts and mixes them, which costs no mask."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    layers: int
    dialogues: int
    rounds: int


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(smollm2_shape(layers))


def dialogues_of(policy: str, count: int) -> list[TokenizedDialogue]:
    data = Path(os.environ.get("LLAMA2_CHAT_DATA", "../shared/data")) / "hh-rlhf" / "harmless-base.jsonl.gz"
    models = Path(os.environ.get("LLAMA2_CHAT_MODELS", "models")) / "smollm2-135m"
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not data.exists() or not (models / gguf).exists():
        sys.exit(f"needs {data} and {models / gguf}; see the head of this file")
    tokenizer = load_tokenizer(str(models), gguf)
    rows = (row for row in import_hh_rlhf(data, kind="dialogues") if isinstance(row, Dialogue))
    chosen = islice(rows, count)
    found, _ = tokenize_dialogues(chosen, build_chat_format("tokenizer", tokenizer), policy, ROW_TOKENS)  # type: ignore[arg-type]
    return found


def our_trainer(model: LlamaForCausalLM, dialogues: list[TokenizedDialogue], folder: str) -> Trainer:
    use_packed_attention(model)
    keep_freed_memory()
    rows = pack(dialogues, ROW_TOKENS)
    training = SftTraining(
        batch_size=ROWS_PER_STEP, micro_batch_size=1, epochs=1.0, sequence_length=ROW_TOKENS
    )
    settings = RunSettings(base_model=BaseModelSource(path="-"), device="cpu")
    arguments = trainer_arguments(training, settings, Path(folder), len(rows)) | {"save_strategy": "no"}
    config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    return PackedSftTrainer(model, config, rows, 0)


def peer_trainer(
    model: LlamaForCausalLM, dialogues: list[TokenizedDialogue], folder: str, strategy: str
) -> Trainer:
    """One row a micro-batch: TRL lays the rows of a micro-batch end to end, and attention costs its square."""
    arguments = SFTConfig(
        output_dir=folder, packing=True, packing_strategy=strategy, max_length=ROW_TOKENS, num_train_epochs=1,
        per_device_train_batch_size=1, gradient_accumulation_steps=ROWS_PER_STEP, learning_rate=2e-5,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = Dataset.from_dict(
        {
            "input_ids": [dialogue.input_ids for dialogue in dialogues],
            "assistant_masks": [[int(trained) for trained in d.loss_mask] for d in dialogues],
        }
    )
    return SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=placeholder_tokenizer(0)
    )


def measure(side: str, policy: str, options: Options) -> dict[str, Any]:
    """One training run in this process."""
    dialogues = dialogues_of(policy, options.dialogues)
    model = model_of(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        strategy = side.removeprefix("trl-")
        trainer = (
            our_trainer(model, dialogues, folder)
            if side == "ours"
            else peer_trainer(model, dialogues, folder, strategy)
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    tokens = sum(len(d.input_ids) for d in dialogues)
    return {
        "tokens_per_second": tokens / seconds,
        "steps": trainer.state.global_step,
        "memory": peak_memory(),
        "share_of_peak": useful_operations(dialogues, options.layers) / seconds / matmul_peak(),
    }


def useful_operations(dialogues: list[TokenizedDialogue], layers: int) -> float:
    """Floating-point operations of forward and backward that no implementation could leave out."""
    shape = smollm2_shape(layers)
    tokens = sum(len(d.input_ids) for d in dialogues)
    attention = sum(6 * layers * shape.hidden_size * len(d.input_ids) ** 2 for d in dialogues)
    head = 6 * shape.hidden_size * shape.vocab_size * sum(sum(d.loss_mask) for d in dialogues)
    return 6 * layer_weights(layers) * tokens + attention + head


def compare(policy: str, options: Options) -> None:
    """All sides in turn, `rounds` times; medians."""
    sides = ("ours", *PEERS)
    shape = ("--policy", policy, "--layers", str(options.layers), "--dialogues", str(options.dialogues))
    medians = in_turn(__file__, sides, options.rounds, shape)
    best = max(PEERS, key=lambda side: medians[side]["tokens_per_second"])
    for side, median in medians.items():
        share = f", {median['share_of_peak']:.0%} of the matmul peak" if side == "ours" else ""
        print(
            f"{policy:12} {side:12} {median['tokens_per_second']:7.0f} tokens/s, {median['steps']:.0f} steps, "
            f"peak {median['memory'] / 2**30:.2f} GiB{share}"
        )
    ratio = medians["ours"]["tokens_per_second"] / medians[best]["tokens_per_second"]
    print(f"{policy:12} ours / {best}: {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dialogues", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", metavar="SIDE", help="one measurement, as JSON")
    parser.add_argument("--policy", default="all_answers", help="of that measurement")
    arguments = parser.parse_args()
    options = Options(arguments.layers, arguments.dialogues, arguments.rounds)
    if arguments.measure:
        as_json(measure(arguments.measure, arguments.policy, options))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
        f"{torch.get_num_threads()} threads, {options.layers} layers, {options.dialogues} dialogues"
    )
    for policy in ("last_answer", "all_answers"):
        compare(policy, options)


if __name__ == "__main__":
    main()
