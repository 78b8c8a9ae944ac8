"""The `preferences` stage: sample two answers to each prompt, have the better one chosen, hold some pairs out."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path
from random import Random
from typing import Any

from llama2_chat.chat_format import ChatFormat
from llama2_chat.data_import.split import is_held_out
from llama2_chat.dialogue import RATINGS, Preference, Prompt, Row, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.generation.answers import Answer, sample_answers
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.generation.transformers_engine import TransformersEngine, load_engine
from llama2_chat.jsonl import read_prompts, read_rows, write_rows
from llama2_chat.preferences.annotators import (
    LINE,
    WrittenAnnotations,
    annotation_row,
    annotator_for,
    read_annotations,
)
from llama2_chat.preferences.config import PreferencesConfig
from llama2_chat.preferences.pairs import (
    AnswerPair,
    PlannedAnswer,
    Variant,
    Verdict,
    draw_prompts,
    pairs_of,
    plan_answers,
    to_annotate,
    to_preference,
    variant_seed,
)
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory


def run_stage(config: PreferencesConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Write `samples.jsonl` (all answers), `dataset.jsonl` (pairs to train on) and `held_out.jsonl`.

    Returns:
        Metrics: what was dropped, ratings, safety labels, and how often each variant was preferred.

    Raises:
        UserInputError: people have not judged every pair yet (the same command continues), a function returns no
            verdicts, or no pair is left to train on or to hold out.
    """
    batch = f"{config.iteration}/{config.domain}"
    rng = Random(f"preferences/{settings.seed}/{batch}")
    prompts = _prompts(config, rng)
    share = config.held_out_share(len(prompts))
    _refuse_an_empty_part([prompt.messages for prompt in prompts], share, "prompts", config)
    planned = plan_answers(prompts, len(config.policies), config.temperatures, rng)
    sampler = _Sampler(config, settings, batch)
    write_samples(
        directory.samples,
        planned,
        sampler.rows,
        description=f"{directory.path.name}: sampling",
        unit="answers",
    )
    sampler.free()
    rows = [row for _, row in read_rows(directory.samples)]
    status = Counter(row["status"] for row in rows)
    pairs, dropped = pairs_of(rows)
    if not pairs:
        raise UserInputError(
            f"none of the {len(prompts)} prompts got two complete, different answers ({dict(status)}); raise "
            "sampling.max_new_tokens or change temperatures"
        )
    verdicts = _verdicts(pairs, config, settings, directory)
    metrics = _write(pairs, verdicts, dropped, share, config, directory)
    directory.metrics_file.touch()
    return {
        "domain": config.domain,
        "iteration": config.iteration,
        "prompts": len(prompts),
        "samples": dict(sorted(status.items())),
        **metrics,
    }


def _prompts(config: PreferencesConfig, rng: Random) -> list[Prompt]:
    found = list(chain.from_iterable(read_prompts(Path(file)) for file in config.prompts))
    prompts = draw_prompts(found, config.max_prompts, rng)
    if isinstance(config.held_out, int) and config.held_out >= len(prompts):
        raise UserInputError(
            f"held_out: {config.held_out} pairs of a batch of {len(prompts)} prompts leaves none to train on; "
            "lower it, or name more prompts"
        )
    return prompts


class _Sampler:
    """Samples planned answers; one policy at a time is in memory."""

    def __init__(self, config: PreferencesConfig, settings: RunSettings, batch: str) -> None:
        self._config, self._settings, self._batch = config, settings, batch
        self._policy: int | None = None
        self._loaded: tuple[TransformersEngine, ChatFormat] | None = None

    def rows(self, planned: Sequence[PlannedAnswer]) -> list[Row]:
        """Rows of `samples.jsonl`, in the order of `planned`."""
        found: dict[tuple[int, int], Row] = {}
        in_order = sorted(planned, key=lambda answer: (answer.variant.policy, answer.variant.temperature))
        for variant, members in groupby(in_order, key=lambda answer: answer.variant):
            answers = list(members)
            for answer, sampled in zip(answers, self._sample(variant, answers), strict=True):
                found[answer.pair, answer.side] = {
                    "prompt": messages_to_rows(answer.prompt.messages),
                    "response": sampled.text,
                    "scores": None,
                    "policy": _name(self._config.policies[variant.policy]),
                    "iteration": self._config.iteration,
                    "temperature": variant.temperature,
                    "sample_index": answer.side,
                    "is_safety": answer.prompt.is_safety,
                    "status": sampled.status,
                    "pair": answer.pair,
                }
        return [found[answer.pair, answer.side] for answer in planned]

    def _sample(self, variant: Variant, planned: Sequence[PlannedAnswer]) -> list[Answer]:
        engine, chat_format = self._engine(variant.policy)
        sampled = sample_answers(
            engine,
            chat_format,
            [answer.prompt.messages for answer in planned],
            samples_per_prompt=1,
            sampling=self._config.sampling.model_copy(update={"temperature": variant.temperature}),
            seed=variant_seed(self._settings.seed, self._batch, variant),
        )
        return [answer for (answer,) in sampled]

    def _engine(self, policy: int) -> tuple[TransformersEngine, ChatFormat]:
        if self._loaded is None or self._policy != policy:
            self.free()
            self._loaded = load_engine(self._config.policies[policy], self._settings)
            self._policy = policy
        return self._loaded

    def free(self) -> None:
        """Let go of the policy in memory."""
        self._loaded = None
        gc.collect()


def _name(policy: str) -> str:
    """What a policy is called in rows and metrics: the stage's name, without its number, or the folder's."""
    path = Path(policy)
    return re.sub(r"^\d+-", "", path.parent.name) if path.name == "model" else path.name


def _verdicts(
    pairs: Sequence[AnswerPair], config: PreferencesConfig, settings: RunSettings, directory: StageDirectory
) -> list[Verdict]:
    """The annotator's choices, kept in `annotations.jsonl`; a killed stage goes on after the last whole chunk."""
    file = directory.path / "annotations.jsonl"
    annotator = annotator_for(config, settings.seed)
    if isinstance(annotator, WrittenAnnotations):
        _refuse_unfinished(annotator, pairs, directory)

    def judged(chunk: Sequence[AnswerPair]) -> list[Row]:
        return list(map(annotation_row, chunk, annotator.annotate(chunk)))

    write_samples(file, pairs, judged, description=f"{directory.path.name}: annotating", unit="pairs")
    verdicts = read_annotations(file)
    return [verdicts[pair.id] for pair in pairs]


def _refuse_unfinished(
    annotator: WrittenAnnotations, pairs: Sequence[AnswerPair], directory: StageDirectory
) -> None:
    """Write what is to be annotated, and stop where it is not done."""
    shown = directory.path / "to_annotate.jsonl"
    write_rows(shown, map(to_annotate, pairs))
    missing = annotator.missing(pairs)
    if missing:
        others = set(annotator.verdicts) - {pair.id for pair in pairs}
        strange = f" ({len(others):,} annotations there are of other pairs)" if others else ""
        raise UserInputError(
            f"{directory.path.name}: {len(missing):,} of {len(pairs):,} pairs have no annotation in {annotator.file}"
            f"{strange}, the first is {missing[0].id}; the pairs are in {shown}. Add a line for each: {LINE}, with the "
            f"id from there and rating one of {', '.join(RATINGS)} (rating and both labels may be left out). Then run "
            "the same command again: it goes on from here"
        )


def _write(
    pairs: Sequence[AnswerPair],
    verdicts: Sequence[Verdict],
    dropped: Counter[str],
    share: float,
    config: PreferencesConfig,
    directory: StageDirectory,
) -> dict[str, Any]:
    """Write the two parts and count."""
    judged = list(zip(pairs, verdicts, strict=True))
    kept = [(pair, verdict) for pair, verdict in judged if not verdict.prefers_unsafe]
    dropped = dropped + Counter(prefers_unsafe=len(judged) - len(kept))
    preferences = [to_preference(*one, config.domain, f"preferences:{config.iteration}") for one in kept]
    _refuse_an_empty_part([one.prompt for one in preferences], share, "pairs that are left", config)
    parts: dict[bool, list[Preference]] = {True: [], False: []}
    for one in preferences:
        parts[is_held_out(one.prompt, share)].append(one)
    if config.domain == "safety" and all(verdict.safe is None for verdict in verdicts):
        directory.warn(
            "no pair has safety labels: unsafe preferred answers stay, and the safety loss has nothing to go by"
        )
    write_rows(directory.path / "held_out.jsonl", (one.to_row() for one in parts[True]))
    write_rows(directory.dataset, (one.to_row() for one in parts[False]))
    ratings = Counter(one.rating for one in preferences)
    return {
        "pairs": {
            "kept": len(preferences),
            "unrated": ratings[None],
            "dropped": dict(sorted(dropped.items())),
        },
        "training_pairs": len(parts[False]),
        "held_out_pairs": len(parts[True]),
        "held_out_share": share,
        "ratings": {rating: ratings[rating] for rating in RATINGS},
        "first_shown_preferred": sum(verdict.preferred == 0 for verdict in verdicts) / len(verdicts),
        "variants": _variants(judged),
    }


def _variants(judged: Sequence[tuple[AnswerPair, Verdict]]) -> dict[str, dict[str, int]]:
    """How often each variant was shown and preferred."""
    shown, preferred = Counter[str](), Counter[str]()
    for pair, verdict in judged:
        shown.update(pair.variants)
        preferred[pair.variants[verdict.preferred]] += 1
    return {name: {"shown": shown[name], "preferred": preferred[name]} for name in sorted(shown)}


def _refuse_an_empty_part(
    prompts: Sequence[Sequence[Any]], share: float, what: str, config: PreferencesConfig
) -> None:
    """Both parts must hold something; the split goes by the first user message, and few may all fall into one."""
    held_out = sum(is_held_out(messages, share) for messages in prompts)
    if held_out in (0, len(prompts)):
        part = "held out" if held_out == 0 else "trained on"
        raise UserInputError(
            f"{', '.join(config.prompts)}: of {len(prompts)} {what} none would be {part} at a share of {share:.4g}; "
            "set held_out, or name more prompts"
        )
