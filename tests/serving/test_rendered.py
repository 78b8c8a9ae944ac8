"""Rendered text gives the ids that rendering its messages gives, in both chat formats."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_server import CHATML

from llama2_chat import RewardScorer
from llama2_chat.chat_format import ChatFormat, Llama2ChatFormat, build_chat_format
from llama2_chat.dialogue import CHAT_TAGS, Message
from llama2_chat.errors import UserInputError
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.serving.rendered import RenderedText
from llama2_chat.tokenizers import load_tokenizer

contents = (
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
            st.text("ab [](/)<>SY.\n\t ", max_size=12),
            st.sampled_from(
                ["</s>", "<s>", "<unk>", "</s><s>", "<0x0A>", "\u2581", "  ", "\n\n", "Once upon", "é🦙漢"]
            ),
        ),
        max_size=4,
    )
    .map("".join)
    .filter(lambda text: not any(tag in text for tag in CHAT_TAGS))
)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    turns = draw(st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for user, answer in turns:
        messages += [Message("user", user), Message("assistant", answer)]
    return messages


def ids_of(chat_format: ChatFormat, messages: list[Message]) -> list[int]:
    return [token for segment in chat_format.segments(messages) for token in segment.ids]


@pytest.fixture(scope="module")
def stories(data_folder: Path) -> Llama2ChatFormat:
    return Llama2ChatFormat(load_tokenizer(data_folder / "stories260K"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Llama2ChatFormat:
    """A tokenizer.model alone, as Meta releases it; its decoding writes no space after <s>."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] a llama in the barn [/INST] ate 12 apples. "] * 9),
        model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Llama2ChatFormat(load_tokenizer(folder))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=dialogues())
def test_decoded_ids_come_back(
    messages: list[Message], stories: Llama2ChatFormat, pieces: Llama2ChatFormat
) -> None:
    """As a trainer decodes them, control pieces kept, with both kinds of tokenizer."""
    for chat_format in (stories, pieces):
        ids = ids_of(chat_format, messages)
        text = chat_format.tokenizer.decode(ids, keep_control=True)
        assert RenderedText(chat_format).encode(text) == ids


def test_ids_that_no_text_gives_do_not_come_back(stories: Llama2ChatFormat) -> None:
    """A policy may spell a word with other pieces than the tokenizer: "the" as "t", "he"; docs/serving.md says so."""
    tokenizer = stories.tokenizer
    ids = ids_of(stories, [Message("user", "a"), Message("assistant", "the")])
    (place,) = [place for place, token in enumerate(ids) if tokenizer.decode([token]) == "the"]
    sampled = [*ids[:place], *tokenizer.hf.convert_tokens_to_ids(["▁t", "he"]), *ids[place + 1 :]]
    text = tokenizer.decode(sampled, keep_control=True)
    assert text == tokenizer.decode(ids, keep_control=True)
    assert RenderedText(stories).encode(text) == ids != sampled


@pytest.mark.parametrize(
    "written",
    [
        "<s>[INST] Hi. [/INST] Yes. </s>",
        "<s> [INST] Hi. [/INST] Yes. </s>",
        "[INST] Hi. [/INST] Yes. </s>",
        "<s>[INST] Hi. [/INST] Yes. ",
        "</s></s><s>[INST] Hi. [/INST] Yes. </s></s></s>",
        "<unk><unk><s>[INST] Hi. [/INST] Yes. </s><unk>",
        "<s>[INST] Hi. [/INST] Yes. </s>\n",
    ],
)
def test_one_beginning_one_end_and_no_padding(stories: Llama2ChatFormat, written: str) -> None:
    ids = ids_of(stories, [Message("user", "Hi."), Message("assistant", "Yes.")])
    assert RenderedText(stories).encode(written) == ids


@pytest.mark.parametrize("text", ["", "Hi.", "<s>", "</s>", "<s>Hi. [INST]", " [INST] Hi. [/INST] Yes."])
def test_text_that_is_not_rendered_is_refused(stories: Llama2ChatFormat, text: str) -> None:
    with pytest.raises(UserInputError, match=r"not in this model's chat format \(llama2\)"):
        RenderedText(stories).encode(text)


def test_filling_without_end_takes_no_time(stories: Llama2ChatFormat) -> None:
    """Half a megabyte of pieces that might have been padding: once through, not once for each piece."""
    read = RenderedText(stories)
    with pytest.raises(UserInputError):
        read.encode("</s>" * 50_000 + "x" + "</s> " * 50_000)


@pytest.fixture(scope="module")
def chatml(models: Path) -> RewardModel:
    return RewardModel.from_pretrained(models / "chatml", device="cpu")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=dialogues())
def test_a_tokenizers_own_template(messages: list[Message], chatml: RewardModel) -> None:
    """What its template writes, and what decoding its ids writes, both give its ids."""
    read = RenderedText(chatml.chat_format)
    tokenizer = chatml.chat_format.tokenizer  # type: ignore[attr-defined]
    ids = ids_of(chatml.chat_format, messages)
    # The template writes control pieces of this tokenizer only where it means them.
    plain = not any(p in m.content for m in messages for p in ("<s>", "</s>", "<unk>", "<|im"))
    if plain:
        assert read.encode(tokenizer.decode(ids, keep_control=True)) == ids
        rows = [message.to_row() for message in messages]
        assert tokenizer.hf.chat_template == CHATML
        rendered = tokenizer.hf.apply_chat_template(rows, tokenize=False)
        assert read.encode(rendered) == ids


def test_a_cut_off_answer_in_a_tokenizers_own_template_gets_its_end(chatml: RewardModel) -> None:
    read = RenderedText(chatml.chat_format)
    whole = read.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n")
    assert read.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.") == whole
    assert whole.count(chatml.chat_format.stop_id) == 2
    with pytest.raises(UserInputError, match="none of the control pieces"):
        read.encode("Hi. Yes.")


def test_both_formats_have_readers(models: Path, offline: RewardScorer) -> None:
    tokenizer = load_tokenizer(models / "chatml")
    for name in ("llama2", "tokenizer"):
        assert RenderedText(build_chat_format(name, tokenizer)) is not None  # type: ignore[arg-type]
