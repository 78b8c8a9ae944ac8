"""Reward training: TRL's RewardTrainer against ours, in turn, on the same pairs.

    make smollm2-135m                                                (for its tokenizer)
    LLAMA2_CHAT_DATA=DIR python benchmarks/reward_training.py [--layers 8] [--pairs 80] [--rounds 3]

HH-RLHF harmless pairs in SmolLM2's template, eight pairs a step, AdamW, float32, random weights of SmolLM2-135M's
shape. TRL takes one pair a micro-batch (its best on a CPU, where padding costs most) and eight (its default). Each
measurement is a process of its own and times `train()`. Printed are medians: pairs a second, tokens computed (padding
included), peak memory, optimiser steps, the loss of the first step (the same on all sides), and for ours the share of
the machine's matmul peak that the useful operations reach: 6 per weight and token, every prompt once, and attention.
On a GPU: `--device cuda`, both sides in bfloat16.
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
from transformers import LlamaForSequenceClassification, Trainer
from transformers.trainer_utils import SaveStrategy
from trl.trainer.reward_config import RewardConfig as TrlRewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from llama2_chat.chat_format import build_chat_format
from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.dialogue import Message, Preference
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.reward.config import RewardTraining
from llama2_chat.reward.data import collate_pairs, encode_pairs, tokens_of, training_columns
from llama2_chat.reward.pooling import RowLayout, common_beginning, pool_at_ends, row_layout
from llama2_chat.reward.trainer import MarginRewardTrainer, reward_arguments
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import load_tokenizer
from llama2_chat.training import placeholder_tokenizer

PAIRS_PER_STEP = 8
OUR_MICRO_BATCH = 2
PADDING = 0
PEERS = {"trl-1": 1, "trl-8": 8}
Pairs = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    layers: int
    pairs: int
    micro_batch: int
    device: str


def model_of(options: Options) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = smollm2_shape(options.layers)
    config.num_labels = 1
    config.pad_token_id = PADDING
    return LlamaForSequenceClassification(config).to(options.device)  # type: ignore[arg-type]


def pairs_of(count: int) -> Pairs:
    data = Path(os.environ.get("LLAMA2_CHAT_DATA", "../shared/data")) / "hh-rlhf" / "harmless-base.jsonl.gz"
    models = Path(os.environ.get("LLAMA2_CHAT_MODELS", "models")) / "smollm2-135m"
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not data.exists() or not (models / gguf).exists():
        sys.exit(f"needs {data} and {models / gguf}; see the head of this file")
    chat_format = build_chat_format("tokenizer", load_tokenizer(str(models), gguf))
    rows = (row for row in import_hh_rlhf(data, kind="preferences") if isinstance(row, Preference))
    _, tokens, _ = encode_pairs(islice(rows, count), chat_format, 2048)
    return tokens


def our_trainer(
    model: LlamaForSequenceClassification, pairs: Pairs, folder: str, options: Options
) -> tuple[Trainer, list[int]]:
    use_packed_attention(model)
    if options.device == "cpu":
        keep_freed_memory()
    training = RewardTraining(
        batch_size=PAIRS_PER_STEP, micro_batch_size=options.micro_batch, min_warmup_steps=0
    )
    settings = RunSettings(
        base_model=BaseModelSource(path="-"), device=options.device, precision=precision(options)
    )
    arguments = reward_arguments(training, settings, Path(folder), len(pairs))
    arguments.save_strategy = SaveStrategy.NO
    unrated = [Preference((Message("user", "-"),), "", "") for _ in pairs]
    pool_at_ends(model)
    computed: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate_pairs(rows, PADDING, row_layout(model))
        computed.append(batch["input_ids"].numel())
        return batch

    trainer = MarginRewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(training_columns(unrated, pairs, margin_table="none")),
        data_collator=collate,
        processing_class=placeholder_tokenizer(PADDING),
        safety_weight=0.0,
    )
    return trainer, computed


def peer_trainer(
    model: LlamaForSequenceClassification, pairs: Pairs, folder: str, micro_batch: int, options: Options
) -> tuple[Trainer, list[int]]:
    arguments = TrlRewardConfig(
        output_dir=folder, max_length=None, num_train_epochs=1, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PAIRS_PER_STEP // micro_batch, learning_rate=1e-5, gradient_checkpointing=False,
        weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5, lr_scheduler_type="cosine", save_strategy="no",
        logging_steps=1, report_to="none", use_cpu=options.device == "cpu", bf16=precision(options) == "bfloat16",
        disable_tqdm=True, dataloader_pin_memory=False, data_seed=0, seed=0,
    )  # fmt: skip
    dataset = Dataset.from_dict(
        {"chosen_ids": [chosen for chosen, _ in pairs], "rejected_ids": [rejected for _, rejected in pairs]}
    )
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=placeholder_tokenizer(PADDING)
    )
    computed: list[int] = []
    collate = trainer.data_collator

    def counted(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(rows)
        computed.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    return trainer, computed


def precision(options: Options) -> Any:
    return "float32" if options.device == "cpu" else "bfloat16"


def measure(side: str, options: Options) -> dict[str, Any]:
    """One training run in this process."""
    pairs, model = pairs_of(options.pairs), model_of(options)
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            trainer, computed = our_trainer(model, pairs, folder, options)
        else:
            trainer, computed = peer_trainer(model, pairs, folder, PEERS[side], options)
        started = time.perf_counter()
        trainer.train()
        if options.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    on_gpu = options.device != "cpu"
    return {
        "pairs_per_second": len(pairs) / seconds,
        "computed": sum(computed),
        "steps": trainer.state.global_step,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "first_loss": losses[0],
        "share_of_peak": 0.0
        if on_gpu
        else useful_operations(pairs, options.layers) / seconds / matmul_peak(),
    }


def useful_operations(pairs: Pairs, layers: int) -> float:
    """Floating-point operations of forward and backward that no implementation could leave out."""
    hidden = smollm2_shape(layers).hidden_size
    attention = 0
    for chosen, rejected in pairs:
        shared = common_beginning(chosen, rejected)
        attention += len(chosen) ** 2 + len(rejected) ** 2 - shared**2
    tokens = tokens_of(pairs, RowLayout(share=True, one_row=True))["computed"]
    return 6 * layer_weights(layers) * tokens + 6 * layers * hidden * attention


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=OUR_MICRO_BATCH, help="ours, in pairs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", metavar="SIDE", help="one measurement, as JSON")
    arguments = parser.parse_args()
    options = Options(arguments.layers, arguments.pairs, arguments.micro_batch, arguments.device)
    if arguments.measure:
        as_json(measure(arguments.measure, options))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
        f"{torch.get_num_threads()} threads, {options.device}, {options.layers} layers, {options.pairs} pairs"
    )
    given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]
    medians = in_turn(__file__, ("ours", *PEERS), arguments.rounds, given)
    for side, median in medians.items():
        share = f", {median['share_of_peak']:.0%} of the matmul peak" if side == "ours" else ""
        print(
            f"{side:6} {median['pairs_per_second']:6.2f} pairs/s, {median['computed']:.0f} tokens computed, "
            f"{median['steps']:.0f} steps, first loss {median['first_loss']:.5f}, "
            f"peak {median['memory'] / 2**30:.2f} GiB{share}"
        )
    for peer in PEERS:
        ratio = medians["ours"]["pairs_per_second"] / medians[peer]["pairs_per_second"]
        print(f"ours / {peer}: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
