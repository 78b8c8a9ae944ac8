"""Trains a tokenizer like Llama's: BPE, numbers split into digits, unknown characters as UTF-8 bytes.

Source: §2.2. It follows SentencePiece's conventions: a space is written ▁ and belongs to the word after it,
one is put before the text, and ids 0, 1, 2 are <unk>, <s>, </s>. Every text comes back exactly, except that
▁ itself comes back as a space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llama2_chat.errors import UserInputError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_SPACE = "▁"
_CHAT_TAG_SHARE = 4
"""One line of chat tags per this many documents: pretraining text has none, yet each should be one piece."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary_size` pieces, a function of `texts` alone.

    Raises:
        UserInputError: the text is too small for so many pieces.
    """
    merged = _bare_tokenizer(models.BPE(unk_token=UNKNOWN))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(_BYTES), special_tokens=[UNKNOWN, BEGIN, END], show_progress=False
    )
    merged.train_from_iterator(_with_chat_tags(texts), trainer)
    model = json.loads(merged.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    pieces = [UNKNOWN, BEGIN, END, *_BYTES, *(p for p in learnt if p not in (UNKNOWN, BEGIN, END))]
    if len(pieces) != vocabulary_size:
        raise UserInputError(
            f"vocabulary_size: the text yields {len(pieces)} pieces, not {vocabulary_size}; "
            f"give more text or set vocabulary_size to {len(pieces)}"
        )
    return _finished({piece: index for index, piece in enumerate(pieces)}, model["merges"])


def _with_chat_tags(texts: Iterable[str]) -> Iterable[str]:
    for index, text in enumerate(texts):
        yield text
        if index % _CHAT_TAG_SHARE == 0:
            yield "[INST] [/INST] <<SYS>>\n<</SYS>>\n\n"


def _finished(vocabulary: dict[str, int], merges: list[list[str]]) -> PreTrainedTokenizerFast:
    pairs = [(left, right) for left, right in merges]
    tokenizer = _bare_tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([UNKNOWN, BEGIN, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, vocabulary[BEGIN])],
    )
    return _wrapped(tokenizer)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that `train_tokenizer` made, from its `tokenizer.json`; it saves the same bytes."""
    return _wrapped(Tokenizer.from_file(str(file)))


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def _bare_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPACE, "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[.,:;!?\"\n]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
