"""Sampling K answers to each prompt: transformers' generate against ours, in turn.

    make smollm2-135m                                                (the model of the cases natural and long)
    LLAMA2_CHAT_DATA=DIR python benchmarks/sampling.py [--case natural|long|small] [--prompts 8] [--samples 16]
                                                       [--max-new-tokens 96] [--rounds 3]
                                                       [--vllm-python .venv-vllm/bin/python]      (make vllm-env)

Temperature 1, the whole distribution, float32, HH-RLHF helpful prompts with their lengths as they come. `natural` is
SmolLM2-135M with its own stops; `long` takes prompts of 400 tokens and more and short answers; `small` is a random
Llama of 5 million parameters (hidden 256, 6 layers, vocabulary 2,048) that stops after 60 tokens on average.
`generate` gets 1, 2, 4 or all prompts a call, each with num_return_sequences=K; what is fastest in a first round plays
the others. With `--vllm-python` vLLM's server (CPU build, float32, not compiled) takes part: its start, and a
first prompt of other tokens, are not timed. Each measurement is a process of its own and times token ids to token ids.
A token is useful up to the response's stop. Printed are medians: useful tokens a second, positions computed, memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from measuring import as_json, in_turn, matmul_peak, peak_memory
from smollm2_model import hh_rlhf, load_chat_format, load_model
from smollm2_shape import small_shape
from transformers import LlamaForCausalLM, PreTrainedModel

from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.generation.vllm_engine import VllmEngine
from llama2_chat.settings import SamplingConfig, VllmConfig

LONG = 400
LONGEST = 1024
STOP_LOGIT = 3.55  # of 2,048 equal tokens one has then a probability of about 1 / 60


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    case: str
    prompts: int
    samples: int
    max_new_tokens: int
    vllm_python: str | None = None


def prompts_of(options: Options) -> list[list[int]]:
    """Token ids of the first prompts of the data that are long enough for the case."""
    data = hh_rlhf("helpful")
    chat_format, _ = load_chat_format()
    chosen: list[list[int]] = []
    for row in import_hh_rlhf(data, kind="prompts"):
        ids = chat_format.prompt_ids(row.messages)
        if (LONG if options.case == "long" else 1) <= len(ids) <= LONGEST:
            chosen.append([token % 2048 for token in ids] if options.case == "small" else ids)
        if len(chosen) == options.prompts:
            break
    return chosen


def model_of(options: Options) -> tuple[PreTrainedModel, int, int]:
    """The model, its stop token and its padding token."""
    if options.case != "small":
        chat_format, tokenizer = load_chat_format()
        return load_model(), chat_format.stop_id, tokenizer.padding_id
    torch.manual_seed(0)
    config = small_shape(bos_token_id=None, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(256, 2048)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[2] = STOP_LOGIT
    model.lm_head = head
    return model, 2, 0


def ours(model: PreTrainedModel, stop: int, padding: int, prompts: list[list[int]], options: Options) -> int:
    """Useful tokens."""
    engine = TransformersEngine(model, stop_id=stop, padding_id=padding)
    sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
    rows = engine.generate(prompts, samples_per_prompt=options.samples, sampling=sampling, seed=0)
    return sum(len(response.token_ids) for row in rows for response in row)


@torch.no_grad()
def theirs(
    model: PreTrainedModel,
    stop: int,
    padding: int,
    prompts: list[list[int]],
    options: Options,
    prompts_per_call: int,
) -> int:
    """Useful tokens; prompts of similar length share a call."""
    torch.manual_seed(0)
    ordered = sorted(prompts, key=len)
    useful = 0
    for start in range(0, len(ordered), prompts_per_call):
        part = ordered[start : start + prompts_per_call]
        longest = max(map(len, part))
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=options.samples,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=padding,
        )
        for row in output[:, longest:].tolist():
            useful += row.index(stop) + 1 if stop in row else len(row)
    return useful


def measure_vllm(options: Options) -> dict[str, Any]:
    """One measurement of vLLM's server; its memory and what it computes are not seen from here."""
    if options.case == "small":
        sys.exit("--case small has a head with a bias, which vLLM's Llama has not")
    prompts = prompts_of(options)
    model, stop, _ = model_of(options)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        config = VllmConfig(python=str(options.vllm_python), max_model_len=LONGEST + options.max_new_tokens)
        with VllmEngine(folder, stop_id=stop, dtype="float32", config=config, eager=True) as engine:
            sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
            other = [[token + 1 for token in prompts[0]]]
            engine.generate(other, samples_per_prompt=options.samples, sampling=sampling, seed=1)
            started = time.perf_counter()
            rows = engine.generate(prompts, samples_per_prompt=options.samples, sampling=sampling, seed=0)
            seconds = time.perf_counter() - started
    useful = sum(len(response.token_ids) for row in rows for response in row)
    return {"tokens_per_second": useful / seconds, "seconds": seconds, "useful": useful}


def measure(side: str, options: Options) -> dict[str, Any]:
    """One measurement in this process."""
    if side == "vllm":
        return measure_vllm(options)
    prompts = prompts_of(options)
    model, stop, padding = model_of(options)
    before = peak_memory()
    computed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: computed.append(inputs[0].numel())
    )
    started = time.perf_counter()
    if side == "ours":
        useful = ours(model, stop, padding, prompts, options)
    else:
        useful = theirs(model, stop, padding, prompts, options, int(side.removeprefix("generate-")))
    seconds = time.perf_counter() - started
    weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    head = model.get_output_embeddings().weight.numel()
    prompt_tokens = sum(map(len, prompts))
    needed = 2 * (weights * (prompt_tokens + useful) + head * useful)
    return {
        "tokens_per_second": useful / seconds,
        "seconds": seconds,
        "useful": useful,
        "computed": sum(computed),
        "share_of_peak": needed / seconds / matmul_peak(),
        "memory": peak_memory(),
        "memory_before": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=("natural", "long", "small"), default="natural")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default 96, of the case long 24")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", metavar="PATH", help="vLLM's interpreter; default: without vLLM")
    parser.add_argument("--measure", metavar="SIDE", help="one measurement, as JSON")
    arguments = parser.parse_args()
    limit = arguments.max_new_tokens or (24 if arguments.case == "long" else 96)
    options = Options(arguments.case, arguments.prompts, arguments.samples, limit, arguments.vllm_python)
    if arguments.measure:
        as_json(measure(arguments.measure, options))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"case {options.case}: {options.prompts} prompts, {options.samples} samples each of up to "
        f"{options.max_new_tokens} tokens",
        flush=True,
    )
    given = [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value is not None
    ]
    peers = list(dict.fromkeys(f"generate-{min(n, options.prompts)}" for n in (1, 2, 4, options.prompts)))
    first = in_turn(__file__, peers, 1, given)
    for side, found in first.items():
        print(f"{side:12} {found['tokens_per_second']:7.1f} useful tokens/s in the first round", flush=True)
    best = max(first, key=lambda side: first[side]["tokens_per_second"])
    sides = ["ours", best, *(["vllm"] if options.vllm_python else [])]
    medians = in_turn(__file__, sides, arguments.rounds, given)
    served = medians.pop("vllm", None)
    for side, median in medians.items():
        print(
            f"{side:12} {median['tokens_per_second']:7.1f} useful tokens/s, {median['useful']:.0f} useful, "
            f"{median['computed']:.0f} positions computed, {median['seconds']:.1f} s, "
            f"{median['share_of_peak']:.0%} of the matmul peak, peak {median['memory'] / 2**30:.2f} GiB "
            f"({median['memory_before'] / 2**30:.2f} before)"
        )
    ratio = medians["ours"]["tokens_per_second"] / medians[best]["tokens_per_second"]
    print(f"ours / {best}: {ratio:.2f}", flush=True)
    if served is not None:
        print(
            f"vllm         {served['tokens_per_second']:7.1f} useful tokens/s, {served['useful']:.0f} useful"
        )
        print(
            f"ours / vllm: {medians['ours']['tokens_per_second'] / served['tokens_per_second']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
