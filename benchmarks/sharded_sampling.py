"""Sampling from a policy whose weights processes share (FSDP2): gathered once before, or layer by layer at each token.

    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/sharded_sampling.py
        [--layers 8] [--hidden-size 512] [--prompts 8] [--tokens 64] [--rounds 3]

Random weights of a Llama, float32 on the CPU, gloo. Every process answers its own prompts, all of them as long as
another's, for without gathering the processes must draw equally many tokens. Printed are medians of the slowest
process: seconds, tokens a second of all processes; and whether both ways drew the tokens of the whole model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat import distributed
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.settings import SamplingConfig

VOCABULARY = 8000
NEVER = -1
"""No token's id: nothing stops."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 8), ("hidden-size", 512), ("prompts", 8), ("tokens", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.train(False)
    use_packed_attention(model)
    return model


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the slowest process, and what this one made."""
    distributed.wait_for_everyone()
    started = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - started
    return max(distributed.gather_objects(seconds)), made


def main() -> None:
    options = arguments()
    distributed.connect("cpu")
    model = build(options)
    engine = TransformersEngine(model, stop_id=NEVER, padding_id=0)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=options.tokens)
    generator = torch.Generator().manual_seed(distributed.process_number())
    prompts = torch.randint(3, VOCABULARY, (options.prompts, 16), generator=generator).tolist()

    def sample(_: Any = None) -> list[list[int]]:
        rows = engine.generate(prompts, samples_per_prompt=1, sampling=sampling, seed=0)
        return [row[0].token_ids for row in rows]

    def gathered() -> list[list[int]]:
        with distributed.gathered(model):
            return sample()

    def layer_by_layer() -> list[list[int]]:
        return distributed.run_as_forward(model, sample)

    whole_seconds, expected = timed(sample)
    distributed.share_weights(model)
    assert distributed.is_sharded(model), "launch it as the head of this file says"
    ways = {"gathered once": gathered, "layer by layer": layer_by_layer}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    equal = dict.fromkeys(ways, True)
    for _ in range(options.rounds):
        for name, way in ways.items():
            taken, found = timed(way)
            seconds[name].append(taken)
            equal[name] &= all(distributed.gather_objects(found == expected))
            distributed.release(model)
    if distributed.is_main_process():
        count = distributed.process_count()
        tokens = count * options.prompts * options.tokens
        print(f"{model.num_parameters() / 1e6:.1f} M parameters, {count} processes, {tokens} tokens")
        print(f"whole model in each process, once: {whole_seconds:.2f} s")
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"{name}: {median:.2f} s, {tokens / median:.0f} tokens/s, equal text: {equal[name]}")
        ratio = statistics.median(seconds["layer by layer"]) / statistics.median(seconds["gathered once"])
        print(f"layer by layer takes {ratio:.1f} times as long")
    distributed.disconnect()


if __name__ == "__main__":
    main()
