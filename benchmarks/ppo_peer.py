"""TRL 1.12.0's PPOTrainer on the work that `ppo.py` has laid out; run by it, in an environment of TRL's own.

Imports nothing of llama2_chat. The last line printed is JSON: seconds of an iteration and of its phases.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Seconds of each iteration, by phase; what no phase takes is the update."""

    def __init__(self) -> None:
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.iterations: list[dict[str, float]] = []
        self.optimiser_steps = 0

    def timed(self, function: Any, phase: Any) -> Any:
        """The function, with its time added to the phase that `phase(*arguments)` names, None for none."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            name, started = phase(*arguments), time.perf_counter()
            result = function(*arguments, **named)
            if name is not None:
                self.phases[name] += time.perf_counter() - started
            return result

        return wrapped

    def count_step(self, *_: Any) -> None:
        """Called after every step of the optimiser."""
        self.optimiser_steps += 1

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter(), time.process_time()
        seconds, processor_seconds = (after - before for after, before in zip(now, self.started, strict=True))
        self.started = now
        self.iterations.append(
            {
                **self.phases,
                "update": seconds - sum(self.phases.values()),
                "seconds": seconds,
                "processor_seconds": processor_seconds,
            }
        )
        self.phases.clear()


def numbers_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Pads with an id that no prompt holds; nothing is decoded in earnest."""
    words = {str(number): number for number in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    tokenizer.padding_side = "left"
    return tokenizer


def measure(folder: Path, micro_batch: int) -> dict[str, Any]:
    work = json.loads((folder / "work.json").read_text())
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    prompts = Dataset.from_dict({"input_ids": work["prompts"]})
    batch, iterations = len(work["prompts"]), work["iterations"]
    arguments = PPOConfig(
        output_dir=str(folder / "peer"), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch, num_mini_batches=1, num_ppo_epochs=1,
        total_episodes=batch * iterations, response_length=work["response_tokens"], temperature=1.0, stop_token=None,
        learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5,
        kl_coef=0.01, gamma=1.0, lam=0.95, num_sample_generations=0, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    clock = Clock()
    ppo_trainer.batch_generation = clock.timed(ppo_trainer.batch_generation, lambda *_: "generate")
    ppo_trainer.get_reward = clock.timed(
        ppo_trainer.get_reward, lambda model, *_: "score" if model is reward else "judge"
    )

    def if_rollout(*_: Any) -> str | None:
        return None if torch.is_grad_enabled() else "judge"

    ppo_trainer.forward = clock.timed(ppo_trainer.forward, if_rollout)
    ppo_trainer.selective_log_softmax = clock.timed(ppo_trainer.selective_log_softmax, if_rollout)
    trainer = PPOTrainer(
        args=arguments, processing_class=numbers_tokenizer(policy.config.vocab_size), model=policy,
        ref_model=reference, reward_model=reward, value_model=value, train_dataset=prompts,
        eval_dataset=prompts.select(range(1)), callbacks=[clock],
    )  # fmt: skip
    # The data are one batch, and at the end of the data accelerate would step after every micro-batch.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    trainer.optimizer.optimizer.register_step_post_hook(clock.count_step)
    trainer.train()
    measured = clock.iterations[1:]  # the first is the warm-up
    result = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
    result["optimiser_steps"] = clock.optimiser_steps / iterations
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["threads"] = torch.get_num_threads()
    return result


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
