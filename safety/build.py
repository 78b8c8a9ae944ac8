"""The `context_distillation` stage: answers that a safety preprompt brings, trained on without the preprompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from llama2_chat.chat_format import build_chat_format, check_takes_system
from llama2_chat.dialogue import Prompt, Row
from llama2_chat.errors import UserInputError
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.jsonl import read_prompts, read_rows, write_rows
from llama2_chat.lora import merged, with_adapter
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model
from llama2_chat.reward.scoring import load_reward
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.distil import PrepromptedPrompt, distil, fits
from llama2_chat.safety.metrics import selection_metrics
from llama2_chat.safety.preprompt import draw_preprompt
from llama2_chat.settings import RunSettings
from llama2_chat.sft.made_data import fine_tune
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer


def run_stage(
    config: ContextDistillationConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write `samples.jsonl`, `dataset.jsonl` (the kept answers) and `model/`, the policy fine-tuned on them.

    Where no answer is better than the policy's own, `model/` is the policy as it was.

    Returns:
        Metrics of the selection and of the fine-tuning.
    """
    prompts = list(chain.from_iterable(read_prompts(Path(file)) for file in config.prompts))
    used = [prompt for prompt in prompts if prompt.is_safety or not config.only_adversarial]
    if not used:
        raise UserInputError(
            f"{', '.join(config.prompts)}: none of {len(prompts)} prompts is tagged is_safety: true; "
            "only such prompts are distilled, so tag them or name other files"
        )
    _sample(used, config, settings, directory)
    rows = [row for _, row in read_rows(directory.samples)]
    passed_over = {"passed_over": len(prompts) - len(used), "too_long": len(used) - len(rows)}
    selection = {**passed_over, **_select(rows, directory)}
    card = model_card("context_distillation", config, settings)
    if selection["kept"] == 0:
        _keep_policy(config, settings, directory, card)
        return {"selection": selection}
    trained = fine_tune(
        config.policy,
        settings,
        directory,
        training=config.training,
        loss_policy="last_answer",
        sft_dialogues=config.sft_dialogues,
        sft_fraction=config.sft_fraction,
        card=card,
    )
    return {"selection": selection, **trained}


def _sample(
    prompts: Sequence[Prompt],
    config: ContextDistillationConfig,
    settings: RunSettings,
    directory: StageDirectory,
) -> None:
    if directory.samples.exists():
        return
    rng = Random(settings.seed)
    items = [PrepromptedPrompt(prompt, draw_preprompt(prompt, config, rng)) for prompt in prompts]
    engine, chat_format = load_engine(config.policy, settings)
    check_takes_system(chat_format, "the preprompt")
    safety = load_reward(config.safety, slot="safety", device=settings.device)
    longest = config.sampling.max_new_tokens
    short = [item for item in items if fits(item, engine, chat_format, safety, max_new_tokens=longest)]
    if not short:
        raise UserInputError(
            f"{', '.join(config.prompts)}: each of {len(items)} prompts is too long: with its preprompt it leaves no "
            f"room for an answer of {longest} tokens in the context of the policy or of the reward model; shorten "
            "the prompts or lower sampling.max_new_tokens"
        )
    if len(short) < len(items):
        directory.warn(f"{len(items) - len(short)} of {len(items)} prompts are too long and are passed over")
    write_samples(
        directory.samples,
        short,
        lambda chunk: distil(chunk, engine, chat_format, safety, config, settings.seed),
        description=f"{directory.path.name}: sampling",
        unit="prompts",
    )


def _select(rows: Sequence[Row], directory: StageDirectory) -> dict[str, Any]:
    """Write the kept answers as dialogues, without the preprompt."""
    status = Counter(row["status"] for row in rows)
    if not status["complete"]:
        raise UserInputError(
            f"none of the answers to {len(rows)} prompts under the preprompt is complete ({dict(status)}); "
            "raise sampling.max_new_tokens or lower sampling.temperature"
        )
    write_rows(
        directory.dataset,
        (
            {
                "messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}],
                "is_safety": row["is_safety"],
                "source": f"context_distillation:{row['source'] or 'not named'}",
            }
            for row in rows
            if row["kept"]
        ),
    )
    return selection_metrics(rows) | {"status": dict(sorted(status.items()))}


def _keep_policy(
    config: ContextDistillationConfig, settings: RunSettings, directory: StageDirectory, card: str
) -> None:
    """A policy that the preprompt cannot improve is a good result, not a failure: it goes on unchanged."""
    path = config.policy
    directory.warn("no answer under the preprompt is safer than the policy's own: the model is unchanged")
    gguf_file = settings.gguf_file_of(path)
    tokenizer = load_tokenizer(path, gguf_file)
    build_chat_format(settings.chat_format, tokenizer)  # the tokenizer is saved with its template
    model = load_policy(path, settings, gguf_file=gguf_file)
    adapter = directory.adapter_alone(config.training.lora)
    if adapter is not None:  # one that changes nothing, in place of a copy of all weights
        merged(with_adapter(model, config.training.lora, settings.seed), adapter)
    save_model(model, tokenizer, directory.model, settings=settings, card=card, adapter=adapter)
    directory.metrics_file.touch()
