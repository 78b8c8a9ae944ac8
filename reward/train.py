"""The `reward` stage: preference pairs in, reward model out."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

from datasets import Dataset

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.lora import merged, with_adapter
from llama2_chat.model_card import model_card
from llama2_chat.models import reward_model_from_policy, save_model, seed_everything
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.data import PairReport, collate_pairs, read_pairs, tokens_of, training_columns
from llama2_chat.reward.held_out import held_out_metrics
from llama2_chat.reward.mixing import Mix, mix
from llama2_chat.reward.pooling import pool_at_ends, row_layout, unpool
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.reward.trainer import MarginRewardTrainer, reward_arguments
from llama2_chat.settings import RunSettings
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer
from llama2_chat.training import keep_to_device, placeholder_tokenizer, run_trainer


def run_stage(config: RewardConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Train a reward model from `config.model` on `config.preferences` and write `model/`.

    A share of `config.other_preferences` joins them (`mixing.py`).

    Returns:
        Metrics of the training, with what was drawn of each file (`pairs_by_file`) and, where `held_out` is given, of
        the held-out pairs.
    """
    gguf_file = settings.gguf_file_of(config.model)
    tokenizer = load_tokenizer(config.model, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    mixture = _mixture(config, settings, directory, chat_format)
    pairs = list(chain.from_iterable(file.pairs for file in mixture.files))
    tokens = list(chain.from_iterable(file.tokens for file in mixture.files))
    report = sum((file.source.report for file in mixture.files), PairReport())
    if pairs and all(pair.rating is None for pair in pairs) and config.margin != "none":
        directory.warn("no pair has a rating: every margin is 0")
    columns = training_columns(pairs, tokens, margin_table=config.margin)
    model = reward_model_from_policy(config.model, settings, gguf_file=gguf_file)
    model.config.pad_token_id = tokenizer.padding_id
    arguments = reward_arguments(config.training, settings, directory.checkpoints, len(pairs))
    seed_everything(settings.seed)
    layout = row_layout(model)
    if not layout.share:
        directory.warn(
            f"the attention of {type(model).__name__} cannot share a prompt between its two answers: every prompt is "
            "computed twice"
        )
    pool_at_ends(model)
    trained_model = with_adapter(model, config.training.lora, settings.seed)
    trainer = MarginRewardTrainer(
        model=trained_model,
        args=keep_to_device(arguments, settings),
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda batch: collate_pairs(batch, tokenizer.padding_id, layout),
        processing_class=placeholder_tokenizer(tokenizer.padding_id),
        safety_weight=config.safety_weight,
        centering=config.centering,
    )
    started = time.perf_counter()
    metrics = run_trainer(trainer, directory, f"{directory.path.name}: reward", report_to=settings.report_to)
    directory.events.write("training_rate", pairs=len(pairs), seconds=time.perf_counter() - started)
    unpool(model)
    merged(trained_model, directory.adapter)
    save_model(
        model,
        tokenizer,
        directory.model,
        settings=settings,
        card=model_card("reward", config, settings),
        adapter=directory.adapter_alone(config.training.lora),
    )
    scorer = RewardModel(model, chat_format, padding_id=tokenizer.padding_id, name=directory.path.name)
    held_out = {}
    if config.held_out:
        held_out = held_out_metrics(
            scorer,
            config.held_out,
            domain=config.domain,
            directory=directory,
            training=[file.source for file in mixture.files],
        )
    return {
        "domain": config.domain,
        "pairs": {**report.to_row(), "drawn": mixture.size},
        "pairs_by_file": [file.to_row(mixture.size) for file in mixture.files],
        **mixture.to_row(),
        "tokens": tokens_of(tokens, layout),
        **metrics,
        **held_out,
    }


def _mixture(
    config: RewardConfig, settings: RunSettings, directory: StageDirectory, chat_format: ChatFormat
) -> Mix:
    """The training set; what was dropped, or could not be drawn, is said."""
    length = config.training.sequence_length
    own = read_pairs(config.preferences, chat_format, length)
    others = read_pairs(config.other_preferences, chat_format, length)
    for file in (*own, *others):
        file.announce(directory)
    mixture = mix(own, others, share=config.share_of_others, seed=settings.seed)
    if (message := mixture.shortfall()) is not None:
        directory.warn(message)
    return mixture
