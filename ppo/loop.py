"""PPO's loop: sample, score, judge each token, take a few clipped steps; once per iteration.

The distribution that is optimised is the policy's at temperature 1, whatever temperature the responses were
drawn at: ratios, KL penalty and entropy are all of that one. With `sampling.temperature` other than 1 the
batch is therefore off-policy from its first step.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.masked_stats import masked_mean
from llama2_chat.models import sampling_dtype
from llama2_chat.ppo.checkpoint import restore_checkpoint, save_checkpoint
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import (
    Experience,
    MiniBatch,
    Models,
    gather_experience,
    split_into_mini_batches,
)
from llama2_chat.ppo.learners import build_learners, disable_dropout
from llama2_chat.ppo.response_tokens import response_mask
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
        self.autocast = sampling_dtype(settings)
        self.device = models.policy.device
        self.learners = build_learners(models, config, self.autocast)
        disable_dropout(models.reference)
        self.trained = {learner.name: (learner.model, learner.optimiser) for learner in self.learners}
        self.engine = TransformersEngine(
            models.policy, stop_id=chat_format.stop_id, padding_id=padding_id, autocast=self.autocast
        )
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tokens: defaultdict[str, int] = defaultdict(int)

    def run(self) -> None:
        """All iterations, from the last whole checkpoint if there is one; the policy is trained in place.

        Raises:
            Interrupted: a signal arrived; a checkpoint was written before.
            TrainingError: a loss or gradient is not finite.
        """
        training, directory = self.config.training, self.directory
        done = restore_checkpoint(directory.checkpoints, self.trained)
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
            mini_batches = self._mini_batches(prompts, answers, iteration, epoch=0)
            experience = gather_experience(
                self.models,
                mini_batches,
                response_mask([answer.response.token_ids for answer in answers]).to(self.device),
                rewards_of(scores, answers, self.config).to(self.device),
                self.config,
                self.autocast,
            )
            steps = self._steps(mini_batches, experience, iteration)
            for epoch in range(1, self.config.training.epochs_per_batch):
                mini_batches = self._mini_batches(prompts, answers, iteration, epoch)
                steps += self._steps(mini_batches, experience, iteration)
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
        self, prompts: Sequence[EncodedPrompt], answers: Sequence[Answer], iteration: int, epoch: int
    ) -> list[MiniBatch]:
        return split_into_mini_batches(
            [prompt.ids for prompt in prompts],
            [answer.response.token_ids for answer in answers],
            self.config.training,
            shuffled_by=f"mini-batches:{self.settings.seed}:{iteration}:{epoch}",
            padding_id=self.padding_id,
            device=self.device,
            layout=self.models.layout(),
        )

    def _steps(
        self, mini_batches: Sequence[MiniBatch], experience: Experience, iteration: int
    ) -> list[dict[str, float]]:
        """One gradient step of each model on each mini-batch; of the value model alone in the warm-up."""
        warming_up = iteration < self.config.training.warmup_iterations
        learners = [learner for learner in self.learners if not (warming_up and learner.name == "policy")]
        steps = []
        for mini_batch in mini_batches:
            measures: dict[str, float] = {}
            for learner in learners:
                measures |= learner.step(mini_batch, experience)
            steps.append(measures)
        return steps

    def _log(self, iteration: int, measures: dict[str, float | None]) -> None:
        """One line an iteration, on disk before any checkpoint that counts on it."""
        with self.directory.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": iteration + 1} | measures) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _save(self, iterations: int) -> None:
        save_checkpoint(self.directory.checkpoints, iterations, self.trained)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

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
