"""The `ppo` stage: prompts and reward models in, a policy that earns more of their reward out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.distributed import is_main_process, shares_weights
from llama2_chat.errors import UserInputError
from llama2_chat.lora import merged
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model, seed_everything, select_device
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.loop import PpoLoop
from llama2_chat.ppo.models import load_models, plan_memory
from llama2_chat.ppo.rollout import EncodedPrompt, read_fitting_prompts
from llama2_chat.ppo.watching import HeldOut
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer

_SUMMARISED = ("score", "helpfulness", "safety")


def run_stage(config: PpoConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Optimise R̃_c − β KL on `config.prompts` and write `model/`; with `training.lora` also `adapter/`.

    Returns:
        `iterations`, `prompts`, `dropped_prompts`; means over the first and last tenth of the iterations; what the
        watching found (`Watch.finish`).
    """
    _refuse_shared_weights(config)
    tokenizer = load_tokenizer(config.policy, settings.gguf_file_of(config.policy))
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    seed_everything(settings.seed)
    plain_policy = load_policy(config.policy, settings, gguf_file=settings.gguf_file_of(config.policy))
    context_length = int(getattr(plain_policy.config, "max_position_embeddings", 4096))
    prompts, dropped = read_fitting_prompts(
        config.prompts,
        chat_format,
        max_new_tokens=config.sampling.max_new_tokens,
        context_length=context_length,
    )
    held_out, held_out_counts = _held_out(config, settings, directory, prompts, chat_format, context_length)
    scorer = RewardScorer.from_pretrained(
        config.helpfulness, config.safety, safety_threshold=config.safety_threshold, device=settings.device
    )
    models = load_models(config, settings, tokenizer, directory.events, policy=plain_policy, scorer=scorer)
    plan = plan_memory(models, scorer, config, settings, longest_prompt=max(len(p.ids) for p in prompts))
    directory.events.write("memory_plan", **plan.to_event())
    if is_main_process():
        print("\n".join(plan.to_lines()), file=sys.stderr, flush=True)
    if select_device(settings.device).type == "cpu":
        keep_freed_memory()  # not before: what loading takes in passing goes back
    loop = PpoLoop(
        config,
        settings,
        directory,
        models=models,
        prompts=prompts,
        chat_format=chat_format,
        scorer=scorer,
        padding_id=tokenizer.padding_id,
        held_out=held_out,
    )
    watched = loop.run()
    save_model(
        merged(models.policy, directory.adapter if is_main_process() else None),
        tokenizer,
        directory.model,
        settings=settings,
        card=model_card("ppo", config, settings),
        adapter=directory.adapter_alone(config.training.lora),
    )
    return {
        "prompts": len(prompts),
        "dropped_prompts": dropped,
        **held_out_counts,
        **summarise(directory.metrics_file),
        **watched,
    }


def _held_out(
    config: PpoConfig,
    settings: RunSettings,
    directory: StageDirectory,
    prompts: Sequence[EncodedPrompt],
    chat_format: ChatFormat,
    context_length: int,
) -> tuple[HeldOut, dict[str, int]]:
    """What the policy is judged on, and how many prompts that are; one that is trained on too is told of."""
    if not config.held_out:
        return HeldOut(), {}
    found, dropped = read_fitting_prompts(
        config.held_out,
        chat_format,
        max_new_tokens=config.sampling.max_new_tokens,
        context_length=context_length,
    )
    trained = {tuple(prompt.ids) for prompt in prompts}
    if twice := sum(tuple(prompt.ids) in trained for prompt in found):
        directory.warn(
            f"held_out: {twice:,} of {len(found):,} prompts are among those that are trained on; what is found on them "
            "says little of other prompts"
        )
    independent = None
    if config.independent is not None:
        independent = RewardScorer.from_pretrained(config.independent, device=settings.device)
    return HeldOut(found, independent), {"held_out_prompts": len(found), "dropped_held_out_prompts": dropped}


def _refuse_shared_weights(config: PpoConfig) -> None:
    where = [
        key
        for key, used in (
            ("training.lora", config.training.lora is not None),
            ("value_head: shared", config.value_head == "shared"),
        )
        if used
    ]
    if where and shares_weights():
        raise UserInputError(
            f"ppo: {' and '.join(where)}: not with weights in parts (FSDP); leave it out, or launch with --multi_gpu"
        )


def summarise(metrics_file: Path) -> dict[str, Any]:
    """Means over the first and last tenth of the iterations; what was not measured is left out."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    tenth = max(1, len(rows) // 10)

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        return float(sum(row[name] for row in part) / len(part))

    summary: dict[str, Any] = {"iterations": len(rows)}
    for name in _SUMMARISED:
        if rows[0][f"{name}_mean"] is not None:
            summary[f"{name}_first"] = mean(f"{name}_mean", rows[:tenth])
            summary[f"{name}_last"] = mean(f"{name}_mean", rows[-tenth:])
    for name in ("kl_nats", "entropy_nats", "explained_variance", "response_tokens_mean", "incomplete_share"):
        summary[f"{name}_last"] = mean(name, rows[-tenth:])
    return summary
