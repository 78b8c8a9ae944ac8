"""Tokens on disk: nothing is lost where documents are cut, and memory holds no text and no tokens."""

from __future__ import annotations

import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest

from llama2_chat.jsonl import read_rows, write_rows
from llama2_chat.packing import pack
from llama2_chat.pretrain import text as text_module
from llama2_chat.pretrain.config import PretrainConfig
from llama2_chat.pretrain.token_store import Source, TokenStore, count_pieces, write_token_store
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.pretrain.train import learn_and_tokenize
from llama2_chat.tokenizers import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def tokenizer(texts) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(train_tokenizer(texts, 600))


def store_of(folder: Path, tokenizer: HuggingFaceTokenizer, *files: list[str]) -> TokenStore:
    paths = []
    for number, documents in enumerate(files):
        paths.append(folder / f"{number}.jsonl")
        write_rows(paths[-1], [{"text": document} for document in documents])
    write_token_store(folder / "store", paths, tokenizer, "test")
    return TokenStore(folder / "store")


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path: Path, texts, tokenizer) -> None:
    documents = [" ".join(texts[:3]), texts[3], " ".join(texts[4:6])]
    store = store_of(tmp_path, tokenizer, documents)
    expected = [[1, *tokenizer.encode(document), 2] for document in documents]
    assert store.lengths.tolist() == [len(ids) for ids in expected]
    pieces = store.pieces(np.array([2, 0, 0, 1]), 16)
    assert all(all(piece.loss_mask) and len(piece.loss_mask) == len(piece.input_ids) for piece in pieces)
    found = iter(pieces)
    for number in (2, 0, 0, 1):
        ids: list[int] = []
        for _ in range(-(-len(expected[number]) // 16)):
            piece = next(found).input_ids
            assert len(piece) == min(16, len(expected[number]) - len(ids))
            ids += piece
        assert ids == expected[number]
    assert next(found, None) is None
    assert pieces[-1] == pieces[len(pieces) - 1] == list(pieces)[-1]
    with pytest.raises(IndexError):
        pieces[len(pieces)]


def test_pieces_by_hand() -> None:
    assert count_pieces(np.array([1, 15, 16, 17, 32, 33]), 16).tolist() == [1, 1, 1, 2, 2, 3]


def test_sources_are_counted_one_by_one(tmp_path: Path, texts, tokenizer) -> None:
    store = store_of(tmp_path, tokenizer, [texts[0], "", texts[1]], [" ", texts[2]])
    sizes = [len(tokenizer.encode(document)) + 2 for document in texts[:3]]
    assert store.sources == [
        Source("0.jsonl", 2, 1, sizes[0] + sizes[1]),
        Source("1.jsonl", 1, 1, sizes[2]),
    ]
    assert [lengths.tolist() for lengths in store.lengths_by_source()] == [sizes[:2], sizes[2:]]


def test_the_tokenizer_comes_back_as_it_was(tmp_path: Path, texts, tokenizer) -> None:
    tokenizer.save(tmp_path / "before")
    store_of(tmp_path, tokenizer, texts[:3]).tokenizer.save(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_few_documents_are_in_memory_at_a_time(
    tmp_path: Path, texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Text(str):
        """Unlike `str` it can be watched."""

    alive: weakref.WeakValueDictionary[int, Text] = weakref.WeakValueDictionary()
    most = read = 0

    def rows(file: Path):
        nonlocal most, read
        for number in range(4000):
            alive[read] = text = Text(texts[number % len(texts)])
            read += 1
            most = max(most, len(alive))
            yield number + 1, {"text": text}
            del text

    monkeypatch.setattr(text_module, "read_rows", rows)
    config = PretrainConfig(text=str(tmp_path / "text.jsonl"), vocabulary_size=600)
    learn_and_tokenize(config, tmp_path / "store", "test")
    assert read == 8000  # once for the tokenizer, once for the tokens
    assert most <= 260  # the tokenizers package takes 256 at a time


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path, texts, tokenizer) -> None:
    """A million tokens, in lists 16 bytes each and more: they are written, packed and read in a few kilobytes."""
    write_rows(tmp_path / "text.jsonl", ({"text": " ".join(texts[:100])} for _ in range(100)))
    tracemalloc.start()
    try:
        write_token_store(tmp_path / "store", [tmp_path / "text.jsonl"], tokenizer, "test")
        store = TokenStore(tmp_path / "store")
        rows = pack(store.pieces(np.arange(100), 512), 512)
        read = sum(len(row.input_ids) for row in rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == store.lengths.sum() > 500_000
    assert peak < 2_000_000


def test_real_text_is_packed_without_waste(tmp_path: Path, data_folder: Path) -> None:
    """Rows of 512 tokens over HH-RLHF's dialogues as plain text, most of them cut into pieces."""
    dialogues = [row["chosen"] for _, row in read_rows(data_folder / "hh-rlhf" / "helpful-base.jsonl.gz")]
    assert len(dialogues) > 1500
    tokenizer = HuggingFaceTokenizer(train_tokenizer(dialogues, 2000))
    store = store_of(tmp_path, tokenizer, dialogues)
    rows = pack(store.pieces(np.arange(len(dialogues)), 512), 512)
    tokens = int(store.lengths.sum())
    assert len(rows) >= -(-tokens // 512)  # no packing can do with fewer
    assert tokens / (len(rows) * 512) > 0.99
