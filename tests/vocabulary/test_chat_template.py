"""The tokenizer's own chat template: answers found, control pieces in a text kept as text."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama2_chat.chat_format import TokenizerChatFormat, build_chat_format, check_takes_system
from llama2_chat.dialogue import CHAT_TAGS, Message
from llama2_chat.errors import UserInputError
from llama2_chat.generation.answers import to_answer
from llama2_chat.generation.engine import Response
from llama2_chat.tokenization import tokenize_dialogue
from llama2_chat.tokenizers import HuggingFaceTokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The number of messages stands at the front, so each one more changes what came before.
UNSTABLE = "{{ messages | length }}" + CHATML
ENDLESS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
)

START, END, EOS = 256, 257, 258
CONTROLS = {"<|im_start|>": START, "<|im_end|>": END, "<|endoftext|>": EOS}


def make_tokenizer(template: str | None, merges: Sequence[tuple[str, str]] = ()) -> HuggingFaceTokenizer:
    """One id a byte, with three control ids: ids can be written down as text. Merges get the ids above."""
    vocabulary = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {left + right: EOS + 1 + number for number, (left, right) in enumerate(merges)}
    vocabulary |= CONTROLS
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(CONTROLS))
    assert {piece: raw.token_to_id(piece) for piece in CONTROLS} == CONTROLS
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return HuggingFaceTokenizer(tokenizer)


@pytest.fixture(scope="module")
def written() -> Callable[[list[int]], str]:
    """Ids as text, control ids in angle quotes: what is text and what is control can be told apart."""
    raw = make_tokenizer(None)
    marks = {START: "‹", END: "›", EOS: "¶"}

    def write(ids: list[int]) -> str:
        parts, run = [], []
        for number in [*ids, -1]:
            if number in marks or number == -1:
                parts += [raw.decode(run), marks.get(number, "")]
                run = []
            else:
                run.append(number)
        return "".join(parts)

    return write


DIALOGUE = (
    Message("system", "Be kind."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
    Message("assistant", "See you"),
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_mask_covers_answers_and_not_the_line_break_after_them(
    template: str, written: Callable[[list[int]], str]
) -> None:
    """Segments, the prompt and the mask of the last answer against text written by hand."""
    chat_format = build_chat_format("tokenizer", make_tokenizer(template))
    assert chat_format.stop_id == END
    found = [(written(segment.ids), segment.trained) for segment in chat_format.segments(DIALOGUE)]
    assert found == [
        ("‹system\nBe kind.›\n‹user\nHi›\n‹assistant\n", False),
        ("Hello›", True),
        ("\n‹user\nBye›\n‹assistant\n", False),
        ("See you›", True),
    ]
    prompt = chat_format.prompt_ids(DIALOGUE[:-1])
    assert written(prompt) == "‹system\nBe kind.›\n‹user\nHi›\n‹assistant\nHello›\n‹user\nBye›\n‹assistant\n"
    # What is sampled from is what the answer was trained after.
    whole = tokenize_dialogue(DIALOGUE, chat_format, "last_answer")
    assert whole.input_ids[: len(prompt)] == prompt
    assert whole.loss_mask == [False] * len(prompt) + [True] * len("See you›")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_ids_are_those_of_transformers(template: str) -> None:
    tokenizer = make_tokenizer(template)
    chat_format = TokenizerChatFormat(tokenizer)
    rows = [message.to_row() for message in DIALOGUE]
    expected = tokenizer.hf.apply_chat_template(rows, tokenize=True, return_dict=False)
    ids = [number for segment in chat_format.segments(DIALOGUE) for number in segment.ids]
    line_break = tokenizer.encode("\n")
    assert ids + line_break == expected  # left out at the end of a dialogue
    prompt = tokenizer.hf.apply_chat_template(
        rows[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert chat_format.prompt_ids(DIALOGUE[:-1]) == prompt


def byte_ids(text: str) -> list[int]:
    """Ids of printable ASCII, spaces and line breaks, from the order of the byte-level alphabet alone.

    Printable bytes stand first, from "!" on; the others follow 188 printable ones in their own order, so that a line
    break (byte 10) is 198 and a space (byte 32) is 220.
    """
    return [{"\n": 198, " ": 220}.get(character, ord(character) - ord("!")) for character in text]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_golden_ids_and_masks_of_chatml(template: str) -> None:
    """Ids and the masks of all three policies against numbers written by hand, with and without generation marks."""
    chat_format = TokenizerChatFormat(make_tokenizer(template))
    messages = (
        Message("system", "Ok"),
        Message("user", "Hi"),
        Message("assistant", "Yo"),
        Message("user", "A b"),
        Message("assistant", "No"),
    )
    # system = 82 88 82 83 68 76, user = 84 82 68 81, assistant = 64 82 82 72 82 83 64 77 83, line break = 198
    first_prompt = [
        *(256, 82, 88, 82, 83, 68, 76, 198, 46, 74, 257, 198),
        *(256, 84, 82, 68, 81, 198, 39, 72, 257, 198),
        *(256, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198),
    ]
    first_answer = [56, 78, 257]
    second_prompt = [
        *(198, 256, 84, 82, 68, 81, 198, 32, 220, 65, 257, 198),
        *(256, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198),
    ]
    second_answer = [45, 78, 257]
    assert byte_ids("A b\n") == [32, 220, 65, 198]
    ids = first_prompt + first_answer + second_prompt + second_answer
    masks = {
        "all_answers": [0] * 33 + [1] * 3 + [0] * 23 + [1] * 3,
        "last_answer": [0] * 33 + [0] * 3 + [0] * 23 + [1] * 3,
        "all_tokens": [1] * 62,
    }
    for policy, mask in masks.items():
        tokenized = tokenize_dialogue(messages, chat_format, policy)  # type: ignore[arg-type]
        assert tokenized.input_ids == ids
        assert [int(trained) for trained in tokenized.loss_mask] == mask


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_golden_mask_where_contents_hold_control_pieces(template: str) -> None:
    """Ids and mask against numbers written by hand: in a content `<|im_end|>` is ten characters, not the id 257."""
    chat_format = TokenizerChatFormat(make_tokenizer(template))
    messages = (Message("user", "a<|im_end|>"), Message("assistant", "<|im_end|>b"))
    piece = [27, 91, 72, 76, 62, 68, 77, 67, 91, 29]
    assert piece == byte_ids("<|im_end|>")
    prompt = [
        *(256, 84, 82, 68, 81, 198, 64, *piece, 257, 198),
        *(256, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198),
    ]
    tokenized = tokenize_dialogue(messages, chat_format, "all_answers")
    assert tokenized.input_ids == [*prompt, *piece, 65, 257]
    assert tokenized.loss_mask == [False] * 30 + [True] * 12


texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.sampled_from([*CONTROLS, "\ufdd0", "\U00100001", "\n", "\ufdd0\ufdd0<|im_end|>"]),
    ),
    max_size=4,
).map("".join)
inputs = texts.filter(lambda text: not any(tag in text for tag in CHAT_TAGS))


@settings(max_examples=200, deadline=None)
@given(system=inputs, user=inputs, answer=texts)
def test_no_text_can_forge_a_control_id(
    system: str, user: str, answer: str, written: Callable[[list[int]], str]
) -> None:
    chat_format = FORMATS["chatml"]
    messages = (Message("system", system), Message("user", user), Message("assistant", answer))
    prompt, trained = chat_format.segments(messages)
    controls = [number for number in prompt.ids if number >= START]
    assert controls == [START, END, START, END, START]
    assert [number for number in trained.ids if number >= START] == [END]
    assert written(prompt.ids) == f"‹system\n{system}›\n‹user\n{user}›\n‹assistant\n"
    assert written(trained.ids) == f"{answer}›"
    assert chat_format.decode_response(trained.ids) == answer.strip()


FORMATS = {"chatml": TokenizerChatFormat(make_tokenizer(CHATML))}


def test_a_response_ends_at_the_stop_token() -> None:
    chat_format = FORMATS["chatml"]
    encode = chat_format.tokenizer.encode
    assert chat_format.decode_response([*encode(" Hello \n"), END, *encode("\nmore")]) == "Hello"


def test_a_control_token_in_a_response_ends_it() -> None:
    """Without text of its own it would vanish, and the turn that it begins would be part of the answer."""
    chat_format = FORMATS["chatml"]
    encode = chat_format.tokenizer.encode
    ids = [*encode("Hello"), START, *encode("user\nmore"), END]
    answer = to_answer(Response(ids, [0.0] * len(ids), "stop"), chat_format)
    assert (answer.text, answer.status) == ("Hello", "chat_tag")
    ids = [*encode("Hello"), END]
    assert to_answer(Response(ids, [0.0] * len(ids), "stop"), chat_format).status == "complete"


def test_a_template_that_rewrites_earlier_text() -> None:
    with pytest.raises(UserInputError, match="changes earlier text when a message is added"):
        TokenizerChatFormat(make_tokenizer(UNSTABLE))


def test_mask_by_marks_in_such_a_template(written: Callable[[list[int]], str]) -> None:
    """Segments of a template with marks against text written by hand."""
    chat_format = TokenizerChatFormat(make_tokenizer("{{ messages | length }}" + MARKED))
    found = [(written(segment.ids), segment.trained) for segment in chat_format.segments(DIALOGUE[1:3])]
    assert found == [("2‹user\nHi›\n‹assistant\n", False), ("Hello›", True)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template of its own; choose chat_format: llama2"),
        (ENDLESS, "writes no control token after an answer"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        TokenizerChatFormat(make_tokenizer(template))


@pytest.mark.parametrize("after", ["", "{{ '\\n' }}"])
def test_mask_takes_in_an_end_of_turn_just_outside_the_mark(
    after: str, written: Callable[[list[int]], str]
) -> None:
    """Segments against text written by hand: the end token is trained, the line break after it is not."""
    outside = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}" + after + "{% endfor %}"
    )
    chat_format = TokenizerChatFormat(make_tokenizer(outside))
    line_break = "\n" if after else ""
    assert chat_format.stop_id == END
    assert [(written(segment.ids), segment.trained) for segment in chat_format.segments(DIALOGUE)] == [
        (f"‹system\nBe kind.›{line_break}‹user\nHi›{line_break}‹assistant\n", False),
        ("Hello›", True),
        (f"{line_break}‹user\nBye›{line_break}‹assistant\n", False),
        ("See you›", True),
    ]


def test_marks_that_do_not_fit_the_dialogue() -> None:
    last_only = MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
    chat_format = TokenizerChatFormat(make_tokenizer(last_only))
    assert len(chat_format.segments(DIALOGUE[1:3])) == 2
    with pytest.raises(UserInputError, match="marks 1 answers in a dialogue that has 2"):
        chat_format.segments(DIALOGUE)


def test_an_answer_that_is_not_ended_everywhere() -> None:
    end = "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    assert end in MARKED
    short_only = MARKED.replace(
        end,
        "{{ message['content'] + ('<|im_end|>' if message['content'] | length < 5 else '') }}{% endgeneration %}",
    )
    chat_format = TokenizerChatFormat(make_tokenizer(short_only))
    assert len(chat_format.segments((Message("user", "Hi"), Message("assistant", "Hell")))) == 2
    with pytest.raises(UserInputError, match="does not end an answer with token 257 as it does elsewhere"):
        chat_format.segments((Message("user", "Hi"), Message("assistant", "Hello")))


def test_mask_starts_with_the_answer_where_the_tokenizer_would_merge_across_it() -> None:
    """Prompt and answer ids against those of the two texts encoded apart."""
    # "\n\n" is one token: of the prompt's line break and the answer's, taken together.
    tokenizer = make_tokenizer(CHATML, merges=[("Ċ", "Ċ")])
    chat_format = TokenizerChatFormat(tokenizer)
    assert len(tokenizer.encode("\n\n")) == 1
    messages = (Message("user", "Hi"), Message("assistant", "\nHello"), Message("user", "\n\n"))
    prompt, answer, _ = chat_format.segments(messages)
    assert prompt.ids == chat_format.prompt_ids(messages[:1])
    assert answer.ids == [*tokenizer.encode("\nHello"), END]
    assert tokenizer.decode(chat_format.prompt_ids(messages), keep_control=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\nHello<|im_end|>\n"
        "<|im_start|>user\n\n\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_refuses_a_dialogue() -> None:
    chat_format = TokenizerChatFormat(make_tokenizer(REFUSING))
    assert chat_format.segments(DIALOGUE[1:])
    with pytest.raises(UserInputError, match="the tokenizer's template refuses a dialogue: no system here"):
        chat_format.segments(DIALOGUE)


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    chat_format = TokenizerChatFormat(tokenizer)
    tokenizer.save(tmp_path)
    again = TokenizerChatFormat(load_tokenizer(tmp_path))
    assert again.segments(DIALOGUE) == chat_format.segments(DIALOGUE)
    assert string.printable == tokenizer.decode(tokenizer.encode(string.printable))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            REFUSING,
            "the preprompt stands in the system message; .*no system here.*choose chat_format: llama2",
        ),
        (
            CHATML.replace(
                "{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'", 1
            ).replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>\n' }}{% endif %}", 1),
            "the preprompt stands in the system message, which the tokenizer's template leaves out",
        ),
    ],
)
def test_a_template_without_system_messages_is_refused_where_one_is_needed(
    template: str, problem: str
) -> None:
    chat_format = TokenizerChatFormat(make_tokenizer(template))
    assert chat_format.prompt_ids([Message("user", "Hi")])
    with pytest.raises(UserInputError, match=problem):
        check_takes_system(chat_format, "the preprompt")


@pytest.mark.parametrize("name", ["llama2", "tokenizer"])
def test_a_template_with_system_messages_is_taken(name: Any) -> None:
    folder = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
    check_takes_system(build_chat_format(name, load_tokenizer(folder)), "the preprompt")
