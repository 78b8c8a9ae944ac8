"""Watching a run from outside its loop: evaluations, tables of samples, guards, early stopping, the best policy.

After a number of iterations the loop asks `look` whether to go on. Evaluations are rows of `held_out.jsonl`, by the
iterations done before them; the first is of the policy as it starts. Everything is decided from these rows and those
of `metrics.jsonl`, so that a run which is resumed decides the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat import distributed
from llama2_chat.errors import TrainingError
from llama2_chat.files import atomic_path, remove
from llama2_chat.ppo.checkpoint import read_weights, whole_weights, write_weights
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.guards import Finding, all_findings, best_evaluation, new_findings, stops_early
from llama2_chat.ppo.held_out import Judge
from llama2_chat.ppo.rollout import EncodedPrompt
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.stage import StageDirectory
from llama2_chat.training import forget_later_steps

_SHOWN_PROMPTS = 8
"""Of the training's, whose responses are kept to be read where there are no held-out prompts."""

_IN_METRICS = ("score_mean", "score_se", "helpfulness_mean", "safety_mean", "kl_nats", "independent_mean")
_WEIGHTS = "policy.safetensors"


@dataclass(frozen=True)
class HeldOut:
    """What a policy is judged on beside its own batches; nothing by default."""

    prompts: Sequence[EncodedPrompt] = ()
    independent: RewardScorer | None = None


class Watch:
    """The state of one run's watching; `stopped_by` says why it is not to go on."""

    def __init__(
        self,
        config: PpoConfig,
        directory: StageDirectory,
        judge: Judge,
        *,
        held_out: Sequence[EncodedPrompt],
        prompts: Sequence[EncodedPrompt],
        precision: str,
    ) -> None:
        self.config, self.directory, self.judge = config, directory, judge
        self.held_out = held_out
        self.shown = held_out or prompts[:_SHOWN_PROMPTS]
        self.sampler_bound = config.sampler_bound(precision)
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.stopped_by: dict[str, Any] | None = None
        self._broken: list[Finding] = []
        self._sampled = -1

    def resume(self, done: int) -> None:
        """Forget what came after the checkpoint that training goes on from, and read the rest.

        Samples are forgotten when the next ones are written.
        """
        if distributed.is_main_process():
            if self.held_out:
                forget_later_steps(self.directory.held_out, done)
            for step, folder in self._best_policies():
                if step > done:
                    remove(folder)
        distributed.wait_for_everyone()
        self.rows = _read(self.directory.metrics_file)
        self.evaluations = _read(self.directory.held_out)

    def saved(self) -> None:
        """A checkpoint was written, so that no resumed run needs any best policy but the last one."""
        if not distributed.is_main_process():
            return
        for _, folder in self._best_policies()[:-1]:
            remove(folder)

    def look(self, done: int) -> bool:
        """Evaluate where it is time to, tell what the guards find; whether to stop after `done` iterations.

        Raises:
            Interrupted: a signal asked for the end; nothing but the evaluation is lost.
            TrainingError: a metric is not finite, and there is no policy to keep or none is wanted.
        """
        last = done == self.config.training.iterations
        broken = bool(self.rows and self.rows[-1].get("not_finite"))
        if not broken and (last or done % self.config.evaluation_iterations == 0):
            self._evaluate(done)
        found = new_findings(
            self.rows, self.evaluations, self.config.guards, sampler_bound=self.sampler_bound
        )
        if broken and not self._may_end():
            raise TrainingError(next(finding.reason for finding in found if finding.guard == "not_finite"))
        stop = next((finding for finding in found if finding.action == "stop"), None)
        reason = stops_early(self.evaluations, self.config.stopping)
        if stop is None and reason is not None:
            stop = Finding("early_stopping", "stop", done, reason)
        if last:
            stop = None
        for finding in found:
            self._tell(finding, stopping=finding is stop)
        if stop is not None:
            if not broken:
                self._evaluate(done)
            self._stop(stop)
        return self.stopped_by is not None

    def log(self, measures: dict[str, Any]) -> None:
        """Append the line of the iteration that has just been done, on disk before any checkpoint that counts on it."""
        row = {"step": len(self.rows) + 1} | measures | self._judged(len(self.rows))
        _append(self.directory.metrics_file, [row])
        self.rows.append(row)

    def survives(self, error: TrainingError) -> bool:
        """Whether a loss that is not finite ends the stage with what it has; not before anything was learned."""
        if not self._may_end():
            return False
        finding = Finding("not_finite", "stop", len(self.rows), str(error))
        self._broken.append(finding)
        self._tell(finding, stopping=True)
        self._stop(finding)
        return True

    def _may_end(self) -> bool:
        """Whether a number that is not finite leaves a policy that is worth keeping, and that is wanted."""
        learned = len(self.rows) > self.config.training.warmup_iterations
        return learned and self.config.guards.not_finite.action == "stop"

    def finish(self) -> dict[str, Any]:
        """Take the best policy back if it is to be kept; returns the stage's metrics of all this."""
        best = best_evaluation(self.evaluations)
        if self.config.keeps_best and best is not None:
            read_weights(self.judge.models.policy, self._best(best["step"]) / _WEIGHTS)
        found = all_findings(
            self.rows, self.evaluations, self.config.guards, sampler_bound=self.sampler_bound
        )
        kept = best["step"] if self.config.keeps_best and best is not None else len(self.rows)
        return {
            "stopped_by": self.stopped_by,
            "kept_iteration": kept,
            "guards": [finding.to_row() for finding in (*found, *self._broken)],
            **_held_out_summary(self.evaluations, kept),
        }

    def _evaluate(self, done: int) -> None:
        """Judge the policy after `done` iterations, once; its weights are kept before the row that praises them."""
        if self._sampled == done or any(row["step"] == done for row in self.evaluations):
            return
        judged = self.judge.judge(self.shown)
        if self.held_out:
            row = {"step": done} | self.judge.measure(judged)
            if self.config.keeps_best and best_evaluation([*self.evaluations, row]) is row:
                self._keep_policy(done)
        if distributed.is_main_process():
            forget_later_steps(self.directory.samples, done - 1, key="iteration")
        _append(self.directory.samples, self.judge.sample_rows(judged, done))
        self._sampled = done
        if self.held_out:
            _append(self.directory.held_out, [row])
            self.evaluations.append(row)

    def _keep_policy(self, done: int) -> None:
        policy = self.judge.models.policy
        shared = whole_weights(policy)
        if distributed.is_main_process():
            with atomic_path(self._best(done)) as temporary:
                temporary.mkdir()
                write_weights(policy, temporary / _WEIGHTS, shared)
        distributed.wait_for_everyone()

    def _judged(self, done: int) -> dict[str, Any]:
        """What was found of the policy that the next batch is sampled with, for that batch's line."""
        row = next((row for row in self.evaluations if row["step"] == done), {})
        return {f"held_out_{name}": row[name] for name in _IN_METRICS if name in row}

    def _tell(self, finding: Finding, *, stopping: bool) -> None:
        if not stopping:
            self._say(f"iteration {finding.iteration}: {finding.reason}")
        self.directory.events.write("guard", **finding.to_row())

    def _stop(self, finding: Finding) -> None:
        self._say(f"stopped after iteration {finding.iteration}: {finding.reason}")
        self.stopped_by = {"name": finding.guard, "iteration": finding.iteration, "reason": finding.reason}
        self.directory.events.write("stopped_early", **self.stopped_by)

    def _say(self, line: str) -> None:
        if distributed.is_main_process():
            print(f"{self.directory.path.name}: {line}", file=sys.stderr, flush=True)

    def _best(self, done: int) -> Path:
        return self.directory.checkpoints / f"best-{done}"

    def _best_policies(self) -> list[tuple[int, Path]]:
        """Those on disk by the iterations done, in order: each was better than the ones before it."""
        folders = self.directory.checkpoints.glob("best-*")
        return sorted((int(folder.name.removeprefix("best-")), folder) for folder in folders)


def _held_out_summary(evaluations: Sequence[dict[str, Any]], kept: int) -> dict[str, Any]:
    """The held-out rewards of the policy as it started and as it was kept."""
    if not evaluations:
        return {}
    last = next((row for row in evaluations if row["step"] == kept), evaluations[-1])
    return {
        f"held_out_{name}_{place}": row[name]
        for place, row in (("first", evaluations[0]), ("kept", last))
        for name in _IN_METRICS
        if row.get(name) is not None
    }


def _read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _append(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """By the first process alone."""
    if not distributed.is_main_process():
        return
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())
