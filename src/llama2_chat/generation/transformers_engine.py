"""Sampling with a transformers model: each prompt is computed once, however many samples it gets.

Prompts of similar length share a batch, padded on the left under a mask; their cache is then repeated
for the samples, and rows that have finished leave it. The batch is bounded by a token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llama2_chat import interruption
from llama2_chat.generation.engine import Response
from llama2_chat.generation.sampling import draw, uniforms_for_prompt
from llama2_chat.settings import SamplingConfig

_COMPACT_BELOW = 0.75  # Copying the cache pays once a quarter of its rows are dead.


class TransformersEngine:
    """A `GenerationEngine` on a model in this process."""

    def __init__(
        self, model: PreTrainedModel, *, stop_id: int, padding_id: int, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.stop_id = stop_id
        self.padding_id = padding_id
        self.autocast = autocast

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Response]]:
        """See `GenerationEngine.generate`."""
        self.model.train(False)
        responses: list[list[Response]] = [[] for _ in prompts]
        for members, first, count in self._batches(prompts, samples_per_prompt, sampling):
            interruption.raise_if_requested()
            uniforms = torch.cat(
                [
                    uniforms_for_prompt(seed, prompts[i], first + count, sampling.max_new_tokens)[first:]
                    for i in members
                ]
            )
            with torch.autocast(
                self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ):
                rows = self._decode([prompts[i] for i in members], count, uniforms, sampling)
            for place, index in enumerate(members):
                responses[index].extend(rows[place * count : (place + 1) * count])
        return responses

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

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Last-token logits, cache, attention mask and next position of left-padded prompts."""
        longest = max(len(prompt) for prompt in prompts)
        device = self.model.device
        ids = torch.full((len(prompts), longest), self.padding_id, device=device)
        mask = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float(), cache, mask, positions[:, -1:] + 1

    def _decode(
        self, prompts: Sequence[Sequence[int]], samples: int, uniforms: Tensor, sampling: SamplingConfig
    ) -> list[Response]:
        """`samples` responses for each prompt, prompt by prompt."""
        logits, cache, mask, positions = self._prefill(prompts)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
        logits, mask, positions = (x.repeat_interleave(samples, 0) for x in (logits, mask, positions))
        uniforms = uniforms.to(self.model.device)
        rows = len(logits)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]
        owner = torch.arange(rows, device=self.model.device)  # which response a batch row belongs to
        alive = torch.ones(rows, dtype=torch.bool, device=self.model.device)
        for step in range(sampling.max_new_tokens):
            chosen = draw(
                logits, uniforms[owner, step], temperature=sampling.temperature, top_p=sampling.top_p
            )
            chosen_logprobs = torch.log_softmax(logits, -1).gather(-1, chosen[:, None]).squeeze(1)
            for row, living, token, logprob in zip(
                owner.tolist(), alive.tolist(), chosen.tolist(), chosen_logprobs.tolist(), strict=True
            ):
                if living:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
            alive &= chosen != self.stop_id
            if step + 1 == sampling.max_new_tokens or not bool(alive.any()):
                break
            if alive.float().mean() < _COMPACT_BELOW:
                kept = alive.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                owner, alive, chosen, mask, positions = (
                    x[kept] for x in (owner, alive, chosen, mask, positions)
                )
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            output = self.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits, positions = output.logits[:, -1].float(), positions + 1
        return [
            Response(ids, values, "stop" if ids and ids[-1] == self.stop_id else "length")
            for ids, values in zip(tokens, logprobs, strict=True)
        ]
