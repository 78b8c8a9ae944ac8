"""The tokenizer: exact round trips, digits one by one, bytes for what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama2_chat.errors import UserInputError
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.testbed.generators import GENERATORS

TEXTS = [row["text"] for row in GENERATORS["pretraining_text"](rows=3000, seed=0)]
TOKENIZER = train_tokenizer(TEXTS, 768)


def encode(text: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def pieces(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(encode(text))


def test_ids_are_laid_out_as_llamas() -> None:
    assert len(TOKENIZER) == 768
    assert TOKENIZER.convert_ids_to_tokens(list(range(4))) == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert TOKENIZER.convert_ids_to_tokens([258]) == ["<0xFF>"]
    assert (TOKENIZER.unk_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert TOKENIZER.pad_token_id is None


@pytest.mark.parametrize(
    "text", ["12", "a 12 b", "27 plus 8 is 35.", " 5", "x1y22z", "", " ", "  two  spaces  ", "\n\na\n", "\t"]
)
def test_round_trips(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(text: str) -> None:
    ids = encode(text)
    assert TOKENIZER.decode(ids) == text
    assert 0 not in ids  # bytes stand for what is unknown


@pytest.mark.parametrize("text", [row["text"] for row in GENERATORS["pretraining_text"](rows=200, seed=1)])
def test_testbed_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


def test_numbers_are_split_into_digits() -> None:
    assert pieces("1024 2048") == ["▁", "1", "0", "2", "4", "▁", "2", "0", "4", "8"]
    merged = [piece for piece in TOKENIZER.get_vocab() if sum(c.isdigit() for c in piece) > 1]
    assert [piece for piece in merged if not piece.startswith("<0x")] == []


def test_unknown_characters_become_utf8_bytes() -> None:
    assert pieces("日")[1:] == ["<0xE6>", "<0x97>", "<0xA5>"]  # U+65E5 in UTF-8


def test_chat_tags_are_single_pieces_and_no_text_crosses_a_space() -> None:
    assert pieces("[INST] a [/INST]")[0] == "▁[INST]"
    assert pieces("[INST] a [/INST]")[-1] == "▁[/INST]"
    assert all("▁" not in piece[1:] for piece in TOKENIZER.get_vocab())


def test_control_pieces_in_text_are_text() -> None:
    ids = encode("<s> a </s> <unk> <0x41>")
    assert not {0, 1, 2} & set(ids)
    assert TOKENIZER.decode(ids) == "<s> a </s> <unk> <0x41>"


def test_the_prompt_is_a_prefix_of_the_turn() -> None:
    prompt = encode("[INST] What is 27 plus 8? [/INST]")
    assert encode("[INST] What is 27 plus 8? [/INST] 27 plus 8 is 35. ")[: len(prompt)] == prompt


def test_it_is_a_function_of_the_text(tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, 768)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    again.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:50]:
        assert encode(text, loaded) == encode(text)
    assert loaded("a").input_ids == [1, *encode("a")]  # like Llama's, it puts <s> first when asked to


def test_too_little_text_is_the_users_mistake() -> None:
    with pytest.raises(UserInputError, match=r"vocabulary_size: the text yields \d+ pieces, not 5000"):
        train_tokenizer(["one two three"], 5000)
