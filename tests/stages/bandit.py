"""A world small enough to enumerate: every response of a tiny Llama to two prompts, with its exact probability.

Maximising E[R] - beta KL(pi, pi_0) over all distributions has a known answer, pi(y) = pi_0(y) exp(R(y) / beta) / Z: at
it R - beta log(pi / pi_0) = beta log Z is the same for every response, so that none has an advantage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2_chat.dialogue import Message, Prompt
from llama2_chat.generation.answers import Answer, to_answer
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import Models
from llama2_chat.ppo.loop import PpoLoop
from llama2_chat.ppo.rollout import EncodedPrompt
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory

VOCABULARY, STOP, PADDING = 8, 1, 0
RESPONSES = range(VOCABULARY)
"""One token each; STOP alone is the empty answer, the others are cut off, and all keep their own scores."""
PROMPTS = [EncodedPrompt(Prompt((Message("user", "w2 w3"),), is_safety=False), [2, 3])]
PROMPTS += [EncodedPrompt(Prompt((Message("user", "w4 w5"),), is_safety=True), [4, 5])]

PHASES = ((30, 1e-2, 1e-2), (40, 3e-3, 5e-3), (20, 1e-3, 2e-3), (10, 2e-4, 1e-3))
"""Iterations, rates of policy and value model: constant rates circle the optimum, the smaller the closer."""


class TableReward:
    """A score for each prompt and response, drawn once, uniform in [-`scale`, `scale`]."""

    def __init__(self, name: str, scale: float) -> None:
        self.name, self.scale = name, scale

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores, float32 (B,)."""
        keys = [f"{self.name}:{[message.content for message in dialogue]}" for dialogue in dialogues]
        return torch.tensor([random.Random(key).uniform(-self.scale, self.scale) for key in keys])


class Bandit:
    """Reference, rewards and exact optima of one seed; responses in the order of `RESPONSES`."""

    def __init__(self, seed: int, *, threshold: float = 0.15, scale: float = 3.0) -> None:
        self.seed = seed
        self.scorer = RewardScorer(
            TableReward(f"helpfulness {seed}", scale),
            TableReward(f"safety {seed}", scale),
            safety_threshold=threshold,
        )
        self.reference = new_policy(seed)
        self.start = distributions(self.reference)
        self.rewards = torch.stack(
            [
                torch.tensor([score.combined_logit for score in self.scorer.score(answers, tags)])
                for answers, tags in (
                    (
                        [(*p.prompt.messages, Message("assistant", text_of([y]))) for y in RESPONSES],
                        [p.prompt.is_safety] * VOCABULARY,
                    )
                    for p in PROMPTS
                )
            ]
        ).double()

    def optimum(self, beta: float, rewards: Tensor | None = None) -> Tensor:
        """pi_0 exp(R / beta) / Z, (prompts, responses)."""
        rewards = self.rewards if rewards is None else rewards
        return (self.start.log() + rewards / beta).softmax(1)

    def whitened_optimum(self, beta: float, eps: float = 0.0) -> tuple[Tensor, float]:
        """The policy that is optimal for its own rewards as whitened under itself, and their spread there.

        The mean shifts every R alike and cancels, so that only the spread has to be found: it starts as the
        reference's, from where PPO starts too, and moves towards what it leads to.
        """
        spread = self.spread(self.start)
        for _ in range(500):
            found = self.spread(self.optimum(beta * spread))
            spread = 0.5 * (spread + math.sqrt(found**2 + eps))
        return self.optimum(beta * spread), spread

    def spread(self, policy: Tensor) -> float:
        """Standard deviation of R over all prompts, equally often, and the policy's responses."""
        weights = policy / len(policy)
        mean = (weights * self.rewards).sum()
        return math.sqrt((weights * (self.rewards - mean) ** 2).sum())

    def objective(self, policy: Tensor, beta: float) -> float:
        """E[R] - beta KL(policy, reference), mean over prompts."""
        return float((policy * (self.rewards - beta * (policy / self.start).log())).sum(1).mean())


def distance(left: Tensor, right: Tensor) -> float:
    """Total variation, of the prompt where it is largest."""
    return float(0.5 * (left - right).abs().sum(1).max())


@torch.no_grad()
def distributions(policy: LlamaForCausalLM) -> Tensor:
    """Exact probability of each response to each prompt, float64 (prompts, responses)."""
    ids = torch.tensor([prompt.ids for prompt in PROMPTS])
    return policy(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(1)


def text_of(ids: Sequence[int]) -> str:
    """The text of a response: a word a token."""
    return " ".join(f"w{token}" for token in ids if token != STOP)


def train(bandit: Bandit, folder: Path, **changes: Any) -> Tensor:
    """The distribution after PPO's own loop, phase by phase from the reference; `changes` of its configuration."""
    policy, value = new_policy(bandit.seed), new_value_model(bandit.seed)
    for number, (iterations, rate, value_rate) in enumerate(PHASES):
        config = PpoConfig(
            policy="policy",
            helpfulness="helpfulness",
            safety="safety",
            prompts=["prompts"],
            sampling={"max_new_tokens": 1},
            incomplete="own",
            value_clip_range=1.0,
            training={
                "iterations": iterations,
                "batch_size": 256,
                "mini_batch_size": 128,
                "learning_rate": rate,
                "value_learning_rate": value_rate,
                "weight_decay": 0.0,  # pulls the policy off the optimum, on purpose
                "checkpoint_iterations": 1000,
            },
            **changes,
        )
        phase = folder / f"phase-{number}"
        phase.mkdir(parents=True)
        PpoLoop(
            config,
            RunSettings(
                base_model=BaseModelSource(path="policy"), seed=bandit.seed + 100 * number, device="cpu"
            ),
            StageDirectory(phase, EventLog(phase / "events.jsonl")),
            models=Models(policy, value, bandit.reference),
            prompts=PROMPTS,
            chat_format=SimpleNamespace(stop_id=STOP, decode_response=text_of),
            scorer=bandit.scorer,
            padding_id=PADDING,
        ).run()
    return distributions(policy)


def sample_batch(
    engine: Any,
    chat_format: Any,
    prompts: Sequence[EncodedPrompt],
    *,
    sampling: Any,
    iteration: int,
    seed: int,
) -> list[Answer]:
    """As the stage's, with one call for all samples of the two prompts: 128 calls of one sample each take long."""
    rows = engine.generate(
        [prompt.ids for prompt in PROMPTS],
        samples_per_prompt=len(prompts) // len(PROMPTS),
        sampling=sampling,
        seed=random.Random(f"{seed}:{iteration}").getrandbits(63),
    )
    answers = [iter([to_answer(response, chat_format) for response in row]) for row in rows]
    return [next(answers[PROMPTS.index(prompt)]) for prompt in prompts]


def new_policy(seed: int) -> LlamaForCausalLM:
    """Random; its head is scaled up, for with the usual start every response is about as probable."""
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(_architecture())
    with torch.no_grad():
        policy.lm_head.weight.mul_(6.0)
    return _ready(policy)


def new_value_model(seed: int) -> LlamaForSequenceClassification:
    """A trunk of its own under a head that says 0."""
    torch.manual_seed(seed + 1000)
    value = LlamaForSequenceClassification(_architecture())
    torch.nn.init.zeros_(value.score.weight)
    return _ready(value)


def _architecture() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        eos_token_id=STOP,
        pad_token_id=PADDING,
        num_labels=1,
        tie_word_embeddings=False,
    )


def _ready(model: Any) -> Any:
    model.train(False)
    use_packed_attention(model)
    return model
