"""When a run evaluates which policy: beside the stages where a core is free, the others at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from llama2_chat.pipeline.fingerprints import fingerprint_of
from llama2_chat.pipeline.inputs import Inputs, prepare_inputs
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.references import references, resolve
from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.stage import STAGE_KINDS

if TYPE_CHECKING:
    from llama2_chat.evaluation.background import BackgroundEvaluation
    from llama2_chat.evaluation.config import EvaluationConfig
    from llama2_chat.settings import RunSettings


@contextmanager
def evaluating(recipe: Recipe, run: RunDirectory, inputs: Inputs, *, wanted: bool) -> Iterator[RunEvaluation]:
    """The run's evaluation; where it is not wanted, or the recipe has none, it does nothing."""
    evaluation = RunEvaluation(recipe, run, inputs, wanted=wanted)
    try:
        yield evaluation
    finally:
        evaluation.close()


class RunEvaluation:
    """Evaluates the policies of a run as the run goes on."""

    def __init__(self, recipe: Recipe, run: RunDirectory, inputs: Inputs, *, wanted: bool) -> None:
        self._recipe, self._run, self._inputs = recipe, run, inputs
        self._wanted = wanted and recipe.evaluation is not None
        self._background: BackgroundEvaluation | None = None
        self._submitted: set[str] = set()

    def go_on(self) -> None:
        """Have the policies that are there evaluated in a second process, if that costs the stages nothing."""
        if not self._wanted or not self._can_begin() or not _a_core_is_free():
            return
        config, settings, sft, fingerprints = self._arguments()
        if self._background is None:
            from llama2_chat.evaluation.background import BackgroundEvaluation

            self._background = BackgroundEvaluation(
                config,
                settings,
                sft=None if sft is None else self._inputs.paths[f"model:{sft}"],
                directory=self._run.evaluation,
                events=self._run.events.path,
            )
        for name, fingerprint in sorted(fingerprints.items(), key=lambda item: item[0] != sft):
            if name not in self._submitted:
                self._submitted.add(name)
                self._background.submit(name, self._inputs.paths[f"model:{name}"], fingerprint)

    def finish(self) -> dict[str, Any] | None:
        """The results of all policies."""
        if not self._wanted:
            return None
        from llama2_chat.evaluation.run import run_evaluation

        config, settings, sft, fingerprints = self._arguments()
        evaluate = partial(
            run_evaluation,
            config,
            settings,
            fingerprints=fingerprints,
            sft=sft,
            directory=self._run.evaluation,
            events=self._run.events,
        )
        policies = {name: self._inputs.paths[f"model:{name}"] for name in fingerprints}
        if self._background is not None:
            # What the second process was not given is evaluated beside it.
            evaluate(policies=policies, only=[name for name in policies if name not in self._submitted])
            self._background.wait()
        return evaluate(policies=policies)

    def close(self) -> None:
        """End the second process, if there is one."""
        if self._background is not None:
            self._background.close()

    def _can_begin(self) -> bool:
        """Whether the reward models are there, and the policy that the others are compared with."""
        assert self._recipe.evaluation is not None
        models = [n for r in references(self._recipe.evaluation) if r.kind != "data" for n in r.names]
        sft = self._sft()
        return all(f"model:{name}" in self._inputs.paths for name in [*models, *([sft] if sft else [])])

    def _sft(self) -> str | None:
        """The policy that win rate and KL are measured against."""
        of_kind = (name for name in self._recipe.stages if self._recipe.kind_of(name) == "sft")
        return next((name for name in of_kind if name != self._recipe.base_stage), None)

    def _arguments(self) -> tuple[EvaluationConfig, RunSettings, str | None, dict[str, str]]:
        """Configuration and settings with paths, the SFT policy's name, fingerprints of the policies that are there."""
        recipe, inputs = self._recipe, self._inputs
        assert recipe.evaluation is not None
        prepare_inputs(recipe.evaluation, recipe, self._run, inputs)
        config = resolve(
            recipe.evaluation,
            lambda referring, name: inputs.paths[f"{'data' if referring.kind == 'data' else 'model'}:{name}"],
        )
        named = {name: inputs.paths[f"model:{name}"] for name in recipe.head.models}
        settings = recipe.settings.with_paths(inputs.paths["model:base"], named)
        sft = self._sft()
        made = [name for name in recipe.stages if STAGE_KINDS[recipe.kind_of(name)].produces == "policy"]
        policies = ["base", *(name for name in made if name != recipe.base_stage)]
        own = fingerprint_of(recipe.evaluation, recipe.settings, inputs.hashes)
        of_sft = inputs.hashes.get(f"model:{sft}", "")
        fingerprints = {
            name: ":".join([own, inputs.hashes[f"model:{name}"], of_sft])
            for name in policies
            if f"model:{name}" in inputs.hashes
        }
        return config, settings, sft, fingerprints


def _a_core_is_free() -> bool:
    """Whether this process computes with one thread, as it does with small models, on a machine with more cores."""
    import torch

    return torch.get_num_threads() == 1 and (os.cpu_count() or 1) > 1
