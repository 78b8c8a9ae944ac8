"""Loading, saving and refusing tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Message
from llama2_chat.errors import MissingFileError, UserInputError
from llama2_chat.tokenizers import (
    LLAMA2_TEMPLATE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)

WORDS = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "a": 4, "b": 5}


def words(**special: str) -> HuggingFaceTokenizer:
    """A tokenizer of two words, with the special tokens that are named."""
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    # Split at every character, so that "</s>" in a text is no word of the vocabulary.
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, **special), name="words")


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Once upon a time there was a llama."] * 9),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.mark.parametrize(
    ("special", "padding_id"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, 2),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, 3),
        ({"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, 3),
        ({"eos_token": "</s>"}, 0),
        ({"eos_token": "<s>"}, 1),
    ],
)
def test_padding_is_never_eos(special: dict[str, str], padding_id: int) -> None:
    tokenizer = words(**special)
    assert tokenizer.padding_id == padding_id != tokenizer.eos_id
    assert tokenizer.vocab_size == 6


def test_what_a_tokenizer_must_have() -> None:
    with pytest.raises(UserInputError, match="words: the tokenizer has no EOS token"):
        words(bos_token="<s>")
    without_bos = words(eos_token="</s>")
    with pytest.raises(UserInputError, match=r"words: .* no BOS token.*choose chat_format: tokenizer"):
        build_chat_format("llama2", without_bos)


def test_a_tokenizer_that_reads_control_ids_out_of_text_is_refused() -> None:
    # Unigram takes "</s>" for the likeliest piece wherever it stands; no option turns that off.
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁as<>/")]
    raw = Tokenizer(models.Unigram(pieces, 0, False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert 2 in tokenizer.encode("a</s>", add_special_tokens=False, split_special_tokens=True)
    with pytest.raises(UserInputError, match=r"unigram: .*text could forge control ids"):
        HuggingFaceTokenizer(tokenizer, name="unigram")


def test_a_prompt_that_the_tokenizer_merges_with_the_answer_is_refused() -> None:
    # One merge that reaches from "]" over the space after it.
    alphabet = sorted({*"[INST] u/a", "<", ">", "s"})
    vocabulary = {piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet, "] "])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("]", " ")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    chat_format = build_chat_format("llama2", HuggingFaceTokenizer(tokenizer))
    messages = [Message("user", "u"), Message("assistant", "a")]
    assert chat_format.prompt_ids(messages[:1])[0] == 0
    with pytest.raises(UserInputError, match=r"merges the end of the prompt '\[INST\] u \[/INST\]' with"):
        chat_format.segments(messages)


@pytest.mark.parametrize("path", ["none", "/none/such", "./none", "../none", "some/deep/folder", "~/none"])
def test_no_folder(path: str) -> None:
    with pytest.raises(MissingFileError) as error:
        load_tokenizer(path)
    assert str(error.value) == f"{path}: no such model folder"
    assert error.value.exit_code == 2


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json or tokenizer\.model in this folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(MissingFileError, match=r"model\.gguf: no such file; check gguf_file"):
        load_tokenizer(tmp_path, "model.gguf")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tokenizer.json", "transformers cannot load this tokenizer"),
        ("tokenizer.model", "not a SentencePiece model"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserInputError, match=problem):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.hf is None
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.padding_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 290
    ids = [1, *tokenizer.encode("</s> a llama"), 2, 1, *tokenizer.encode("time"), 999]
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == "</s> a llama time"
    assert tokenizer.decode(ids, keep_control=True) == "<s></s> a llama</s><s>time"
    with pytest.raises(UserInputError, match="no chat template of its own"):
        build_chat_format("tokenizer", tokenizer)


def test_sentencepiece_models_without_control_pieces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path, bos_id=-1, pad_id=5))
    assert tokenizer.padding_id == 5
    with pytest.raises(UserInputError, match=r"tokenizer\.model: the tokenizer has no BOS piece"):
        build_chat_format("llama2", tokenizer)
    with pytest.raises(UserInputError, match=r"tokenizer\.model: the tokenizer has no EOS piece"):
        load_tokenizer(sentencepiece_model(tmp_path, eos_id=-1))


def test_a_sentencepiece_folder_is_saved_even_if_the_first_is_gone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "old"))
    model = (tmp_path / "old" / "tokenizer.model").read_bytes()
    build_chat_format("llama2", tokenizer)
    shutil.rmtree(tmp_path / "old")
    tokenizer.save(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == model
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == LLAMA2_TEMPLATE
    assert isinstance(load_tokenizer(tmp_path / "new"), SentencePieceTokenizer)


def test_stories260k(data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "stories260K")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.padding_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 512
    # From the model's README.
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    ids = [1, *tokenizer.encode("x </s><s>"), 2]
    assert ids.count(1) == ids.count(2) == 1
    assert tokenizer.decode(ids) == "x </s><s>"
    assert tokenizer.decode(ids, keep_control=True) == "<s> x </s><s></s>"


def test_transformers_renders_a_saved_model_to_the_same_ids(data_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "stories260K")
    chat_format = build_chat_format("llama2", tokenizer)
    tokenizer.save(tmp_path)
    messages = [
        Message("system", " Be kind. "),
        Message("user", " Once upon "),
        Message("assistant", " a time\n"),
        Message("user", ""),
        Message("assistant", ""),
    ]
    segments = chat_format.segments(messages)
    rendered = AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(
        [message.to_row() for message in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered["input_ids"] == [token for segment in segments for token in segment.ids]
    assert rendered["assistant_masks"] == [int(segment.trained) for segment in segments for _ in segment.ids]
    # Its own chat format is then the Llama 2 format too.
    assert build_chat_format("tokenizer", load_tokenizer(tmp_path)).segments(messages) == segments


def test_the_chat_format_decides_which_template_is_saved(data_folder: Path, tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m['role'] ~ ':' ~ m['content'] ~ eos_token }}{% endfor %}"
    folder = tmp_path / "base"
    shutil.copytree(data_folder / "stories260K", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
    for name, template in (("llama2", LLAMA2_TEMPLATE), ("tokenizer", own)):
        tokenizer = load_tokenizer(folder)
        build_chat_format(name, tokenizer)  # type: ignore[arg-type]
        tokenizer.save(tmp_path / name)
        assert AutoTokenizer.from_pretrained(str(tmp_path / name)).chat_template == template
        # The tokenizer itself is as it was.
        assert tokenizer.hf.chat_template == own
