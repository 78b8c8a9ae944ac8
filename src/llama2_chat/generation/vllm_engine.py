"""Sampling with vLLM, as a server in an environment of its own. Token ids in, token ids out.

What a response depends on is what `GenerationEngine` says, by vLLM's own means: each sample has a seed, made of the
run's seed, its prompt and its number. Its random numbers are not those of `TransformersEngine`, so the two give
different samples of one distribution.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llama2_chat import interruption
from llama2_chat.errors import SamplingServerError, UserInputError
from llama2_chat.generation.engine import Response
from llama2_chat.generation.vllm_server import VllmServer
from llama2_chat.settings import SamplingConfig, VllmConfig

_MOST_SEQUENCES = 256  # sampled side by side; more wait in the server
_MOST_REQUESTS = 64
_TOKENS_A_STEP = 2048
_SECONDS_BETWEEN_LOOKS = 0.5
_BYTES_A_TOKEN, _BYTES_AN_ANSWER = 600, 65_536


class VllmEngine:
    """A `GenerationEngine` on a vLLM server of its own; a context manager that ends it."""

    def __init__(
        self, path: Path | str, *, stop_id: int, dtype: str, config: VllmConfig, eager: bool
    ) -> None:
        """Start a server on the model at `path` and wait for it.

        Args:
            path: A folder with safetensors, or a hub id.
            dtype: Of weights and arithmetic, where `config.dtype` names none.
            eager: For CPUs: no compilation and no CUDA graphs, prompts computed whole.

        Raises:
            UserInputError: there is no such environment, or `max_model_len` is beyond the model's context.
            SamplingServerError: the server does not start.
        """
        self.stop_id = stop_id
        self._config = config
        self._arguments = {
            "dtype": config.dtype or dtype,
            "max-num-seqs": _MOST_SEQUENCES,
            "kv-cache-memory-bytes": int(config.kv_cache_gib * 2**30),
            "logprobs-mode": "raw_logprobs",  # before temperature and top-p
            "load-format": "safetensors",
            "generation-config": "vllm",  # not the model folder's own ideas of temperature and top-p
        }
        # Where requests have seeds, a prompt that is computed in two steps ends vLLM 0.32 on a CPU: "CPU Generator does
        # not use offset". So prompts are computed whole there.
        self._whole_prompts = eager
        on_cpu = ["--enforce-eager", "--no-enable-chunked-prefill"] if eager else []
        self._flags = ["--tokens-only", "--enable-prefix-caching", *on_cpu]
        self._server: VllmServer | None = None
        self.load(path)

    def load(self, path: Path | str) -> None:
        """Go on with another model: the server is started anew.

        vLLM can also put new weights into a running server. Seen on a CPU with vLLM 0.32, its log-probabilities are
        neither model's afterwards; so it is not asked to.

        Raises:
            UserInputError, SamplingServerError: as when the engine is made.
        """
        self.close()
        model = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        context = int(model.max_position_embeddings)
        self._vocabulary = int(model.vocab_size)
        self.max_model_len = self._config.max_model_len or context
        if self.max_model_len > context:
            raise UserInputError(
                f"sampling.vllm.max_model_len: {self.max_model_len} is more than the context of {path}, "
                f"{context} tokens"
            )
        local = Path(path).is_dir()
        arguments = {**self._arguments, "max-model-len": self.max_model_len}
        if self._whole_prompts:
            arguments["max-num-batched-tokens"] = max(self.max_model_len, _TOKENS_A_STEP)
        written = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        self._server = VllmServer(
            Path(path).resolve() if local else path,
            self._config,
            arguments=[*written, *self._flags],
            offline=local,
        )

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
        self._server = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Response]]:
        """See `GenerationEngine.generate`.

        A response ends at the end of the model's context (`max_model_len`) at the latest, with "length"; a prompt
        that leaves no room there gets empty ones.

        Raises:
            UserInputError: a prompt is empty or holds an id that the model does not know.
            SamplingServerError: the server fails.
        """
        wanted = 1 if sampling.temperature == 0 else samples_per_prompt  # greedy samples are all the same
        requests = [
            _Request(place, list(prompt), first, min(_MOST_SEQUENCES, wanted - first), room)
            for place, prompt in enumerate(prompts)
            if (room := self._room(prompt, sampling)) > 0
            for first in range(0, wanted, _MOST_SEQUENCES)
        ]
        sampled: list[dict[int, Response]] = [{} for _ in prompts]
        pool = ThreadPoolExecutor(min(_MOST_REQUESTS, 1 + math.ceil(2 * _MOST_SEQUENCES / wanted)))
        try:
            pending: set[Future[None]] = {
                pool.submit(self._sample, request, sampling, seed, sampled[request.place])
                for request in requests
            }
            while pending:
                interruption.raise_if_requested()
                done, pending = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        missing = Response([], [], "length")
        return [
            [rows.get(number if wanted > 1 else 0, missing) for number in range(samples_per_prompt)]
            for rows in sampled
        ]

    def _room(self, prompt: Sequence[int], sampling: SamplingConfig) -> int:
        """Tokens that a response to the prompt may have. An id out of range would end vLLM's engine."""
        if not prompt:
            raise UserInputError("a prompt to sample from holds no token")
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise UserInputError(
                f"a prompt holds the token {max(prompt)}, the model knows those below {self._vocabulary}: the "
                "tokenizer is another model's"
            )
        return min(sampling.max_new_tokens, self.max_model_len - len(prompt))

    def _sample(
        self, request: _Request, sampling: SamplingConfig, seed: int, found: dict[int, Response]
    ) -> None:
        """Ask for the samples `first` to `first + count` of a prompt."""
        if self._server is None:
            raise SamplingServerError("vLLM's server has been ended; load a model first")
        answer = self._server.post(
            "/inference/v1/generate",
            {
                "token_ids": request.prompt,
                "sampling_params": {
                    "n": request.count,
                    "max_tokens": request.room,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    # vLLM gives sample k of a request the request's seed + k.
                    "seed": seed_for_prompt(seed, request.prompt) + request.first,
                    "logprobs": 0,  # of the chosen token alone
                    "stop_token_ids": [self.stop_id],
                    "ignore_eos": True,  # the chat format says what ends an answer, not the model's configuration
                },
            },
            most_bytes=_BYTES_AN_ANSWER + request.count * request.room * _BYTES_A_TOKEN,
        )
        try:
            choices = {choice["index"]: choice for choice in answer["choices"]}
            if sorted(choices) != list(range(request.count)):
                raise ValueError(f"samples {sorted(choices)} for {request.count}")
            for index, choice in choices.items():
                found[request.first + index] = _response(choice, self.stop_id, request.room)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SamplingServerError(
                f"vLLM's server: an answer is not as vLLM 0.32 gives it ({type(error).__name__}: {error}); use the "
                "version that `make vllm-env` installs"
            ) from None


@dataclass(frozen=True, slots=True)
class _Request:
    place: int
    prompt: list[int]
    first: int
    count: int
    room: int


def seed_for_prompt(seed: int, prompt: Sequence[int]) -> int:
    """Seed of a prompt's first sample, below 2^62; sample k has the one that is k higher."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def _response(choice: dict[str, Any], stop_id: int, room: int) -> Response:
    """What vLLM says of one sample, checked.

    Raises:
        ValueError: it is not what was asked for.
    """
    ids, content = choice["token_ids"], choice["logprobs"]["content"]
    logprobs = [entry["logprob"] for entry in content]
    if [entry["token_id"] for entry in content] != ids or not all(isinstance(token, int) for token in ids):
        raise ValueError("the log-probabilities are of other tokens than the sample's")
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in logprobs):
        raise ValueError("a log-probability is not finite")
    if stop_id in ids[:-1] or not 0 < len(ids) <= room:
        raise ValueError(
            f"a sample of {len(ids)} tokens, 1 to {room} were asked for, or one beyond the stop token"
        )
    stopped = ids[-1] == stop_id
    if not stopped and (choice["finish_reason"] != "length" or len(ids) < room):
        raise ValueError(f"a sample ended with {choice['finish_reason']} after {len(ids)} of {room} tokens")
    return Response(ids, logprobs, "stop" if stopped else "length")
