"""Every stage for a few steps on a CUDA GPU in bfloat16, at the shape of SmolLM2-135M.

    make gpu-check

Prints tokens per second and peak memory of each stage. Weights are random (nothing is downloaded); data
come from the testbed. Says so and exits 0 where there is no GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from smollm2_shape import smollm2_shape
from transformers import LlamaForCausalLM

from llama2_chat.ghost_attention.build import run_stage as ghost_attention
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.jsonl import write_rows
from llama2_chat.models import save_model
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.train import run_stage as ppo
from llama2_chat.rejection_sampling.build import run_stage as rejection_sampling
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage as reward
from llama2_chat.safety.build import run_stage as context_distillation
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.train import run_stage as sft
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import load_tokenizer

STEPS = 5
SFT_STEPS = 150
"""As many as a random model takes to learn to end its answers; without that nothing sampled can be kept."""

_SHOWN = ("steps", "loss_first", "loss_last", "iterations", "score_first", "score_last", "kl_nats_last")


def prepare(folder: Path) -> RunSettings:
    """Write a random base model with the embedded tokenizer, and data, into `folder`."""
    settings = RunSettings(
        base_model=BaseModelSource(path=str(folder / "base")), precision="bfloat16", device="cuda"
    )
    torch.manual_seed(0)
    tokenizer = load_tokenizer(Path(str(files("llama2_chat.recipes.tiny") / "base")))
    save_model(LlamaForCausalLM(smollm2_shape()), tokenizer, folder / "base", settings=settings, card="")
    write_rows(folder / "dialogues.jsonl", GENERATORS["demonstrations"](rows=20_000, seed=0))
    write_rows(folder / "preferences.jsonl", GENERATORS["preferences"](rows=2_000, seed=0))
    write_rows(folder / "prompts.jsonl", GENERATORS["prompts"](rows=128, seed=0))
    write_rows(folder / "unsafe.jsonl", GENERATORS["safety_prompts"](rows=128, seed=0))
    write_rows(folder / "instructions.jsonl", GENERATORS["instructions"](rows=200, seed=0))
    write_rows(folder / "waiting.jsonl", GENERATORS["instruction_dialogues"](rows=64, seed=0, max_turns=6))
    return settings


def stages(folder: Path) -> dict[str, tuple[object, object]]:
    """Each stage's function and configuration, in order."""

    def model(stage: str) -> str:
        return str(folder / stage / "model")

    training = {"max_steps": STEPS, "checkpoint_steps": 1000}
    reward_training = training | {"batch_size": 128}
    return {
        "sft": (
            sft,
            SftConfig(
                model=str(folder / "base"),
                dialogues=[str(folder / "dialogues.jsonl")],
                training=training
                | {"batch_size": 16, "sequence_length": 1024, "max_steps": SFT_STEPS, "learning_rate": 1e-3},
            ),
        ),
        "reward": (
            reward,
            RewardConfig(
                model=model("sft"),
                preferences=[str(folder / "preferences.jsonl")],
                domain="helpfulness",
                training=reward_training,
            ),
        ),
        "rejection_sampling": (
            rejection_sampling,
            RejectionSamplingConfig(
                policy=model("sft"),
                base=str(folder / "base"),
                helpfulness=model("reward"),
                prompts=[str(folder / "prompts.jsonl")],
                samples_per_prompt=16,
                sampling={"temperature": 1.0, "max_new_tokens": 64},
                # Five steps from the base would leave it random, and its answers endless.
                start_from="policy",
                sft_dialogues=[str(folder / "dialogues.jsonl")],
                training=training | {"batch_size": 4, "sequence_length": 1024},
            ),
        ),
        "ghost_attention": (
            ghost_attention,
            GhostAttentionConfig(
                policy=model("rejection_sampling"),
                dialogues=[str(folder / "waiting.jsonl")],
                instructions=[str(folder / "instructions.jsonl")],
                sampling={"temperature": 1.0, "max_new_tokens": 64},
                training=training | {"batch_size": 4, "sequence_length": 1024},
            ),
        ),
        "ppo": (
            ppo,
            PpoConfig(
                policy=model("ghost_attention"),
                helpfulness=model("reward"),
                prompts=[str(folder / "prompts.jsonl")],
                sampling={"temperature": 1.0, "max_new_tokens": 64},
                training={"iterations": STEPS, "batch_size": 128, "mini_batch_size": 64},
            ),
        ),
        "context_distillation": (
            context_distillation,
            ContextDistillationConfig(
                policy=model("ppo"),
                safety=model("reward"),
                prompts=[str(folder / "unsafe.jsonl")],
                sampling={"temperature": 1.0, "max_new_tokens": 64},
                training=training | {"batch_size": 4, "sequence_length": 1024},
            ),
        ),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU on this machine; nothing was checked")
        return 0
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = prepare(folder)
        for stage, (run, config) in stages(folder).items():
            directory = StageDirectory(folder / stage, EventLog(folder / "events.jsonl"))
            directory.path.mkdir()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            metrics = run(config, settings, directory)  # type: ignore[operator]
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated() / 2**30
            shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in _SHOWN if name in metrics)
            print(f"{stage}: {seconds:.1f} s with loading, peak {peak:.2f} GiB, {shown}")
        print((folder / "events.jsonl").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
