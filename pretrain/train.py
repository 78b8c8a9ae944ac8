"""The `pretrain` stage: text in, a base model with its own tokenizer out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llama2_chat.distributed import is_main_process, wait_for_everyone
from llama2_chat.model_card import model_card
from llama2_chat.models import save_model, select_device, use_fitting_threads
from llama2_chat.pretrain.config import PretrainConfig
from llama2_chat.pretrain.mixture import draw_rounds, passes_over_rows, planned_tokens, source_records
from llama2_chat.pretrain.model import new_model
from llama2_chat.pretrain.text import TextCounts, read_documents, watched
from llama2_chat.pretrain.token_store import Integers, TokenStore, count_pieces, write_token_store
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.settings import RunSettings
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import HuggingFaceTokenizer


def run_stage(config: PretrainConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Learn a tokenizer and a model from `config.text` and write both into `model/`.

    Every token is trained (loss policy `all_tokens`). Documents are packed into rows, isolated from each
    other; a document longer than a row is cut into pieces. Of several processes the first reads the text.

    Returns:
        Metrics of the run, with `sources` (what each gave), `empty` (texts that were skipped) and `fill`, the share
        of the rows' places that hold a token.
    """
    tokens_folder = directory.checkpoints / "text"
    if is_main_process() and not tokens_folder.exists():
        learn_and_tokenize(config, tokens_folder, directory.path.name)
    wait_for_everyone()
    store = TokenStore(tokens_folder)
    tokenizer = store.tokenizer
    model = new_model(
        config.architecture,
        vocabulary_size=config.vocabulary_size,
        begin_id=tokenizer.bos_id,
        end_id=tokenizer.eos_id,
        seed=settings.seed,
    )
    device = select_device(settings.device)
    use_fitting_threads(model, device)
    model.to(device)  # type: ignore[arg-type]
    length, training = config.training.sequence_length, config.training
    rounds = _rounds(store, config, settings.seed)
    if config.proportions is not None:
        training = training.model_copy(update={"epochs": 1.0})  # the rounds are all of the run
    documents = np.concatenate(rounds)
    metrics = train_sequences(
        model,
        store.pieces(documents, length),
        training=training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: pretraining",
        parts=[int(count_pieces(store.lengths[members], length).sum()) for members in rounds],
    )
    card = model_card("pretrain", config, settings)
    save_model(model, tokenizer, directory.model, settings=settings, card=card)
    passes = passes_over_rows(metrics["rows"], metrics["steps"], training.batch_size)
    return {
        "documents": len(store.lengths),
        "empty": sum(source.empty for source in store.sources),
        "sources": source_records(store.sources, _tokens_by_source(store, documents), passes),
        "parameters": model.num_parameters(),
        "fill": metrics["tokens"] / (metrics["rows"] * length),
        **metrics,
    }


def learn_and_tokenize(config: PretrainConfig, folder: Path, description: str) -> None:
    """Learn the tokenizer from every document of every source, then write tokenizer and tokens into `folder`."""
    files = [Path(file) for file in config.sources]
    texts = chain.from_iterable(read_documents(file, TextCounts()) for file in files)
    watched_texts = watched(texts, f"{description}: tokenizer")
    tokenizer = HuggingFaceTokenizer(train_tokenizer(watched_texts, config.vocabulary_size))
    write_token_store(folder, files, tokenizer, description)


def _rounds(store: TokenStore, config: PretrainConfig, seed: int) -> list[Integers]:
    """Every document once or, with proportions, as often as the whole run is to see it."""
    if config.proportions is None:
        return [np.arange(len(store.lengths))]
    tokens = planned_tokens(int(store.lengths.sum()), config.training)
    return draw_rounds(store.lengths_by_source(), config.proportions, tokens, seed)


def _tokens_by_source(store: TokenStore, documents: Integers) -> list[int]:
    ends = np.cumsum([source.documents for source in store.sources])
    owners = np.searchsorted(ends, documents, side="right")
    tokens = np.bincount(owners, weights=store.lengths[documents], minlength=len(ends))
    return [int(count) for count in tokens]
