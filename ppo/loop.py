"""PPO's loop: sample, score, judge each token, take a few clipped steps; once per iteration.

The distribution that is optimised is the policy's at temperature 1, whatever temperature the responses were
drawn at: ratios, KL penalty and entropy are all of that one. With `sampling.temperature` other than 1 the
batch is therefore off-policy from its first step.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.errors import TrainingError
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.masked_stats import masked_mean, whiten
from llama2_chat.models import sampling_dtype
from llama2_chat.ppo.advantages import generalized_advantages
from llama2_chat.ppo.checkpoint import restore_checkpoint, save_checkpoint
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.losses import policy_loss, value_loss
from llama2_chat.ppo.optimiser import build_optimiser, disable_dropout
from llama2_chat.ppo.response_tokens import (
    ResponseTokens,
    pack_responses,
    policy_logprobs,
    response_mask,
    to_grid,
    token_values,
)
from llama2_chat.ppo.rewards import token_rewards
from llama2_chat.ppo.rollout import (
    EncodedPrompt,
    prompt_order,
    raw_combined,
    rewards_of,
    sample_batch,
    score_answers,
)
from llama2_chat.progress import track
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory
from llama2_chat.training import forget_later_steps


@dataclass(frozen=True, slots=True)
class Models:
    """What PPO trains (policy and value model) and what it only asks (reference)."""

    policy: PreTrainedModel
    value: PreTrainedModel
    reference: PreTrainedModel


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that share a forward pass: their places in the batch and their packed tokens."""

    members: Tensor
    tokens: ResponseTokens


MiniBatch = list[MicroBatch]
"""The samples of one gradient step, in the pieces that fit into memory."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What the steps on a batch take as given: (B, T) each, on the models' device."""

    mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PpoLoop:
    """State of one run: models, optimisers and what has been measured of speed."""

    def __init__(
        self,
        config: PpoConfig,
        settings: RunSettings,
        directory: StageDirectory,
        *,
        models: Models,
        prompts: Sequence[EncodedPrompt],
        chat_format: ChatFormat,
        scorer: RewardScorer,
        padding_id: int,
    ) -> None:
        self.config, self.settings, self.directory = config, settings, directory
        self.models, self.prompts = models, prompts
        self.chat_format, self.scorer, self.padding_id = chat_format, scorer, padding_id
        self.trained: dict[str, nn.Module] = {"policy": models.policy, "value": models.value}
        training = config.training
        rates = {"policy": training.learning_rate, "value": training.value_learning_rate}
        self.optimisers = {
            name: build_optimiser(model, training, rates[name] or training.learning_rate)
            for name, model in self.trained.items()
        }
        for model in (models.policy, models.value, models.reference):
            disable_dropout(model)
        if training.gradient_checkpointing:
            for model in (models.policy, models.value):
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        self.engine = TransformersEngine(
            models.policy,
            stop_id=chat_format.stop_id,
            padding_id=padding_id,
            autocast=sampling_dtype(settings),
        )
        self.device = models.policy.device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tokens: defaultdict[str, int] = defaultdict(int)

    def run(self) -> None:
        """All iterations, from the last whole checkpoint if there is one; the policy is trained in place.

        Raises:
            Interrupted: a signal arrived; a checkpoint was written before.
            TrainingError: a loss or gradient is not finite.
        """
        training, directory = self.config.training, self.directory
        done = restore_checkpoint(directory.checkpoints, self.trained, self.optimisers)
        forget_later_steps(directory.metrics_file, done)
        directory.events.write("ppo_started", iterations=training.iterations, resumed_from=done)
        description = f"{directory.path.name}: PPO"
        with track(description, total=training.iterations, unit="iterations", done=done) as progress:
            for iteration in range(done, training.iterations):
                self._log(iteration, self._iterate(iteration))
                progress.advance()
                last = iteration + 1 == training.iterations
                if last or (iteration + 1) % training.checkpoint_iterations == 0:
                    self._save(iteration + 1)
        directory.events.write(
            "ppo_finished",
            iterations=training.iterations - done,
            **{f"{name}_tokens": count for name, count in self.tokens.items()},
            **{f"{name}_seconds": round(seconds, 3) for name, seconds in self.seconds.items()},
        )

    def _iterate(self, iteration: int) -> dict[str, float | None]:
        """One batch from prompts to gradient steps; returns the line for metrics.jsonl."""
        try:
            prompts, answers = self._sample(iteration)
            with self._timed("scoring"), self._autocast():
                scores = score_answers(self.scorer, prompts, answers)
            interruption.raise_if_requested()
        except interruption.Interrupted:
            self._save(iteration)  # nothing has moved since the last iteration
            raise
        with self._timed("training"):
            prompt_ids = [prompt.ids for prompt in prompts]
            responses = [answer.response.token_ids for answer in answers]
            # The first epoch's mini-batches are also those of the passes without gradient: the same
            # arithmetic on the same rows, so the first step's ratios are 1 to the last bit.
            first_epoch = self._mini_batches(prompt_ids, responses, iteration, epoch=0)
            mask = response_mask(responses).to(self.device)
            earned = rewards_of(scores, answers, self.config).to(self.device)
            experience = self._experience(first_epoch, mask, earned)
            steps = []
            for epoch in range(self.config.training.epochs_per_batch):
                mini_batches = (
                    self._mini_batches(prompt_ids, responses, iteration, epoch) if epoch else first_epoch
                )
                steps += [self._step(mini_batch, experience, iteration) for mini_batch in mini_batches]
        return _measures(scores, answers, experience) | _mean_of_steps(steps)

    def _sample(self, iteration: int) -> tuple[list[EncodedPrompt], list[Answer]]:
        order = prompt_order(
            len(self.prompts),
            batch_size=self.config.training.batch_size,
            iteration=iteration,
            seed=self.settings.seed,
        )
        prompts = [self.prompts[index] for index in order]
        with self._timed("sampling"):
            answers = sample_batch(
                self.engine,
                self.chat_format,
                prompts,
                sampling=self.config.sampling,
                iteration=iteration,
                seed=self.settings.seed,
            )
        sampled = sum(len(answer.response.token_ids) for answer in answers)
        self.tokens["response"] += sampled
        self.tokens["prompt_and_response"] += sampled + sum(len(prompt.ids) for prompt in prompts)
        return prompts, answers

    def _mini_batches(
        self, prompts: list[list[int]], responses: list[list[int]], iteration: int, epoch: int
    ) -> list[MiniBatch]:
        """The batch in random mini-batches; samples of similar length share a micro-batch."""
        training = self.config.training
        order = list(range(len(prompts)))
        random.Random(f"mini-batches:{self.settings.seed}:{iteration}:{epoch}").shuffle(order)
        size, micro = training.mini_batch_size, training.micro_batch_size or training.mini_batch_size
        result = []
        for start in range(0, len(order), size):
            members = sorted(
                order[start : start + size], key=lambda i: (len(prompts[i]) + len(responses[i]), i)
            )
            parts = [members[first : first + micro] for first in range(0, len(members), micro)]
            result.append([self._micro_batch(part, prompts, responses) for part in parts])
        return result

    def _micro_batch(
        self, members: list[int], prompts: list[list[int]], responses: list[list[int]]
    ) -> MicroBatch:
        tokens = pack_responses(
            [prompts[i] for i in members],
            [responses[i] for i in members],
            padding_id=self.padding_id,
            device=self.device,
        )
        return MicroBatch(torch.tensor(members, device=self.device), tokens)

    @torch.no_grad()
    def _experience(self, mini_batches: list[MiniBatch], mask: Tensor, scores: Tensor) -> Experience:
        """Log-probabilities and values before any step, and what follows from them and the scores."""
        config = self.config
        logprobs, reference_logprobs, values = (torch.zeros(mask.shape, device=self.device) for _ in range(3))
        for micro_batch in (part for mini_batch in mini_batches for part in mini_batch):
            members, tokens = micro_batch.members, micro_batch.tokens
            inside = mask[members]
            with self._autocast():
                logprobs[members] = to_grid(policy_logprobs(self.models.policy, tokens), inside)
                reference_logprobs[members] = to_grid(policy_logprobs(self.models.reference, tokens), inside)
                values[members] = to_grid(token_values(self.models.value, tokens), inside)
        rewards = token_rewards(
            logprobs, reference_logprobs, scores, response_mask=mask, kl_coefficient=config.kl_coefficient
        )
        advantages, returns = generalized_advantages(
            rewards, values, response_mask=mask, discount=config.discount, gae_lambda=config.gae_lambda
        )
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Experience(mask, logprobs, reference_logprobs, values, advantages, returns)

    def _step(self, mini_batch: MiniBatch, experience: Experience, iteration: int) -> dict[str, float]:
        """One gradient step of each model on all tokens of the mini-batch together."""
        names = ["value"] if iteration < self.config.training.warmup_iterations else ["policy", "value"]
        in_step = sum(len(micro_batch.tokens.targets) for micro_batch in mini_batch)
        sums: defaultdict[str, float] = defaultdict(float)
        for name in names:
            self.trained[name].train()
            for micro_batch in mini_batch:
                share = len(micro_batch.tokens.targets) / in_step
                for measure, value in self._backward(name, micro_batch, experience, share).items():
                    sums[measure] += share * value
            norm = nn.utils.clip_grad_norm_(
                self.trained[name].parameters(), self.config.training.max_grad_norm
            ).item()
            if not (math.isfinite(sums[f"{name}_loss"]) and math.isfinite(norm)):
                rate = "learning_rate" if name == "policy" else "value_learning_rate"
                raise TrainingError(
                    f"the {name} loss became {sums[f'{name}_loss']} (gradient norm {norm}) in iteration "
                    f"{iteration + 1}; lower training.{rate}"
                )
            sums[f"{name}_grad_norm"] = norm
            self.optimisers[name].step()
            self.optimisers[name].zero_grad()
            self.trained[name].eval()
        return dict(sums)

    def _backward(
        self, name: str, micro_batch: MicroBatch, experience: Experience, share: float
    ) -> dict[str, float]:
        """Add `share` of a micro-batch's mean loss to the gradient of one model."""
        members, tokens = micro_batch.members, micro_batch.tokens
        mask = experience.mask[members]
        if name == "policy":
            with self._autocast():
                logprobs = to_grid(policy_logprobs(self.models.policy, tokens), mask)
            loss, clipped = policy_loss(
                logprobs,
                experience.logprobs[members],
                experience.advantages[members],
                response_mask=mask,
                clip_range=self.config.clip_range,
            )
            measures = {"policy_loss": loss.item(), "clip_fraction": clipped.item()}
        else:
            with self._autocast():
                values = to_grid(token_values(self.models.value, tokens), mask)
            loss = value_loss(
                values,
                experience.values[members],
                experience.returns[members],
                response_mask=mask,
                clip_range=self.config.value_clip_range,
            )
            measures = {"value_loss": loss.item()}
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return measures

    def _log(self, iteration: int, measures: dict[str, float | None]) -> None:
        """One line an iteration, on disk before any checkpoint that counts on it."""
        with self.directory.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": iteration + 1} | measures) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _save(self, iterations: int) -> None:
        save_checkpoint(self.directory.checkpoints, iterations, self.trained, self.optimisers)

    def _autocast(self) -> torch.autocast:
        dtype = sampling_dtype(self.settings)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


def _measures(
    scores: Sequence[Score], answers: Sequence[Answer], experience: Experience
) -> dict[str, float | None]:
    """What an iteration's batch says of the policy and value model that it was sampled with."""
    mask, count = experience.mask, len(scores)
    log_ratios = experience.logprobs - experience.reference_logprobs  # 0 outside the mask
    errors = (experience.returns - experience.values)[mask]
    spread = experience.returns[mask].var(correction=0)
    safety = [score.safety for score in scores if score.safety is not None]
    return {
        "score_mean": sum(map(raw_combined, scores)) / count,
        "helpfulness_mean": sum(score.helpfulness for score in scores) / count,
        "safety_mean": sum(safety) / count if safety else None,
        "kl_nats": log_ratios.sum(1).mean().item(),
        "entropy_nats": -masked_mean(experience.logprobs, mask).item(),
        "explained_variance": (1 - errors.var(correction=0) / spread).item() if spread > 0 else 0.0,
        "response_tokens_mean": mask.sum().item() / count,
        "incomplete_share": sum(answer.status != "complete" for answer in answers) / count,
    }


def _mean_of_steps(steps: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Means over an iteration's gradient steps; None for what the warm-up does not do."""
    names = (
        "policy_loss", "value_loss", "clip_fraction", "policy_grad_norm", "value_grad_norm",
    )  # fmt: skip
    return {
        name: sum(step[name] for step in steps) / len(steps) if name in steps[0] else None for name in names
    }
