"""Evaluating all policies of a run on the same held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.evaluation.policy import (
    Judge,
    Judged,
    PolicyAnswers,
    policy_metrics,
    win_rate,
)
from llama2_chat.evaluation.recall import Recalls, measure_recall, recall_metrics
from llama2_chat.evaluation.statistics import mean_interval
from llama2_chat.files import read_json, write_json
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.jsonl import read_dialogues, read_prompts, write_rows
from llama2_chat.logprobs import response_logprobs
from llama2_chat.models import load_policy, sampling_dtype
from llama2_chat.progress import track
from llama2_chat.reward.custom import Reward
from llama2_chat.reward.scoring import RewardModel, RewardScorer, load_reward
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog
from llama2_chat.tokenizers import load_tokenizer, same_tokens


def run_evaluation(
    config: EvaluationConfig,
    settings: RunSettings,
    *,
    policies: Mapping[str, Path | str],
    fingerprints: Mapping[str, str],
    sft: str | None,
    directory: Path,
    events: EventLog,
    only: Collection[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of every policy, in the form of `summary.json`'s `evaluation`.

    Args:
        config: With model and data references resolved to paths.
        policies: Folder (or hub id) of each policy by name, `base` included.
        fingerprints: What each policy's result depends on; a stored result with the same is not made again.
        sft: Name of the policy that win rate and KL are measured against; evaluated before the others.
        only: Names of the policies to evaluate; default: all.
        directory: Gets `NAME.json` (metrics) and `NAME.samples.jsonl` (judged answers) for each policy.
    """
    wanted = [name for name in policies if only is None or name in only]
    names = sorted(wanted, key=lambda name: (name != sft, wanted.index(name)))
    results: dict[str, dict[str, Any]] = {}
    evaluator: PolicyEvaluator | None = None
    with track("evaluation", total=len(names), unit="policies") as progress:
        for name in names:
            interruption.raise_if_requested()
            metrics = stored_metrics(directory, name, fingerprints[name])
            if metrics is None:
                evaluator = evaluator or PolicyEvaluator(config, settings, policies.get(sft or ""))
                metrics = evaluate_and_store(
                    evaluator, name, policies[name], fingerprints[name], directory=directory, events=events
                )
            results[name] = metrics
            progress.advance(1)
    return {name: results[name] for name in wanted}


def stored_metrics(directory: Path, name: str, fingerprint: str) -> dict[str, Any] | None:
    """The metrics of a policy that were stored under this fingerprint, if there are any."""
    file = directory / f"{name}.json"
    stored = read_json(file) if file.exists() else None
    return stored["metrics"] if stored is not None and stored["fingerprint"] == fingerprint else None


def evaluate_and_store(
    evaluator: PolicyEvaluator,
    name: str,
    policy: Path | str,
    fingerprint: str,
    *,
    directory: Path,
    events: EventLog,
) -> dict[str, Any]:
    """Evaluate a policy and write its `NAME.samples.jsonl` and then its `NAME.json`."""
    started = time.perf_counter()
    metrics, rows = evaluator.evaluate(policy)
    write_rows(directory / f"{name}.samples.jsonl", rows)
    write_json(directory / f"{name}.json", {"fingerprint": fingerprint, "metrics": metrics})
    events.write("policy_evaluated", policy=name, seconds=time.perf_counter() - started)
    return metrics


class PolicyEvaluator:
    """The prompts, the reward models and the SFT policy's answers, loaded once for all policies."""

    def __init__(self, config: EvaluationConfig, settings: RunSettings, sft: Path | str | None) -> None:
        self.config, self.settings, self.sft = config, settings, sft
        self.prompts = _read(config.prompts)
        self.greedy_prompts = _read(config.greedy_prompts) if config.greedy_prompts else self.prompts
        self.safety_prompts = _read(config.safety_prompts)
        self.borderline_prompts = _read(config.borderline_prompts)
        self.attribute_dialogues = list(
            chain.from_iterable(read_dialogues(Path(file)) for file in config.attribute_dialogues)
        )
        self.scorer: RewardScorer | None = None
        self.safety: Reward | None = None
        if config.helpfulness is not None:
            self.scorer = RewardScorer.from_pretrained(
                config.helpfulness,
                config.safety,
                safety_threshold=config.safety_threshold,
                device=settings.device,
            )
        elif config.safety is not None:
            self.safety = load_reward(config.safety, slot="safety", device=settings.device)
        self.independent = (
            None
            if config.independent is None
            else RewardModel.from_pretrained(config.independent, device=settings.device)
        )
        self._sft_helpful: list[list[Judged]] | None = None

    def evaluate(self, policy: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics of one policy, and its judged answers as rows."""
        judge = self._judge(policy)
        answers = self._answers(judge)
        metrics = policy_metrics(answers)
        recalls = self._recalls(judge)
        if recalls is not None:
            recalled, intervals = recall_metrics(recalls)
            metrics |= recalled
            metrics["intervals"] |= intervals
        if self.sft is not None and self.prompts:
            if self._sft_helpful is None:
                same = str(policy) == str(self.sft)
                self._sft_helpful = (
                    answers.helpful
                    if same
                    else self._judge(self.sft).answers(self.prompts, self.config.samples_per_prompt)
                )
            compared = {"win_rate_vs_sft": win_rate(answers.helpful, self._sft_helpful)}
            ratios = self._kl_to_sft(policy, answers.helpful)
            if ratios is not None:
                compared["kl_to_sft_nats"] = mean_interval(ratios)
            metrics |= {name: interval["mean"] for name, interval in compared.items()}
            metrics["intervals"] |= compared
        return metrics, [
            *_rows(answers),
            *(recall.to_row() for recall in (recalls.asked if recalls is not None else ())),
        ]

    def _judge(self, policy: Path | str) -> Judge:
        gguf_file = self.settings.gguf_file_of(str(policy))
        tokenizer = load_tokenizer(policy, gguf_file)
        chat_format = build_chat_format(self.settings.chat_format, tokenizer)
        engine = TransformersEngine(
            load_policy(policy, self.settings, gguf_file=gguf_file),
            stop_id=chat_format.stop_id,
            padding_id=tokenizer.padding_id,
            autocast=sampling_dtype(self.settings),
        )
        return Judge(
            engine,
            chat_format,
            self.scorer,
            self.config.sampling,
            self.settings.seed,
            safety=self.safety,
            independent=self.independent,
        )

    def _answers(self, judge: Judge) -> PolicyAnswers:
        return PolicyAnswers(
            helpful=judge.answers(self.prompts, self.config.samples_per_prompt),
            greedy=[row[0] for row in judge.answers(self.greedy_prompts, 1, greedy=True)],
            safety=judge.answers(self.safety_prompts, self.config.safety_samples_per_prompt),
            borderline=judge.answers(self.borderline_prompts, 1),
        )

    def _recalls(self, judge: Judge) -> Recalls | None:
        if not self.attribute_dialogues:
            return None
        return measure_recall(
            judge.engine,
            judge.chat_format,
            self.attribute_dialogues,
            turns=self.config.recall_turns,
            sampling=self.config.sampling,
            seed=self.settings.seed,
        )

    def _kl_to_sft(self, policy: Path | str, helpful: list[list[Judged]]) -> list[float] | None:
        """For each prompt, log policy/SFT of a response's tokens, summed; mean over the prompt's samples.

        Responses were drawn from the policy at temperature 1, so the mean estimates KL(policy ‖ SFT). None where the
        two have different tokens.
        """
        assert self.sft is not None
        if str(policy) == str(self.sft):
            return [0.0] * len(helpful)
        gguf_file = self.settings.gguf_file_of(str(self.sft))
        tokenizer = load_tokenizer(self.sft, gguf_file)
        own = load_tokenizer(policy, self.settings.gguf_file_of(str(policy)))
        if not same_tokens(own, tokenizer):
            return None
        chat_format = build_chat_format(self.settings.chat_format, tokenizer)
        prompts = [chat_format.prompt_ids(row[0].prompt.messages) for row in helpful for _ in row]
        responses = [j.answer.response for row in helpful for j in row]
        reference = response_logprobs(
            load_policy(self.sft, self.settings, gguf_file=gguf_file),
            prompts,
            [response.token_ids for response in responses],
            padding_id=tokenizer.padding_id,
        )
        ratios = [sum(r.logprobs) - sum(ref) for r, ref in zip(responses, reference, strict=True)]
        samples = self.config.samples_per_prompt
        return [sum(ratios[i : i + samples]) / samples for i in range(0, len(ratios), samples)]


def _read(files: list[str]) -> list[Prompt]:
    """Each prompt once: the samples of one that comes twice are the same, and count as one in an interval."""
    found: dict[tuple[Message, ...], Prompt] = {}
    for prompt in chain.from_iterable(read_prompts(Path(file)) for file in files):
        found.setdefault(tuple(prompt.messages), prompt)
    return list(found.values())


def _rows(answers: PolicyAnswers) -> list[dict[str, Any]]:
    """Judged answers as JSON rows, for reading and for the report."""
    sets = {
        "helpful": [j for row in answers.helpful for j in row],
        "greedy": answers.greedy,
        "safety": [j for row in answers.safety for j in row],
        "borderline": [j for row in answers.borderline for j in row],
    }
    return [
        {
            "set": name,
            **j.prompt.to_row(),
            "response": j.answer.text,
            "status": j.answer.status,
            "scores": {
                "helpfulness": None if j.score is None else j.score.helpfulness,
                "safety": j.safety,
                "combined": None if j.score is None else j.score.combined,
            },
            "refused": j.refused,
        }
        | (
            {}
            if j.grade is None
            else {"oracle_helpfulness": j.grade.helpfulness, "oracle_safe": j.grade.safe}
        )
        for name, judged in sets.items()
        for j in judged
    ]
