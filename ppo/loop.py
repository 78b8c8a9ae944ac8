"""PPO's loop: sample, score, judge each token, take a few clipped steps; once per iteration.

The distribution that is optimised is the policy's at temperature 1, whatever temperature the responses were
drawn at: ratios, KL penalty and entropy are all of that one. With `sampling.temperature` other than 1 the
batch is therefore off-policy from its first step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from llama2_chat import distributed, interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.errors import TrainingError
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.models import sampling_dtype
from llama2_chat.ppo.batch_measures import Measures, batch_measures, finite_row, step_measures
from llama2_chat.ppo.checkpoint import restore_checkpoint, save_checkpoint
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import (
    Experience,
    MiniBatch,
    Models,
    gather_experience,
    split_into_mini_batches,
)
from llama2_chat.ppo.held_out import Judge
from llama2_chat.ppo.learners import build_learners, disable_dropout
from llama2_chat.ppo.response_tokens import response_mask
from llama2_chat.ppo.rollout import (
    EncodedPrompt,
    prompt_order,
    sample_batch,
    score_answers,
    scores_to_learn,
)
from llama2_chat.ppo.running import RunningState, next_kl_coefficient, whiten_scores
from llama2_chat.ppo.sharing import own_share, put_together
from llama2_chat.ppo.watching import HeldOut, Watch
from llama2_chat.progress import track
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory
from llama2_chat.training import forget_later_steps

_PHASES = ("sampling", "scoring", "logprobs", "update")
"""What an iteration's time goes to."""


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
        held_out: HeldOut | None = None,
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
        self.watch = self._watch(held_out or HeldOut())

    def _watch(self, held_out: HeldOut) -> Watch:
        judge = Judge(
            self.directory.path.name,
            self.config,
            self.models,
            self.engine,
            self.chat_format,
            self.scorer,
            held_out.independent,
            seed=self.settings.seed,
            padding_id=self.padding_id,
            autocast=self.autocast,
        )
        return Watch(
            self.config,
            self.directory,
            judge,
            held_out=held_out.prompts,
            prompts=self.prompts,
            precision=self.settings.precision,
        )

    def run(self) -> dict[str, Any]:
        """All iterations, from the last whole checkpoint if there is one; the policy is trained in place.

        Where several processes share the weights, the first ends up with the whole policy.

        Returns:
            What the watching found (`Watch.finish`); the policy is then the one to keep.

        Raises:
            Interrupted: a signal arrived, at any process; a checkpoint was written before.
            TrainingError: a loss or gradient is not finite.
        """
        training, directory = self.config.training, self.directory
        done, self.running = restore_checkpoint(directory.checkpoints, self.trained, self.running)
        if distributed.is_main_process():
            forget_later_steps(directory.metrics_file, done)
        self.watch.resume(done)
        directory.events.write(
            "ppo_started",
            iterations=training.iterations,
            resumed_from=done,
            processes=distributed.process_count(),
        )
        description = f"{directory.path.name}: PPO"
        with track(description, total=training.iterations, unit="iterations", done=done) as progress:
            for iteration in range(done, training.iterations):
                if self._is_to_stop(iteration):
                    break
                before = dict(self.seconds)
                try:
                    self.watch.log(self._iterate(iteration))
                except TrainingError as error:
                    if not self.watch.survives(error):
                        raise
                    break
                self._write_times(iteration, before)
                progress.advance()
                last = iteration + 1 == training.iterations
                if last or (iteration + 1) % training.checkpoint_iterations == 0:
                    self._save(iteration + 1)
            else:
                self._is_to_stop(training.iterations)
        directory.events.write(
            "ppo_finished",
            iterations=len(self.watch.rows) - done,
            **{f"{name}_tokens": count for name, count in self.tokens.items()},
            **{f"{name}_seconds": round(seconds, 3) for name, seconds in self.seconds.items()},
        )
        watched = self.watch.finish()
        distributed.gather_weights(self.models.policy)
        return watched

    def _is_to_stop(self, done: int) -> bool:
        """See `Watch.look`; what it may be interrupted in is evaluation, after `done` whole iterations."""
        try:
            with self._timed("evaluation"):
                return self.watch.look(done)
        except interruption.Interrupted:
            self._save(done)
            raise

    def _iterate(self, iteration: int) -> Measures:
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
            with self._timed("logprobs"):
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
            with self._timed("update"):
                steps = self._steps(mini_batches, experience, iteration)
                for epoch in range(1, self.config.training.epochs_per_batch):
                    mini_batches = self._mini_batches(prompts, answers, iteration, epoch)
                    steps += self._steps(mini_batches, experience, iteration)
        measures = batch_measures(scores, answers, rewards, experience, running.kl_coefficient)
        self.running = self._adapted(running, measures["kl_nats"], iteration)
        return finite_row(measures | {"kl_coefficient": running.kl_coefficient} | step_measures(steps))

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

    def _write_times(self, iteration: int, before: Mapping[str, float]) -> None:
        """The seconds of each phase of one iteration, as an event."""
        phases = {
            f"{name}_seconds": round(seconds - before.get(name, 0.0), 4)
            for name, seconds in self.seconds.items()
            if name in _PHASES
        }
        self.directory.events.write("ppo_iteration", iteration=iteration + 1, **phases)

    def _save(self, iterations: int) -> None:
        save_checkpoint(self.directory.checkpoints, iterations, self.trained, self.running)
        self.watch.saved()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started
