"""Judging the policy on prompts that it is not trained on: one response to each, the same random numbers each time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llama2_chat import distributed, interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Scores, messages_to_rows
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.masked_stats import masked_mean
from llama2_chat.ppo.batch_measures import score_means, status_shares
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import Models
from llama2_chat.ppo.measures import response_kl
from llama2_chat.ppo.response_tokens import pack_responses, policy_logprobs, response_mask, to_grid
from llama2_chat.ppo.rollout import EncodedPrompt, raw_combined, sample_batch, score_answers
from llama2_chat.ppo.sharing import own_share, put_together
from llama2_chat.reward.scoring import RewardScorer, Score

_NO_ITERATION = -1
"""What stands for the iteration in the seed: no batch of the training has it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Prompts with a response to each, and what the reward models say of it."""

    prompts: Sequence[EncodedPrompt]
    answers: list[Answer]
    scores: list[Score]
    independent: list[float] | None


@dataclass(frozen=True)
class Judge:
    """Everything that an evaluation needs beside the prompts; the policy is the one in training."""

    name: str
    """What the policy in training is called in tables of samples."""
    config: PpoConfig
    models: Models
    engine: GenerationEngine
    chat_format: ChatFormat
    scorer: RewardScorer
    independent: RewardScorer | None
    """Its helpfulness is what the independent reward model says."""
    seed: int
    padding_id: int
    autocast: torch.dtype | None

    def judge(self, prompts: Sequence[EncodedPrompt]) -> Judged:
        """Sample and score one response to each prompt; several processes share the prompts.

        Raises:
            Interrupted: a signal asked for the end.
        """
        lengths = [len(prompt.ids) for prompt in prompts]
        with interruption.deferred() if distributed.process_count() > 1 else nullcontext():
            answers, scores, independent = self._answer(prompts, own_share(lengths))
        judged = Judged(
            prompts,
            put_together(lengths, answers),
            put_together(lengths, scores),
            None if independent is None else put_together(lengths, independent),
        )
        interruption.raise_together()
        return judged

    def _answer(
        self, prompts: Sequence[EncodedPrompt], members: Sequence[int]
    ) -> tuple[list[Answer], list[Score], list[float] | None]:
        with distributed.gathered(self.models.policy):
            answers = sample_batch(
                self.engine,
                self.chat_format,
                prompts,
                sampling=self.config.sampling,
                iteration=_NO_ITERATION,
                seed=self.seed,
                members=members,
            )
        own = [prompts[index] for index in members]
        with self._autocast():
            scores = score_answers(self.scorer, own, answers)
            if self.independent is None:
                return answers, scores, None
            return answers, scores, [s.helpfulness for s in score_answers(self.independent, own, answers)]

    def kl_and_entropy(self, judged: Judged) -> tuple[float, float]:
        """KL to the reference, mean over the responses, and minus the mean log-probability of their tokens."""
        responses = [answer.response.token_ids for answer in judged.answers]
        device = self.models.policy.device
        mask = response_mask(responses).to(device)
        logprobs, reference = (torch.zeros(mask.shape, device=device) for _ in range(2))
        size = self.config.training.micro_batch_size or self.config.training.mini_batch_size
        by_length = sorted(
            range(len(responses)), key=lambda i: len(judged.prompts[i].ids) + len(responses[i])
        )
        for start in range(0, len(by_length), size):
            members = by_length[start : start + size]
            tokens = pack_responses(
                [judged.prompts[i].ids for i in members],
                [responses[i] for i in members],
                padding_id=self.padding_id,
                device=device,
            )
            places = torch.tensor(members, device=device)
            with torch.no_grad(), self._autocast():
                said = distributed.run_as_forward(self.models.policy, policy_logprobs, tokens)
                logprobs[places] = to_grid(said, mask[places])
                with self.models.as_reference() as before:
                    said = distributed.run_as_forward(before, policy_logprobs, tokens)
                reference[places] = to_grid(said, mask[places])
        for model in (self.models.policy, self.models.reference):
            distributed.release(model)
        k1_B, _ = response_kl(logprobs, reference, response_mask=mask)
        return k1_B.mean().item(), -masked_mean(logprobs, mask).item()

    def measure(self, judged: Judged) -> dict[str, Any]:
        """The row of `held_out.jsonl` without its step: means over the responses, standard errors of the rewards."""
        kl, entropy = self.kl_and_entropy(judged)
        lengths = [len(answer.response.token_ids) for answer in judged.answers]
        row: dict[str, Any] = {
            **score_means(judged.scores),
            "score_se": standard_error([raw_combined(score) for score in judged.scores]),
            "kl_nats": kl,
            "entropy_nats": entropy,
            "response_tokens_mean": statistics.fmean(lengths),
            **status_shares(judged.answers),
        }
        if judged.independent is not None:
            row["independent_mean"] = statistics.fmean(judged.independent)
            row["independent_se"] = standard_error(judged.independent)
        return row

    def sample_rows(self, judged: Judged, iteration: int) -> list[dict[str, Any]]:
        """Rows of `samples.jsonl`, in the format of samples with a status."""
        return [
            {
                "prompt": messages_to_rows(encoded.prompt.messages),
                "response": answer.text,
                "scores": Scores(score.helpfulness, score.safety, score.combined).to_row()
                | ({} if judged.independent is None else {"independent": judged.independent[place]}),
                "policy": self.name,
                "iteration": iteration,
                "temperature": self.config.sampling.temperature,
                "sample_index": 0,
                "is_safety": encoded.prompt.is_safety,
                "status": answer.status,
            }
            for place, (encoded, answer, score) in enumerate(
                zip(judged.prompts, judged.answers, judged.scores, strict=True)
            )
        ]

    def _autocast(self) -> torch.autocast:
        kind = self.models.policy.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: sample standard deviation / sqrt(count); None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
