"""PPO: an iteration of TRL 1.12.0's PPOTrainer against ours, in turn, on the same prompts and models.

    python -m venv DIR && DIR/bin/pip install -r constraints-trl-peer.txt      (the last TRL with PPO)
    make smollm2-135m                                (for its tokenizer, and for --model real)
    LLAMA2_CHAT_DATA=DIR python benchmarks/ppo.py --peer-python DIR/bin/python [--model shape|small|real] [--layers 4]
        [--prompts 32] [--response-tokens 64] [--iterations 3] [--rounds 3]

HH-RLHF helpful prompts of at most 512 tokens in SmolLM2's template, one response of exactly `--response-tokens` to each
(nothing ends one), one reward model, a value model with its trunk, float32, AdamW. One epoch of one mini-batch on both
sides, so one step an iteration; then ours alone at the paper's eight mini-batches. `shape` has random weights of
SmolLM2-135M's shape, `small` is a Llama of 5 million parameters, `real` the model itself. TRL takes four responses a
micro-batch, and all at once; the better of the two in a first round plays the others. Each measurement is a process of
its own: the first iteration warms up, medians over the others. Printed: samples a second (a response sampled,
scored and learnt from), peak memory, seconds of the phases, and for ours the share of the machine's matmul peak that
the useful operations reach: 6 per weight and token trained, 2 where nothing is trained, attention, the head at
response tokens alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from measuring import as_json, matmul_peak, peak_memory
from smollm2_model import hh_rlhf, load_chat_format, load_model
from smollm2_shape import small_shape, smollm2_shape
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.models import load_policy, load_reward_model, use_fitting_threads
from llama2_chat.ppo import loop
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import Models
from llama2_chat.ppo.rollout import EncodedPrompt
from llama2_chat.reward.scoring import RewardModel, RewardScorer, Score
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory

PADDING = 0
NO_STOP = -1  # an id that is never drawn
PAPER_MINI_BATCHES = 8
PHASES = ("generate", "score", "judge", "update")
"""`judge`: log-probabilities of policy and reference, and values, before the update. TRL takes the policy's from
sampling; ours are computed again, so that the first ratios are 1."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--peer-python", help="interpreter of an environment with TRL 1.12.0; default: ours alone"
    )
    parser.add_argument("--model", choices=("shape", "small", "real"), default="shape")
    parser.add_argument("--layers", type=int, default=4, help="of --model shape")
    parser.add_argument("--prompts", type=int, default=32, help="of an iteration")
    parser.add_argument("--longest-prompt", type=int, default=512, help="in tokens; longer ones are left out")
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8, help="ours, in responses")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MINI_BATCHES"), help="ours once, as JSON")
    options = parser.parse_args()
    if options.measure:
        folder, mini_batches = Path(options.measure[0]), int(options.measure[1])
        as_json(measure(folder, mini_batches, options.micro_batch))
        return
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        lengths = lay_out(Path(folder), options)
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
            f"model {options.model}; an iteration: {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens "
            f"(mean {statistics.mean(lengths):.0f}), {options.response_tokens} tokens to each",
            flush=True,
        )
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All sides in turn; medians and the ratio."""
    ours = [sys.executable, __file__, f"--micro-batch={options.micro_batch}", "--measure", str(folder)]
    commands = {"ours": [*ours, "1"]}
    if options.peer_python:
        script = str(Path(__file__).with_name("ppo_peer.py"))
        peers = {
            f"trl-{micro}": [options.peer_python, script, str(folder), str(micro)]
            for micro in sorted({min(4, options.prompts), options.prompts})
        }
        first = {side: once(command) for side, command in peers.items()}
        for side, found in first.items():
            print(
                f"{side:8} {options.prompts / found['seconds']:6.2f} samples/s in the first round", flush=True
            )
        best = min(first, key=lambda side: first[side]["seconds"])
        commands[best] = peers[best]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in commands}
    for _ in range(options.rounds):
        for side, command in commands.items():
            runs[side].append(once(command))
    runs["ours-paper"] = [once([*ours, str(min(PAPER_MINI_BATCHES, options.prompts))])]
    medians = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for side, found in runs.items()
    }
    for side, median in medians.items():
        print(line_of(side, median, options.prompts), flush=True)
    for side in medians:
        if side.startswith("trl"):
            theirs, mine = medians[side], medians["ours"]
            print(
                f"ours / {side}: {theirs['seconds'] / mine['seconds']:.2f} in samples a second, "
                f"{theirs['processor_seconds'] / mine['processor_seconds']:.2f} in samples a processor second, "
                f"{mine['memory'] / theirs['memory']:.2f} in memory",
                flush=True,
            )


def line_of(side: str, median: dict[str, float], prompts: int) -> str:
    """What is printed of a side."""
    phases = []
    for name in PHASES:
        share = f" ({median[f'{name}_share']:.0%} of the peak)" if f"{name}_share" in median else ""
        phases.append(f"{name} {median[name]:.2f} s{share}")
    return (
        f"{side:10} {prompts / median['seconds']:6.2f} samples/s ({median['processor_seconds']:.1f} processor seconds "
        f"an iteration), {median['optimiser_steps']:.0f} steps, peak "
        f"{median['memory'] / 2**30:.2f} GiB; {', '.join(phases)}; sampling is "
        f"{median['generate'] / median['seconds']:.0%}"
    )


def once(command: Sequence[str]) -> dict[str, float]:
    """What a measuring process prints last."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr.strip()[-2000:])
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def lay_out(folder: Path, options: argparse.Namespace) -> list[int]:
    """Write `policy/`, `reward/` and `work.json`, which all sides read; returns the prompts' lengths."""
    data = hh_rlhf("helpful")
    chat_format, _ = load_chat_format()
    rows = (row for row in import_hh_rlhf(data, kind="prompts") if isinstance(row, Prompt))
    encoded = (chat_format.prompt_ids(row.messages) for row in rows)
    fitting = (ids for ids in encoded if len(ids) <= options.longest_prompt)
    torch.manual_seed(0)
    if options.model == "real":
        policy: Any = load_model()
    else:
        policy = LlamaForCausalLM(
            smollm2_shape(options.layers) if options.model == "shape" else small_shape()
        )
    vocabulary = policy.config.vocab_size
    prompts = [
        [
            2 + token % (vocabulary - 2) if token < 2 or token >= vocabulary else token
            for token in next(fitting)
        ]
        for _ in range(options.prompts)
    ]
    policy.save_pretrained(folder / "policy")
    config = AutoConfig.from_pretrained(folder / "policy")
    config.num_labels, config.architectures = 1, None
    reward = AutoModelForSequenceClassification.from_config(config)
    reward.base_model.load_state_dict(policy.base_model.state_dict())
    reward.save_pretrained(folder / "reward")
    work = {
        "prompts": prompts,
        "response_tokens": options.response_tokens,
        "iterations": options.iterations + 1,
    }
    (folder / "work.json").write_text(json.dumps(work))
    return list(map(len, prompts))


class NumbersFormat:
    """Stands in for a chat format: text is token ids, so that the reward model reads the very tokens sampled."""

    stop_id = NO_STOP

    def decode_response(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    def first_control(self, token_ids: Sequence[int]) -> None:
        """None of them is taken for one."""


class TokenScorer(RewardScorer):
    """Scores such text."""

    def score(self, dialogues: Sequence[Any], is_safety: Sequence[bool] | None = None) -> list[Score]:
        tokens = [
            [int(word) for message in dialogue for word in message.content.split()] for dialogue in dialogues
        ]
        assert isinstance(self.helpfulness, RewardModel)
        found = self.helpfulness.score_tokens(tokens)
        return self.combine(found, None, [False] * len(tokens))


def measure(folder: Path, mini_batches: int, micro_batch: int) -> dict[str, Any]:
    """Ours in this process."""
    work = json.loads((folder / "work.json").read_text())
    prompts, batch = work["prompts"], len(work["prompts"])
    settings = RunSettings(base_model=BaseModelSource(path=str(folder / "policy")), device="cpu")
    mini_batch = batch // mini_batches
    config = PpoConfig(
        policy=str(folder / "policy"), helpfulness=str(folder / "reward"), prompts=["-"],
        sampling={"max_new_tokens": work["response_tokens"]},
        training={
            "iterations": work["iterations"], "batch_size": batch, "mini_batch_size": mini_batch,
            "micro_batch_size": min(micro_batch, mini_batch),
        },
    )  # fmt: skip
    keep_freed_memory()
    policy, reference = (load_policy(folder / "policy", settings) for _ in range(2))
    value, judge = (load_reward_model(folder / "reward", settings) for _ in range(2))
    use_fitting_threads(policy, torch.device("cpu"))
    numbers: Any = NumbersFormat()
    with tempfile.TemporaryDirectory() as path:
        ppo = loop.PpoLoop(
            config,
            settings,
            StageDirectory(Path(path), EventLog(Path(path) / "events.jsonl")),
            models=Models(policy, value, reference),
            prompts=[
                EncodedPrompt(Prompt((Message("user", " ".join(map(str, ids))),)), ids) for ids in prompts
            ],
            chat_format=numbers,
            scorer=TokenScorer(RewardModel(judge, numbers, padding_id=PADDING, name="reward")),
            padding_id=PADDING,
        )
        rows = [iteration_of(ppo, number) for number in range(work["iterations"])][1:]
    result = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    peak = matmul_peak()
    for phase, operations in useful_operations(policy, prompts, work["response_tokens"]).items():
        result[f"{phase}_share"] = operations / result[phase] / peak
    return {**result, "optimiser_steps": mini_batches, "memory": peak_memory()}


def iteration_of(ppo: loop.PpoLoop, number: int) -> dict[str, float]:
    """Seconds of one iteration and of its phases."""
    judged = SimpleNamespace(seconds=0.0)
    gather = loop.gather_experience

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        experience = gather(*arguments, **named)
        judged.seconds = time.perf_counter() - started
        return experience

    loop.gather_experience = timed  # type: ignore[attr-defined]
    before, started, used = dict(ppo.seconds), time.perf_counter(), time.process_time()
    ppo._iterate(number)
    loop.gather_experience = gather  # type: ignore[attr-defined]
    taken = {name: ppo.seconds[name] - before.get(name, 0.0) for name in ppo.seconds}
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
        "generate": taken["sampling"],
        "score": taken["scoring"],
        "judge": judged.seconds,
        "update": taken["training"] - judged.seconds,
    }


def useful_operations(policy: Any, prompts: Sequence[Sequence[int]], response: int) -> dict[str, float]:
    """Floating-point operations of each phase that no implementation could leave out."""
    shape = policy.config
    layers = sum(p.numel() for name, p in policy.named_parameters() if ".layers." in name and p.dim() > 1)
    tokens = sum(len(prompt) + response for prompt in prompts)
    attention = (
        2 * shape.num_hidden_layers * shape.hidden_size * sum((len(p) + response) ** 2 for p in prompts)
    )
    trunk = 2 * layers * tokens + attention
    head = 2 * shape.hidden_size * shape.vocab_size * response * len(prompts)
    return {
        "generate": trunk + head,
        "score": trunk,
        "judge": 3 * trunk + 2 * head,  # policy, reference and value model
        "update": 3 * (2 * trunk + head),  # policy and value model, forward and backward
    }


if __name__ == "__main__":
    main()
