"""Sampling with a transformers model: each prompt is computed once, however many samples it gets.

Prompts of similar length share a batch, padded on the left under a mask; their cache is then repeated
for the samples, and rows that have finished leave it. The batch is bounded by a token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.generation.cohort import Samples
from llama2_chat.generation.decoding import decode, feed
from llama2_chat.generation.engine import Response
from llama2_chat.generation.growing_cache import growing_cache
from llama2_chat.generation.sampling import uniforms_for_prompt
from llama2_chat.generation.shared_decoding import attending_by_cohorts, can_share_prompts, sample_in_cohorts
from llama2_chat.lora import merged_meanwhile
from llama2_chat.models import load_policy, sampling_dtype
from llama2_chat.settings import RunSettings, SamplingConfig
from llama2_chat.tokenizers import load_tokenizer


class TransformersEngine:
    """A `GenerationEngine` on a model in this process."""

    def __init__(
        self, model: PreTrainedModel, *, stop_id: int, padding_id: int, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.stop_id = stop_id
        self.padding_id = padding_id
        self.autocast = autocast

    @contextmanager
    def inference(self) -> Iterator[None]:
        """The model in evaluation mode, its adapter merged, without gradients, in the engine's precision."""
        self.model.train(False)
        kind = self.model.device.type
        autocast = torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)
        attending = attending_by_cohorts(self.model) if can_share_prompts(self.model) else nullcontext()
        with torch.no_grad(), merged_meanwhile(self.model), attending, autocast:
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Response]]:
        """See `GenerationEngine.generate`."""
        if can_share_prompts(self.model):
            return self._generate_in_cohorts(prompts, samples_per_prompt, sampling, seed)
        responses: list[list[Response]] = [[] for _ in prompts]
        for members, first, count in self._batches(prompts, samples_per_prompt, sampling):
            interruption.raise_if_requested()
            uniforms = torch.cat(
                [
                    uniforms_for_prompt(seed, prompts[i], first + count, sampling.max_new_tokens)[first:]
                    for i in members
                ]
            )
            with self.inference():
                rows = self._decode([prompts[i] for i in members], count, uniforms, sampling)
            for place, index in enumerate(members):
                responses[index].extend(rows[place * count : (place + 1) * count])
        return responses

    def _generate_in_cohorts(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int, sampling: SamplingConfig, seed: int
    ) -> list[list[Response]]:
        samples = [
            Samples(
                number,
                ids,
                0,
                uniforms_for_prompt(seed, ids, samples_per_prompt, sampling.max_new_tokens),
            )
            for number, ids in enumerate(prompts)
        ]
        rows: list[dict[int, Response]] = [{} for _ in prompts]
        with self.inference():
            for prompt, number, response in sample_in_cohorts(
                self.model, samples, sampling, stop_id=self.stop_id, padding_id=self.padding_id
            ):
                rows[prompt][number] = response
        return [[row[number] for number in range(samples_per_prompt)] for row in rows]

    def _batches(
        self, prompts: Sequence[Sequence[int]], samples: int, sampling: SamplingConfig
    ) -> Iterator[tuple[list[int], int, int]]:
        """Prompts of similar length, with the range of samples to draw, within the token budget."""

        def room(prompt: Sequence[int]) -> int:
            """Rows that fit if this prompt is the longest of its batch."""
            return max(1, sampling.token_budget // (len(prompt) + sampling.max_new_tokens))

        waiting = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        while waiting:
            rows = room(prompts[waiting[0]])
            if rows >= samples:
                members, waiting = waiting[: rows // samples], waiting[rows // samples :]
                yield members, 0, samples
            else:
                member = waiting.pop(0)
                for first in range(0, samples, rows):
                    yield [member], first, min(rows, samples - first)

    def _decode(
        self, prompts: Sequence[Sequence[int]], samples: int, uniforms: Tensor, sampling: SamplingConfig
    ) -> list[Response]:
        """`samples` responses for each prompt, prompt by prompt."""
        cache = growing_cache(self.model.config, room=sampling.max_new_tokens)
        batch = feed(self.model, prompts, padding_id=self.padding_id, cache=cache)
        batch.repeat(samples)
        return decode(self.model, batch, uniforms, sampling, stop_id=self.stop_id)


def load_engine(path: str, settings: RunSettings) -> tuple[TransformersEngine, ChatFormat]:
    """An engine on the policy at `path` (a stage's model or the run's base) and its chat format."""
    gguf_file = settings.gguf_file_of(path)
    tokenizer = load_tokenizer(path, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    engine = TransformersEngine(
        load_policy(path, settings, gguf_file=gguf_file),
        stop_id=chat_format.stop_id,
        padding_id=tokenizer.padding_id,
        autocast=sampling_dtype(settings),
    )
    return engine, chat_format
