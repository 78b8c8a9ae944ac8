"""Scoring 16 answers to each prompt: transformers' text-classification pipeline against ours, in turn.

    make smollm2-135m                                                (for its tokenizer)
    LLAMA2_CHAT_DATA=DIR python benchmarks/scoring.py [--layers 8] [--prompts 12] [--answers 16] [--rounds 3]

HH-RLHF harmless prompts in SmolLM2's template, each with the real answers to 16 rows, random weights of SmolLM2-135M's
shape, float32 on the CPU. The pipeline gets rendered texts sorted by length, in batches of 1, 4 or 16. Each
measurement is a process of its own and times texts to scores, tokenisation included. Printed are medians: dialogues a
second, tokens computed (padding included), peak memory, and how far the scores of both sides lie apart at most.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from measuring import as_json, in_turn, peak_memory
from smollm2_model import GGUF, hh_rlhf, load_chat_format, model_folder
from smollm2_shape import smollm2_shape
from transformers import AutoTokenizer, LlamaForSequenceClassification, pipeline

from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.dialogue import Message, Preference
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.reward.scoring import RewardModel

PEERS = {"pipeline-1": 1, "pipeline-4": 4, "pipeline-16": 16}
Dialogue = tuple[Message, ...]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    layers: int
    prompts: int
    answers: int


def dialogues_of(options: Options) -> list[Dialogue]:
    """Every prompt with as many answers, in the order of the prompts."""
    data = hh_rlhf("harmless")
    rows = [row for row in import_hh_rlhf(data, kind="preferences") if isinstance(row, Preference)]
    answers = [row.chosen for row in rows[options.prompts :][: options.answers]]
    return [
        (*row.prompt, Message("assistant", answer))
        for row in islice(rows, options.prompts)
        for answer in answers
    ]


def model_of(options: Options) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = smollm2_shape(options.layers)
    config.num_labels = 1
    config.pad_token_id = 0
    return LlamaForSequenceClassification(config).eval()


def ours(dialogues: list[Dialogue], options: Options) -> tuple[list[float], float]:
    """Scores and seconds."""
    chat_format, _ = load_chat_format()
    model = model_of(options)
    use_packed_attention(model)
    scorer = RewardModel(model, chat_format, padding_id=0, name="ours")
    scorer.score_messages(dialogues[:1])
    started = time.perf_counter()
    scores = scorer.score_messages(dialogues).tolist()
    return scores, time.perf_counter() - started


def theirs(dialogues: list[Dialogue], batch_size: int, options: Options) -> tuple[list[float], float]:
    """Scores and seconds."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), gguf_file=GGUF)
    tokenizer.pad_token_id = 0
    classify = pipeline("text-classification", model=model_of(options), tokenizer=tokenizer, device="cpu")
    # The line break after the last end-of-turn token is no part of the answer: both sides score the token before it.
    texts = [
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in d], tokenize=False
        ).rstrip("\n")
        for d in dialogues
    ]
    classify(texts[:1], function_to_apply="none")
    started = time.perf_counter()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True)
    found = classify([texts[number] for number in order], batch_size=batch_size, function_to_apply="none")
    seconds = time.perf_counter() - started
    scores = [0.0] * len(texts)
    for number, row in zip(order, found, strict=True):
        scores[number] = row["score"]
    return scores, seconds


def measure(side: str, options: Options) -> dict[str, Any]:
    """One measurement in this process."""
    dialogues = dialogues_of(options)
    computed: list[int] = []
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            computed.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) else None
        )
    )
    scores, seconds = ours(dialogues, options) if side == "ours" else theirs(dialogues, PEERS[side], options)
    return {
        "dialogues_per_second": len(dialogues) / seconds,
        "computed": sum(computed),
        "memory": peak_memory(),
        **{f"score_{number}": score for number, score in enumerate(scores)},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", metavar="SIDE", help="one measurement, as JSON")
    arguments = parser.parse_args()
    options = Options(arguments.layers, arguments.prompts, arguments.answers)
    if arguments.measure:
        as_json(measure(arguments.measure, options))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{options.layers} layers, {options.prompts} prompts with {options.answers} answers each"
    )
    given = [f"--{name}={value}" for name, value in vars(options).items()]
    medians = in_turn(__file__, ("ours", *PEERS), arguments.rounds, given)
    for side, median in medians.items():
        print(
            f"{side:12} {median['dialogues_per_second']:7.1f} dialogues/s, {median['computed']:.0f} tokens computed, "
            f"peak {median['memory'] / 2**30:.2f} GiB"
        )
    best = max(PEERS, key=lambda side: medians[side]["dialogues_per_second"])
    names = [name for name in medians["ours"] if name.startswith("score_")]
    apart = max(abs(medians["ours"][name] - medians[side][name]) for name in names for side in PEERS)
    ratio = medians["ours"]["dialogues_per_second"] / medians[best]["dialogues_per_second"]
    print(f"ours / {best}: {ratio:.2f}; scores differ by at most {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
