"""Text that a chat format has rendered, or that a trainer decoded from token ids, back to those ids.

In the Llama 2 format control pieces count where that format writes them: BOS at the beginning, EOS at the end, and
EOS BOS before the next turn's `[INST]`. Anywhere else `<s>` and `</s>` are the text that they are. With another
template nothing tells where it may write its control pieces, so all of them count.

Decoding with a SentencePiece-like tokenizer puts a space behind each control piece, which encoding adds again; it is
taken away. The text's BOS is the only one. A stop token is added where the text lacks it (an answer that was cut off),
since reward models read the score there; padding at either end is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llama2_chat.chat_format import ChatFormat, Llama2ChatFormat, TokenizerChatFormat
from llama2_chat.dialogue import Message, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.tokenizers import ChatTokenizer, control_pieces

_TURN, _ANSWER = "[INST]", "[/INST]"


class RenderedText:
    """Reads the rendered text of one chat format."""

    def __init__(self, chat_format: ChatFormat) -> None:
        assert isinstance(chat_format, Llama2ChatFormat | TokenizerChatFormat)
        self._tokenizer: ChatTokenizer = chat_format.tokenizer
        self._stop_id = chat_format.stop_id
        stop, eos, padding = (
            self._tokenizer.decode([number], keep_control=True)
            for number in (self._stop_id, self._tokenizer.eos_id, self._tokenizer.padding_id)
        )
        self._filling = {stop, eos, padding} - {""}
        self._llama2 = isinstance(chat_format, Llama2ChatFormat)
        if isinstance(chat_format, Llama2ChatFormat):
            self._bos_id = chat_format.bos_id
            bos = self._tokenizer.decode([self._bos_id], keep_control=True)
            self._bos = re.compile(rf"{re.escape(bos)}\s?(?={re.escape(_TURN)})")
            self._boundary = re.compile(rf"{re.escape(eos)}\s?{self._bos.pattern}")
        else:
            bos = self._tokenizer.hf.bos_token or ""
            self._learn_template(chat_format)
        self._leading = self._filling - {bos}

    def _learn_template(self, chat_format: TokenizerChatFormat) -> None:
        """How many spaces follow a control piece, as the template writes it and as decoding does."""
        pieces = "|".join(map(re.escape, sorted(control_pieces(self._tokenizer.hf), key=len, reverse=True)))
        self._control = re.compile(pieces)
        self._gap = re.compile(rf"(?:{pieces})(?!{pieces})( *)(?=[^ ])")
        self._extra_space = re.compile(rf"({pieces}) (?!{pieces}|$)")
        sample = (Message("user", "a"), Message("assistant", "b"))
        ids = [token for segment in chat_format.segments(sample) for token in segment.ids]
        written = self._tokenizer.hf.apply_chat_template(messages_to_rows(sample), tokenize=False)
        decoded = self._gap_of(self._tokenizer.decode(ids, keep_control=True))
        self._decoded_gap = decoded if decoded > self._gap_of(written) else None

    def _gap_of(self, text: str) -> int:
        found = self._gap.search(text)
        return len(found[1]) if found else 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered dialogue, ending in the stop token.

        Raises:
            UserInputError: the text is not in this chat format.
        """
        text = text[_after(text, self._leading) :]
        text = text[: _end_before(text, self._filling, spaced=not self._llama2)]
        return self._encode_llama2(text) if self._llama2 else self._encode_with_template(text)

    def _encode_llama2(self, text: str) -> list[int]:
        start = self._bos.match(text)
        text = text[start.end() :] if start else text
        if not text.startswith(_TURN):
            raise UserInputError(
                "not in this model's chat format (llama2), which begins with <s>[INST]; send rendered text, or "
                "messages to /v1/score"
            )
        ids: list[int] = []
        for turn in self._boundary.split(text):
            if _ANSWER not in turn:
                raise UserInputError(f"a turn has no answer: {_ANSWER} is not in it")
            ids += [self._bos_id, *self._tokenizer.encode(turn), self._stop_id]
        return ids

    def _encode_with_template(self, text: str) -> list[int]:
        if not self._control.search(text):
            raise UserInputError(
                "not in this model's chat format: none of the control pieces of its tokenizer's template is in it; "
                "send rendered text, or messages to /v1/score"
            )
        if self._decoded_gap is not None and self._gap_of(text) >= self._decoded_gap:
            text = self._extra_space.sub(r"\1", text)
        ids = self._tokenizer.hf.encode(
            text, add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return [*ids, self._stop_id]


def _after(text: str, pieces: Iterable[str]) -> int:
    """Where the text goes on after `pieces` at its beginning."""
    start = 0
    while piece := next((piece for piece in pieces if text.startswith(piece, start)), ""):
        start += len(piece)
    return start


def _end_before(text: str, pieces: Iterable[str], *, spaced: bool) -> int:
    """Where the text ends before `pieces` at its end; `spaced` if there may be whitespace between them.

    What a template writes after the last of them is whitespace at most. The Llama 2 format puts a space before EOS, so
    there a piece before whitespace is the answer's own text.
    """
    end = before = len(text)
    while True:
        if spaced or end == len(text):
            while before and text[before - 1].isspace():
                before -= 1
        piece = next((piece for piece in pieces if text.endswith(piece, 0, before)), "")
        if not piece:
            return end
        end = before = before - len(piece)
