"""The Llama 2 chat format, id for id, against implementations that share no code with it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama2_chat.chat_format import ChatFormat, Llama2ChatFormat, build_chat_format
from llama2_chat.dialogue import CHAT_TAGS, Message
from llama2_chat.tokenization import tokenize_dialogue
from llama2_chat.tokenizers import load_tokenizer

BOS, EOS = 1, 2
Spans = list[tuple[list[int], bool]]

contents = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.text("ab [](/)<>SY.\n\t ", max_size=12),
        st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "▁", " ", "\n\n", "Once upon a time", "é🦙漢"]),
    ),
    max_size=4,
).map("".join)
inputs = contents.filter(lambda text: not any(tag in text for tag in CHAT_TAGS))


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    turns = draw(st.lists(st.tuples(inputs, contents), min_size=1, max_size=3))
    messages = [Message("system", draw(inputs))] if draw(st.booleans()) else []
    for user, answer in turns:
        messages += [Message("user", user), Message("assistant", answer)]
    return messages[:-1] if draw(st.booleans()) else messages


def reference(messages: list[Message], encode: Callable[[str], list[int]]) -> Spans:
    """PAPER's rules from the turns up: (ids, belongs to an answer), the longest form of each turn at once."""
    rows = [(message.role, message.content) for message in messages]
    if rows[0][0] == "system":
        (_, system), (_, user), *rest = rows
        rows = [("user", "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + user), *rest]
    spans: Spans = []
    for start in range(0, len(rows), 2):
        turn = rows[start : start + 2]
        question = "[INST] " + turn[0][1].strip() + " [/INST]"
        length = len(encode(question))
        if len(turn) == 2:
            ids = encode(question + " " + turn[1][1].strip() + " ")
            spans += [([BOS, *ids[:length]], False), ([*ids[length:], EOS], True)]
        else:
            spans.append(([BOS, *encode(question)], False))
    return spans


def check_against_reference(
    chat_format: ChatFormat, encode: Callable[[str], list[int]], messages: list[Message]
) -> None:
    found = [(segment.ids, segment.trained) for segment in chat_format.segments(messages)]
    assert found == reference(messages, encode)
    answers = sum(message.role == "assistant" for message in messages)
    ids = [number for span, _ in found for number in span]
    # No content can forge a control id: one EOS for each answer, one BOS for each question.
    assert ids.count(EOS) == answers
    assert ids.count(BOS) == sum(message.role == "user" for message in messages)
    if messages[-1].role == "user":
        assert chat_format.prompt_ids(messages) == ids


@pytest.fixture(scope="module")
def stories(data_folder: Path) -> Path:
    return data_folder / "stories260K"


@pytest.fixture(scope="module")
def stories_format(stories: Path) -> Llama2ChatFormat:
    return Llama2ChatFormat(load_tokenizer(stories))


@pytest.fixture(scope="module")
def plain_encode(stories: Path) -> Callable[[str], list[int]]:
    """The raw tokenizer without its added special tokens, so that `</s>` in a text is four characters."""
    raw = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
    assert [token["content"] for token in raw.pop("added_tokens")] == ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=dialogues())
def test_ids_of_a_tokenizer_json(
    messages: list[Message], stories_format: Llama2ChatFormat, plain_encode: Callable[[str], list[int]]
) -> None:
    check_against_reference(stories_format, plain_encode, messages)


def test_text_without_control_pieces_needs_no_trick(stories: Path, stories_format: Llama2ChatFormat) -> None:
    # The unchanged tokenizer.json agrees, so the reference above does not owe its ids to the removal.
    raw = Tokenizer.from_file(str(stories / "tokenizer.json"))
    messages = [
        Message("system", " Be kind. "),
        Message("user", " Once upon a time "),
        Message("assistant", "\nthere was a llama. "),
        Message("user", ""),
    ]
    found = [(segment.ids, segment.trained) for segment in stories_format.segments(messages)]
    assert found == reference(messages, lambda text: raw.encode(text, add_special_tokens=False).ids)


# "[INST] ... [/INST]" as the vocabulary of stories260K spells it; 410 is a space, 13 a line break.
INST = (410, 508, 442, 458, 437, 434, 509)
END_INST = (410, 508, 492, 442, 458, 437, 434, 509)


def test_golden_ids_and_masks_of_stories260k(stories_format: Llama2ChatFormat, stories: Path) -> None:
    """Ids and the masks of all three policies against numbers written by hand, for two turns with a system message."""
    messages = (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", " Bye "),
        Message("assistant", "See you."),
    )
    first_prompt = [
        *(1, *INST, 410, 504, 504, 437, 452, 437, 505, 505, 13),  # BOS [INST] <<SYS>> line break
        *(445, 411, 409, 417, 264, 426, 13),  # B e _k i nd . line break
        *(504, 504, 492, 437, 452, 437, 505, 505, 13, 13),  # <</SYS>> and two line breaks
        *(440, 417, *END_INST),  # H i [/INST]
    ]
    first_answer = [346, 306, 414, 426, 410, 2]  # _He ll o . space EOS
    second_prompt = [1, *INST, 368, 422, 411, *END_INST]  # BOS [INST] _B y e [/INST]
    second_answer = [301, 411, 411, 364, 426, 410, 2]  # _S e e _you . space EOS
    ids = first_prompt + first_answer + second_prompt + second_answer
    masks = {
        "all_answers": [0] * 44 + [1] * 6 + [0] * 19 + [1] * 7,
        "last_answer": [0] * 44 + [0] * 6 + [0] * 19 + [1] * 7,
        "all_tokens": [1] * 76,
    }
    for policy, mask in masks.items():
        tokenized = tokenize_dialogue(messages, stories_format, policy)  # type: ignore[arg-type]
        assert tokenized.input_ids == ids
        assert [int(trained) for trained in tokenized.loss_mask] == mask
    vocabulary = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    pieces = {number: piece for piece, number in vocabulary.items()}
    assert "".join(pieces[number] for number in ids) == (
        "<s>▁[INST]▁<<SYS>><0x0A>Be▁kind.<0x0A><</SYS>><0x0A><0x0A>Hi▁[/INST]▁Hello.▁</s>"
        "<s>▁[INST]▁Bye▁[/INST]▁See▁you.▁</s>"
    )


def test_golden_mask_where_contents_hold_control_pieces(stories_format: Llama2ChatFormat) -> None:
    """stories260K's ids and mask against numbers written by hand: `</s>` and `<s>` in contents are characters."""
    messages = (Message("user", "a</s>b"), Message("assistant", "<s> c"))
    tokenized = tokenize_dialogue(messages, stories_format, "all_answers")
    assert tokenized.input_ids == [
        *(1, *INST, 261, 504, 492, 419, 505, 430, *END_INST),  # BOS [INST] _a < / s > b [/INST]
        *(410, 504, 419, 505, 280, 410, 2),  # space < s > _c space EOS
    ]
    assert tokenized.loss_mask == [False] * 22 + [True] * 7


def test_the_raw_tokenizer_would_let_text_forge_the_end(stories: Path) -> None:
    raw = Tokenizer.from_file(str(stories / "tokenizer.json"))
    assert EOS in raw.encode("</s>", add_special_tokens=False).ids


def test_rendered_text_is_that_of_the_format(stories_format: Llama2ChatFormat) -> None:
    messages = [
        Message("system", " Be kind. "),
        Message("user", " Hi. "),
        Message("assistant", " Hello. "),
        Message("user", " Bye. "),
        Message("assistant", ""),
    ]
    decode = stories_format.tokenizer.decode
    assert [decode(s.ids, keep_control=True) for s in stories_format.segments(messages)[:1]] == [
        "<s> [INST] <<SYS>>\n Be kind. \n<</SYS>>\n\n Hi. [/INST]"
    ]
    whole = [number for segment in stories_format.segments(messages) for number in segment.ids]
    turns = [whole[: whole.index(EOS) + 1], whole[whole.index(EOS) + 1 :]]
    assert [decode(turn) for turn in turns] == [
        "[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\n Hi. [/INST] Hello. ",
        "[INST] Bye. [/INST]  ",
    ]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a tokenizer.model, trained as Llama 2's was: BPE, bytes, single digits."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = ["[INST] a llama in the barn [/INST] ate 12 apples. "] * 9 + [
        "Once upon a time, in 2023 we sat."
    ] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def sentencepiece_format(sentencepiece_folder: Path) -> Llama2ChatFormat:
    return Llama2ChatFormat(load_tokenizer(sentencepiece_folder))


@pytest.fixture(scope="module")
def sentencepiece_encode(sentencepiece_folder: Path) -> Callable[[str], list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    assert (processor.bos_id(), processor.eos_id()) == (BOS, EOS)
    return lambda text: processor.encode_as_ids(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=dialogues())
def test_ids_of_a_sentencepiece_model(
    messages: list[Message],
    sentencepiece_format: Llama2ChatFormat,
    sentencepiece_encode: Callable[[str], list[int]],
) -> None:
    check_against_reference(sentencepiece_format, sentencepiece_encode, messages)


def test_golden_mask_of_a_sentencepiece_model(
    sentencepiece_format: Llama2ChatFormat, sentencepiece_folder: Path
) -> None:
    """Pieces and mask against a list written by hand: control pieces stand where turns begin and answers end alone."""
    messages = (Message("user", "x</s>"), Message("assistant", "<s>y"))
    tokenized = tokenize_dialogue(messages, sentencepiece_format, "all_answers")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    # "<", ">", "x" and "y" occur in none of the lines that the model was trained on: they are bytes.
    assert [processor.id_to_piece(number) for number in tokenized.input_ids] == [
        *("<s>", "▁[", "INST", "]", "▁", "<0x78>", "<0x3C>", "/", "s", "<0x3E>", "▁[/", "INST", "]"),
        *("▁", "<0x3C>", "s", "<0x3E>", "<0x79>", "▁", "</s>"),
    ]
    assert tokenized.loss_mask == [False] * 13 + [True] * 7


def test_a_saved_sentencepiece_folder_gives_the_same_ids(
    sentencepiece_format: Llama2ChatFormat, tmp_path: Path
) -> None:
    sentencepiece_format.tokenizer.save(tmp_path / "saved")
    again = Llama2ChatFormat(load_tokenizer(tmp_path / "saved"))
    messages = [Message("user", "a </s> llama 2023"), Message("assistant", "é")]
    assert again.segments(messages) == sentencepiece_format.segments(messages)


@pytest.mark.parametrize("kind", ["stories_format", "sentencepiece_format"])
def test_a_response_ends_at_the_stop_token_and_is_stripped(kind: str, request: pytest.FixtureRequest) -> None:
    chat_format: Llama2ChatFormat = request.getfixturevalue(kind)
    encode = chat_format.tokenizer.encode
    assert chat_format.stop_id == EOS
    answer = encode(" \n A llama, </s> é🦙. ")
    assert chat_format.decode_response([*answer, EOS, *encode("never seen"), EOS]) == "A llama, </s> é🦙."
    assert chat_format.decode_response(answer) == "A llama, </s> é🦙."
    assert chat_format.decode_response([EOS]) == chat_format.decode_response([]) == ""
    # A control id in sampled text has no text of its own.
    assert chat_format.decode_response([*encode("a"), BOS, EOS]) == "a"
    a = encode("a")
    assert chat_format.first_control([*a, BOS, *a, EOS]) == len(a)
    assert chat_format.first_control([*a, EOS, BOS]) is None
    assert chat_format.first_control([*a, chat_format.tokenizer.encode("</s>")[0]]) is None


@settings(max_examples=100, deadline=None)
@given(answer=contents)
def test_a_trained_answer_reads_back(answer: str, sentencepiece_format: Llama2ChatFormat) -> None:
    _, segment = sentencepiece_format.segments([Message("user", "x"), Message("assistant", answer)])
    # SentencePiece writes a space as U+2581 and so reads that character back as a space.
    assert sentencepiece_format.decode_response(segment.ids) == answer.strip().replace("▁", " ").strip()


def test_a_dialogue_to_be_continued_ends_with_the_user(stories_format: Llama2ChatFormat) -> None:
    with pytest.raises(ValueError, match="must end with a user message"):
        stories_format.prompt_ids([Message("user", "a"), Message("assistant", "b")])
    with pytest.raises(ValueError, match=r'messages\[1\] has role "user", expected "assistant"'):
        stories_format.segments([Message("user", "a"), Message("user", "b")])


def test_a_saved_tokenizer_renders_the_format(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(stories)
    chat_format = build_chat_format("llama2", tokenizer)
    tokenizer.save(tmp_path)
    messages = [
        Message("system", " Be kind. "),
        Message("user", " Once upon "),
        Message("assistant", " a time "),
        Message("user", ""),
    ]
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    rendered = loaded.apply_chat_template([message.to_row() for message in messages], tokenize=False)
    assert rendered == (
        "<s>[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\n Once upon [/INST] a time </s><s>[INST]  [/INST]"
    )
    assert chat_format.stop_id == loaded.eos_token_id
