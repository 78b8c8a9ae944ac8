"""Scores from a server that speaks `POST /v1/score`, over the standard library's HTTP client."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Headers
from time import sleep
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from llama2_chat.dialogue import Message, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.reward.custom import Slot, checked_scores
from llama2_chat.settings import UrlSource

_BUSY = (429, 502, 503, 504)
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 60.0
_LARGEST_ANSWER = 64 * 2**20
_LOCAL = ("localhost", "127.0.0.1", "::1")


class _PassingError(Exception):
    """What may go well another time; `wait` is how long the server asks to wait, in seconds."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Dialogues, and the key, go to the host that the recipe names and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        return None


class RemoteReward:
    """A server's scores, of the kind that the slot wants; equal dialogues are sent once."""

    def __init__(self, source: UrlSource, *, slot: Slot) -> None:
        self.source = source
        self.slot = slot
        self.name = source.url
        self._address = source.url.rstrip("/") + "/v1/score"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if source.api_key_env is not None:
            key = os.environ.get(source.api_key_env, "").strip()
            if not key:
                raise UserInputError(
                    f"{self.name}: the environment variable {source.api_key_env} (api_key_env) is not set"
                )
            if not (key.isascii() and key.isprintable()):
                raise UserInputError(
                    f"{self.name}: the key in {source.api_key_env} (api_key_env) holds characters that a header cannot "
                    "carry; printable ASCII is wanted"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        local = urlsplit(source.url).hostname in _LOCAL
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if local:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy has another localhost
        self._opener = urllib.request.build_opener(*handlers)

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores, float32 (B,), of dialogues that end with the assistant.

        Raises:
            UserInputError: the server refuses, stays away through all retries, or answers with anything but a finite
                score for each dialogue.
        """
        distinct: dict[tuple[Message, ...], int] = {}
        places = [distinct.setdefault(tuple(messages), len(distinct)) for messages in dialogues]
        rows = list(distinct)
        size = self.source.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        if not batches:
            return torch.zeros(0)
        with ThreadPoolExecutor(min(self.source.parallel_requests, len(batches))) as pool:
            return torch.cat(list(pool.map(self._score_batch, batches)))[places]

    def _score_batch(self, dialogues: Sequence[tuple[Message, ...]]) -> Tensor:
        body = json.dumps(
            {"dialogues": [{"messages": messages_to_rows(d), "is_safety": False} for d in dialogues]}
        ).encode()
        for attempt in range(self.source.retries + 1):
            try:
                return checked_scores(self._read(self._send(body), len(dialogues)), dialogues, self.name)
            except _PassingError as error:
                if attempt == self.source.retries:
                    tried = f"{attempt + 1} times" if attempt else "once"
                    raise UserInputError(
                        f"{self.name}: {error}; tried {tried}. Is the server up? `timeout_seconds` and `retries` "
                        "say how long it is waited for"
                    ) from None
                wait = _FIRST_WAIT_SECONDS * 2**attempt if error.wait is None else error.wait
                sleep(min(wait, _LONGEST_WAIT_SECONDS))
        raise AssertionError("unreachable")

    def _send(self, body: bytes) -> bytes:
        """What the server answers, at once; what may pass is a `_PassingError`."""
        request = urllib.request.Request(self._address, data=body, headers=self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.source.timeout_seconds) as response:
                answer: bytes = response.read(_LARGEST_ANSWER)
                if len(answer) == _LARGEST_ANSWER:
                    raise UserInputError(f"{self.name}: the answer is longer than {_LARGEST_ANSWER:,} bytes")
                # http.client says nothing where the rest of what was announced does not come.
                if response.length:
                    raise _PassingError(f"the answer broke off {response.length:,} bytes before its end")
                return answer
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except TimeoutError:
            raise _PassingError(f"no answer within {self.source.timeout_seconds:g} seconds") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _PassingError(f"no answer within {self.source.timeout_seconds:g} seconds") from None
            if isinstance(reason, ssl.SSLError):
                raise UserInputError(f"{self.name}: no safe connection: {reason}") from None
            raise _PassingError(f"no connection: {reason or type(reason).__name__}") from None
        raise AssertionError("unreachable")

    def _refused(self, error: urllib.error.HTTPError) -> None:
        if error.code in _BUSY:
            asked = error.headers.get("Retry-After", "")
            raise _PassingError(
                f"HTTP {error.code} {error.reason}",
                float(asked) if asked.isascii() and asked.isdigit() else None,
            )
        if 300 <= error.code < 400:
            target = error.headers.get("Location", "nowhere")
            raise UserInputError(
                f"{self.name}: redirects to {target}; redirects are not followed, name that address"
            )
        try:
            said = error.read(500).decode("utf-8", errors="replace").strip()
        except (OSError, http.client.HTTPException):
            said = ""
        hint = "; name the variable that holds the key in api_key_env" if error.code in (401, 403) else ""
        raise UserInputError(
            f"{self.name}: HTTP {error.code} {error.reason}: {said or 'no more is said'}{hint}"
        )

    def _read(self, answer: bytes, wanted: int) -> list[Any]:
        """The raw score of each dialogue, as the answer has it."""
        try:
            scores = json.loads(answer)["scores"]
            found = [score[self.slot] for score in scores]
        except (ValueError, KeyError, TypeError, RecursionError):
            shown = answer[:200].decode("utf-8", errors="replace")
            raise UserInputError(
                f'{self.name}: the answer is not {{"scores": [{{"{self.slot}": …}}, …]}}, found {shown}'
            ) from None
        if len(found) == wanted and self.slot == "safety" and None in found:
            raise UserInputError(f"{self.name}: gives no safety score (null); it has no safety reward model")
        return found
