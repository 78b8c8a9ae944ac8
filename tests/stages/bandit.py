"""A world small enough to enumerate: every response of a tiny Llama to two prompts, with its exact probability.

Maximising E[R] - beta KL(pi, pi_0) over all distributions has a known answer, pi(y) = pi_0(y) exp(R(y) / beta) / Z: at
it R - beta log(pi / pi_0) = beta log Z is the same for every response, so that none has an advantage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

STOP, PADDING = 1, 0
PROMPTS = [EncodedPrompt(Prompt((Message("user", "w2 w3"),), is_safety=False), [2, 3])]
PROMPTS += [EncodedPrompt(Prompt((Message("user", "w4 w2"),), is_safety=True), [4, 2])]


@dataclass(frozen=True)
class Size:
    """Responses of up to `tokens` tokens, the model that writes them, and how long it is trained.

    `phases` are iterations and the rates of policy and value model: a constant rate circles the optimum, the smaller
    the closer. `head` scales the head of the reference, for as it starts every response is about as probable.
    """

    tokens: int
    vocabulary: int
    hidden: int
    spread: float
    head: float
    phases: tuple[tuple[int, float, float], ...]

    def responses(self) -> list[tuple[int, ...]]:
        """All that can be sampled: STOP ends one, and so does the last token, whatever it is."""
        found: list[tuple[int, ...]] = [(token,) for token in range(self.vocabulary)]
        for _ in range(self.tokens - 1):
            found = [
                (STOP,),
                *((first, *rest) for first in range(self.vocabulary) if first != STOP for rest in found),
            ]
        return found


ONE_TOKEN = Size(
    1, 8, 32, 0.02, 6.0, ((30, 1e-2, 1e-2), (40, 3e-3, 5e-3), (20, 1e-3, 2e-3), (10, 2e-4, 1e-3))
)
TWO_TOKENS = Size(2, 5, 48, 0.1, 2.0, ((50, 3e-3, 5e-3), (60, 1e-3, 3e-3), (30, 2e-4, 1e-3)))


class WordReward:
    """The sum of a weight for each word of the answer, and for stopping before the limit; each drawn once."""

    def __init__(self, name: str, size: Size, scale: float) -> None:
        self.name, self.tokens, self.scale = name, size.tokens, scale / size.tokens

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores, float32 (B,), in [-scale, scale]."""
        answers = [dialogue[-1].content.split() for dialogue in dialogues]
        return torch.tensor(
            [sum(map(self._weight, [*words, "stop"][: self.tokens])) for words in answers],
            dtype=torch.float32,
        )

    def _weight(self, word: str) -> float:
        return random.Random(f"{self.name}:{word}").uniform(-self.scale, self.scale)


class Bandit:
    """Reference, rewards and exact optima of one seed; all (prompts, responses), float64."""

    def __init__(self, seed: int, size: Size = ONE_TOKEN, *, threshold: float = 0.15) -> None:
        self.seed, self.size, self.responses = seed, size, size.responses()
        names = (f"helpfulness {seed}", f"safety {seed}")
        self.scorer = RewardScorer(
            *(WordReward(name, size, 3.0) for name in names), safety_threshold=threshold
        )
        self.reference = self.new_policy()
        self.start = self.distributions(self.reference)
        self.rewards = torch.tensor([self._rewards(prompt) for prompt in PROMPTS], dtype=torch.float64)

    def _rewards(self, prompt: EncodedPrompt) -> list[float]:
        answers = [(*prompt.prompt.messages, Message("assistant", text_of(y))) for y in self.responses]
        scores = self.scorer.score(answers, [prompt.prompt.is_safety] * len(answers))
        return [score.combined_logit for score in scores]

    def optimum(self, beta: float, rewards: Tensor | None = None) -> Tensor:
        """pi_0 exp(R / beta) / Z."""
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

    @torch.no_grad()
    def distributions(self, policy: LlamaForCausalLM) -> Tensor:
        """Exact probability of each response to each prompt under a policy."""
        found = []
        for prompt in PROMPTS:
            padded = [[*prompt.ids, *y, *[PADDING] * (self.size.tokens - len(y))] for y in self.responses]
            logits = policy(input_ids=torch.tensor(padded), use_cache=False).logits.double()
            first = len(prompt.ids) - 1
            logprobs = logits[:, first:].log_softmax(-1)
            found.append(
                [
                    sum(float(logprobs[row, place, token]) for place, token in enumerate(y))
                    for row, y in enumerate(self.responses)
                ]
            )
        return torch.tensor(found, dtype=torch.float64).exp()

    def train(self, folder: Path, **changes: Any) -> Tensor:
        """The distributions after PPO's own loop, phase by phase from the reference; `changes` of its configuration."""
        models = Models(self.new_policy(), self._new_value_model(), self.reference)
        for number, phase in enumerate(self.size.phases):
            directory = folder / f"phase-{number}"
            directory.mkdir(parents=True)
            PpoLoop(
                self._config(*phase, **changes),
                RunSettings(
                    base_model=BaseModelSource(path="policy"), seed=self.seed + 100 * number, device="cpu"
                ),
                StageDirectory(directory, EventLog(directory / "events.jsonl")),
                models=models,
                prompts=PROMPTS,
                chat_format=SimpleNamespace(
                    stop_id=STOP, decode_response=text_of, first_control=lambda _: None
                ),
                scorer=self.scorer,
                padding_id=PADDING,
            ).run()
        return self.distributions(models.policy)

    def _config(self, iterations: int, rate: float, value_rate: float, **changes: Any) -> PpoConfig:
        return PpoConfig(
            policy="policy",
            helpfulness="helpfulness",
            safety="safety",
            prompts=["prompts"],
            sampling={"max_new_tokens": self.size.tokens},
            incomplete="own",  # empty answers and those that are cut off are answers here
            value_clip_range=1.0,
            training={
                "iterations": iterations,
                "batch_size": 256 if self.size.tokens == 1 else 384,
                "mini_batch_size": 128,
                "learning_rate": rate,
                "value_learning_rate": value_rate,
                "weight_decay": 0.0,  # pulls the policy off the optimum, on purpose
                "checkpoint_iterations": 1000,
            },
            **changes,
        )

    def new_policy(self) -> LlamaForCausalLM:
        """The reference once more."""
        policy = self._built(LlamaForCausalLM, self.seed)
        with torch.no_grad():
            policy.lm_head.weight.mul_(self.size.head)
        return policy

    def _new_value_model(self) -> LlamaForSequenceClassification:
        value = self._built(LlamaForSequenceClassification, self.seed + 1000)
        torch.nn.init.zeros_(value.score.weight)
        return value

    def _built(self, kind: Callable[[LlamaConfig], Any], seed: int) -> Any:
        torch.manual_seed(seed)
        model = kind(
            LlamaConfig(
                vocab_size=self.size.vocabulary,
                hidden_size=self.size.hidden,
                intermediate_size=2 * self.size.hidden,
                initializer_range=self.size.spread,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=16,
                eos_token_id=STOP,
                pad_token_id=PADDING,
                num_labels=1,
                tie_word_embeddings=False,
            )
        )
        model.train(False)
        use_packed_attention(model)
        return model


def distance(left: Tensor, right: Tensor) -> float:
    """Total variation, of the prompt where it is largest."""
    return float(0.5 * (left - right).abs().sum(1).max())


def text_of(ids: Sequence[int]) -> str:
    """The text of a response: a word a token."""
    return " ".join(f"w{token}" for token in ids if token != STOP)


def sample_batch(
    engine: Any,
    chat_format: Any,
    prompts: Sequence[EncodedPrompt],
    *,
    sampling: Any,
    iteration: int,
    seed: int,
    members: Sequence[int],
) -> list[Answer]:
    """As the stage's, with one call for all samples of the two prompts: 128 calls of one sample each take long."""
    assert list(members) == list(range(len(prompts)))  # one process
    rows = engine.generate(
        [prompt.ids for prompt in PROMPTS],
        samples_per_prompt=len(prompts) // len(PROMPTS),
        sampling=sampling,
        seed=random.Random(f"{seed}:{iteration}").getrandbits(63),
    )
    answers = [iter([to_answer(response, chat_format) for response in row]) for row in rows]
    return [next(answers[PROMPTS.index(prompt)]) for prompt in prompts]
