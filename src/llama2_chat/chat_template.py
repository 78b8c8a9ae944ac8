"""A tokenizer's own chat template, rendered so that a message's text can never become a control id.

A template writes its control pieces (`<|im_end|>`) as text, which the tokenizer then reads as ids. The same
characters in a message must stay characters. So they are escaped before rendering, and encoded as plain
text afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llama2_chat.dialogue import Message, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.tokenizers import control_pieces

_ESCAPE = "\ufdd0"
"""A noncharacter (Unicode sets it aside for a program's own use); doubled where a message holds it."""

_FIRST_CODE = 0x100000
"""Control piece number n is written as `_ESCAPE` and this code point + n, from a private-use plane."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Start and end of an answer, in characters of the rendered text."""


class ChatTemplate:
    """Renders dialogues with the template of a transformers tokenizer and encodes what it rendered.

    Rendered text is in escaped form; `encode` is its only reader.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Use the (default) template of the transformers tokenizer `tokenizer`."""
        if tokenizer is None or not tokenizer.chat_template:
            raise UserInputError(
                "chat_format: the tokenizer has no chat template of its own; choose chat_format: llama2"
            )
        self._tokenizer = tokenizer
        self.source = self._default_source()
        self._ids = control_pieces(tokenizer)
        self.control_ids = frozenset(self._ids.values())
        self._controls = sorted(self._ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, self._controls)))
        self._escaped_pattern = re.compile("|".join(map(re.escape, (*self._controls, _ESCAPE))))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The dialogue as escaped text."""
        return self._render(messages, add_generation_prompt, mark_answers=False)[0]

    def render_with_answers(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The dialogue as escaped text and where each assistant message's answer lies in it.

        A dialogue that ends with the user gets the generation prompt. Answers are what the template marks
        with `{% generation %}`; without such marks, what an assistant message adds to the rendered text.

        Raises:
            UserInputError: the template refuses the dialogue, or answers cannot be told from its output.
        """
        to_be_answered = messages[-1].role == "user"
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if _GENERATION_MARKER.search(self.source):
            text, spans = self._render(messages, to_be_answered, mark_answers=True)
            if len(spans) != len(answers):
                raise UserInputError(
                    f"chat_format: the tokenizer's template marks {len(spans)} answers in a dialogue that has "
                    f"{len(answers)}; mend its {{% generation %}} marks or choose chat_format: llama2"
                )
            return text, spans
        text = self.render(messages, add_generation_prompt=to_be_answered)
        return text, [self._added_by(messages, place, text) for place in answers]

    def encode(self, text: str) -> list[int]:
        """Ids of escaped text: control ids where the template wrote them, plain text elsewhere."""
        if _ESCAPE not in text:
            return self._encode(text, split_special_tokens=False)
        ids: list[int] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode(self._unescape(text[start : match.start()]), split_special_tokens=True)
            ids.append(self._ids[match[0]])
            start = match.end()
        return ids + self._encode(self._unescape(text[start:]), split_special_tokens=True)

    def _added_by(self, messages: Sequence[Message], place: int, text: str) -> Span:
        prompt = self.render(messages[:place], add_generation_prompt=True)
        answered = self.render(messages[: place + 1])
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise UserInputError(
                "chat_format: the tokenizer's template changes earlier text when a message is added, so answers "
                "cannot be found in its output; mark them in the template with {% generation %} or choose "
                "chat_format: llama2"
            )
        return len(prompt), len(answered)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, *, mark_answers: bool
    ) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        rows = messages_to_rows(messages)
        for row in rows:
            row["content"] = self._escape(row["content"])
        render: Any = render_jinja_template  # its annotation says str, it returns two lists
        try:
            texts, spans = render(
                conversations=[rows],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=mark_answers,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise UserInputError(
                f"chat_format: the tokenizer's template refuses a dialogue: {error}"
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if mark_answers else []

    def _default_source(self) -> str:
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise UserInputError(f"chat_format: {error}") from error

    def _encode(self, text: str, *, split_special_tokens: bool) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        return ids

    def _escape(self, text: str) -> str:
        def escaped(match: re.Match[str]) -> str:
            piece = match[0]
            code = _ESCAPE if piece == _ESCAPE else chr(_FIRST_CODE + self._controls.index(piece))
            return _ESCAPE + code

        return self._escaped_pattern.sub(escaped, text)

    def _unescape(self, text: str) -> str:
        def plain(match: re.Match[str]) -> str:
            return _ESCAPE if match[1] == _ESCAPE else self._controls[ord(match[1]) - _FIRST_CODE]

        return re.sub(f"{_ESCAPE}(.)", plain, text, flags=re.DOTALL)
