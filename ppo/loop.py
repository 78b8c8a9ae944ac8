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
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from llama2_chat import distributed, interruption
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
    sample_batch,
    score_answers,
    scores_to_learn,
)
from llama2_chat.ppo.running import RunningState, next_kl_coefficient, whiten_scores
from llama2_chat.ppo.sharing import own_share, put_together
from llama2_chat.progress import track
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory
from llama2_chat.training import forget_later_steps


class PpoLoop:
    """State of one run: models, optimisers, running state and what has been measured of speed."""

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
        for model in (models.policy, models.value, models.reference):
            distributed.share_weights(model, self.autocast)
        self.running = RunningState(config.kl_coefficient)
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

        Where several processes share the weights, the first ends up with the whole policy.

        Raises:
            Interrupted: a signal arrived, at any process; a checkpoint was written before.
            TrainingError: a loss or gradient is not finite.
        """
        training, directory = self.config.training, self.directory
        done, self.running = restore_checkpoint(directory.checkpoints, self.trained, self.running)
        if distributed.is_main_process():
            forget_later_steps(directory.metrics_file, done)
        directory.events.write(
            "ppo_started",
            iterations=training.iterations,
            resumed_from=done,
            processes=distributed.process_count(),
        )
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
        distributed.gather_weights(self.models.policy)

    def _iterate(self, iteration: int) -> dict[str, float | None]:
        """One batch from prompts to gradient steps; returns the line for metrics.jsonl."""
        try:
            interruption.raise_together()
            prompts, answers, scores = self._sample(iteration)
            interruption.raise_together()
        except interruption.Interrupted:
            self._save(iteration)  # nothing has moved since the last iteration
            raise
        learnt = scores_to_learn(scores, answers, self.config)
        running = self.running.with_scores(learnt)
        rewards = whiten_scores(learnt, running.scores, over=self.config.whiten_scores)
        with self._timed("training"):
            mini_batches = self._mini_batches(prompts, answers, iteration, epoch=0)
            experience = gather_experience(
                self.models,
                mini_batches,
                response_mask([answer.response.token_ids for answer in answers]).to(self.device),
                rewards.to(self.device),
                self.config,
                self.autocast,
                kl_coefficient=running.kl_coefficient,
            )
            steps = self._steps(mini_batches, experience, iteration)
            for epoch in range(1, self.config.training.epochs_per_batch):
                mini_batches = self._mini_batches(prompts, answers, iteration, epoch)
                steps += self._steps(mini_batches, experience, iteration)
        measures = _measures(scores, answers, experience) | {"kl_coefficient": running.kl_coefficient}
        self.running = self._adapted(running, measures["kl_nats"], iteration)
        return measures | _mean_of_steps(steps)

    def _adapted(self, running: RunningState, kl_nats: float | None, iteration: int) -> RunningState:
        """With the next iteration's β; it stays where no target is set, and while the policy stands still."""
        config, training = self.config, self.config.training
        if config.kl_target is None or kl_nats is None or iteration < training.warmup_iterations:
            return running
        coefficient = next_kl_coefficient(
            running.kl_coefficient,
            kl_nats,
            target=config.kl_target,
            responses=training.batch_size,
            horizon=config.kl_horizon,
        )
        return replace(running, kl_coefficient=coefficient)

    def _sample(self, iteration: int) -> tuple[list[EncodedPrompt], list[Answer], list[Score]]:
        """The iteration's prompts with answers and scores; each process samples and scores a share of them."""
        order = prompt_order(
            len(self.prompts),
            batch_size=self.config.training.batch_size,
            iteration=iteration,
            seed=self.settings.seed,
        )
        prompts = [self.prompts[index] for index in order]
        lengths = [len(prompt.ids) for prompt in prompts]
        # A process that left alone would leave the others waiting for its answers.
        alone = distributed.process_count() == 1
        with nullcontext() if alone else interruption.deferred():
            answers, scores = self._answer(prompts, own_share(lengths), iteration)
        answers, scores = put_together(lengths, answers), put_together(lengths, scores)
        sampled = sum(len(answer.response.token_ids) for answer in answers)
        self.tokens["response"] += sampled
        self.tokens["prompt_and_response"] += sampled + sum(len(prompt.ids) for prompt in prompts)
        return prompts, answers, scores

    def _answer(
        self, prompts: Sequence[EncodedPrompt], members: Sequence[int], iteration: int
    ) -> tuple[list[Answer], list[Score]]:
        """Answers to some of the iteration's prompts, and their scores."""
        with self._timed("sampling"), distributed.gathered(self.models.policy):
            answers = sample_batch(
                self.engine,
                self.chat_format,
                prompts,
                sampling=self.config.sampling,
                iteration=iteration,
                seed=self.settings.seed,
                members=members,
            )
        with self._timed("scoring"), self._autocast():
            return answers, score_answers(self.scorer, [prompts[index] for index in members], answers)

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
            processes=distributed.process_count(),
            process=distributed.process_number(),
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
        """One line an iteration, by the first process, on disk before any checkpoint that counts on it."""
        if not distributed.is_main_process():
            return
        with self.directory.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": iteration + 1} | measures) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _save(self, iterations: int) -> None:
        save_checkpoint(self.directory.checkpoints, iterations, self.trained, self.running)

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
