"""The `pretrain` stage: text in, a base model with its own tokenizer out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2_chat.errors import DataFormatError
from llama2_chat.jsonl import read_rows
from llama2_chat.model_card import model_card
from llama2_chat.models import save_model, select_device, use_fitting_threads
from llama2_chat.pretrain.config import PretrainConfig
from llama2_chat.pretrain.model import new_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.settings import RunSettings
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import TokenizedDialogue
from llama2_chat.tokenizers import ChatTokenizer, HuggingFaceTokenizer


def run_stage(config: PretrainConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Learn a tokenizer and a model from `config.text` and write both into `model/`.

    Every token is trained (loss policy `all_tokens`). Documents are packed into rows, isolated from each
    other; a document longer than a row is cut into pieces.
    """
    texts = list(read_texts(Path(config.text)))
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, config.vocabulary_size))
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
    metrics = train_sequences(
        model,
        list(to_sequences(texts, tokenizer, config.training.sequence_length)),
        training=config.training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: pretraining",
    )
    card = model_card("pretrain", config, settings)
    save_model(model, tokenizer, directory.model, settings=settings, card=card)
    return {"documents": len(texts), "parameters": model.num_parameters(), **metrics}


def read_texts(file: Path) -> Iterator[str]:
    """The documents of a JSONL file, `{"text": "…"}` a line."""
    for number, row in read_rows(file):
        text = row.get("text")
        if not isinstance(text, str):
            raise DataFormatError(file, number, f'"text" must be a text; found {text!r}')
        yield text


def to_sequences(texts: list[str], tokenizer: ChatTokenizer, length: int) -> Iterator[TokenizedDialogue]:
    """Each document between BOS and EOS, in pieces of at most `length` tokens, all trained."""
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            yield TokenizedDialogue(piece, [True] * len(piece))
