"""Samples that are drawn side by side: each prompt's keys and values stand once, however many samples read them.

A cohort is what begins to be decoded at the same step: some prompts and the samples of each. All of its responses are
equally long at any time, so nothing in them is padded or masked. A response that ends gives its place in the tensors
to another one and is computed no further.

n living responses, m prompts of at most P tokens, s living responses of the prompt that has the most, K heads of keys
and values, G heads of queries for each of them, D the width of a head, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llama2_chat.generation.engine import Response

COHORT_ATTENTION = "llama2_chat_cohorts"
"""Name under which transformers knows the implementation."""

_PREFILL_TOKENS = 4096
"""Most tokens of prompts, padding included, in one forward pass."""

_LEAST_PREFILL_TOKENS = 512
_SIMILAR = 0.8
"""A pass that has so many tokens takes no prompt shorter than this share of its longest: padding costs more then."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples to be drawn of one prompt: its number in the call, its tokens, the random numbers of each sample."""

    prompt: int
    ids: Sequence[int]
    first: int
    uniforms: Tensor
    """float64 (samples, most new tokens)."""


class Cohort:
    """Prompts and their responses in progress, with the keys and values of every layer."""

    def __init__(self, model: PreTrainedModel, samples: Sequence[Samples], padding_id: int) -> None:
        """Compute the prompts; nothing is drawn yet.

        Args:
            model: The decoder without its head.
        """
        device = model.device
        self._samples = samples
        lengths = [len(work.ids) for work in samples]
        self._lengths = torch.tensor(lengths, device=device)
        counts = torch.tensor([len(work.uniforms) for work in samples])
        self._prompt_of = torch.arange(len(samples)).repeat_interleave(counts).to(device)
        self._rows = torch.arange(int(counts.sum()), device=device)  # which response stands in which place
        self._uniforms = torch.cat([work.uniforms for work in samples]).to(device)
        self._tokens = torch.zeros(self._uniforms.shape, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(self._uniforms.shape, device=device)
        self.drawn = 0
        """Tokens of each living response; the caches hold all but the last."""
        self._prompt_cache, self.prompt_states = _prefill(model, samples, padding_id)
        self._mask = _padding_mask(lengths, self._prompt_cache[0])
        self._answer_cache: list[Tensor] = []
        self._arrange()

    @property
    def living(self) -> int:
        """Responses in progress, n."""
        return len(self._rows)

    @property
    def prompt_of(self) -> Tensor:
        """The prompt of each living response, (n,)."""
        return self._prompt_of

    @property
    def held_tokens(self) -> int:
        """Columns of the caches: what the cohort takes of a token budget."""
        prompts, _, longest, _ = self._prompt_cache[0].shape
        answers = len(self._answer_cache[0]) if self._answer_cache else self.living
        return prompts * longest + answers * self.room

    @property
    def needed_tokens(self) -> int:
        """What it would hold once shrunk."""
        return len(torch.unique(self._prompt_of)) * self._prompt_cache[0].shape[2] + self.living * self.room

    @property
    def room(self) -> int:
        """Most tokens of a response."""
        return self._uniforms.shape[1]

    def next_inputs(self) -> tuple[Tensor, Tensor]:
        """The last token of each living response and its position, (n,) each."""
        return self._tokens[self._rows, self.drawn - 1], self._lengths[self._prompt_of] + self.drawn - 1

    def next_uniforms(self) -> Tensor:
        """The random number of each living response for its next token, (n,)."""
        return self._uniforms[self._rows, self.drawn]

    def take(self, tokens_n: Tensor, logprobs_n: Tensor, stop_id: int) -> None:
        """Append what was drawn to the living responses; those that end leave."""
        self._tokens[self._rows, self.drawn] = tokens_n
        self._logprobs[self._rows, self.drawn] = logprobs_n
        self.drawn += 1
        if self.drawn == self.room:
            self._prompt_of = self._rows = self._rows[:0]
            return
        ended = tokens_n == stop_id
        if bool(ended.any()):
            self._remove(ended)

    def responses(self, stop_id: int) -> list[tuple[int, int, Response]]:
        """Prompt, number among the prompt's samples, response: all of them, once none is living."""
        found = []
        rows = iter(zip(self._tokens.tolist(), self._logprobs.tolist(), strict=True))
        for work in self._samples:
            for number in range(len(work.uniforms)):
                ids, logprobs = next(rows)
                stopped = stop_id in ids
                length = ids.index(stop_id) + 1 if stopped else len(ids)
                response = Response(ids[:length], logprobs[:length], "stop" if stopped else "length")
                found.append((work.prompt, work.first + number, response))
        return found

    def attend(
        self, layer: int, query_nHD: Tensor, key_nKD: Tensor, value_nKD: Tensor, scale: float
    ) -> Tensor:
        """Store the new tokens' keys and values; what each living response's last token attends to, (n, H, D)."""
        rows, heads, width = key_nKD.shape
        keys, values = self._answer_tensors(layer, key_nKD)
        keys[:rows, :, self.drawn - 1] = key_nKD
        values[:rows, :, self.drawn - 1] = value_nKD
        query_nKGD = query_nHD.reshape(rows, heads, -1, width)
        of_prompt, weight_of_prompt = self._attend_to_prompt(layer, query_nKGD, scale)
        of_answer, weight_of_answer = _attention(
            query_nKGD, keys[:rows, :, : self.drawn], values[:rows, :, : self.drawn], scale=scale
        )
        # A softmax over both parts, from the two softmaxes and the logarithms of their sums.
        share = torch.sigmoid(weight_of_prompt - weight_of_answer).unsqueeze(-1).to(of_answer.dtype)
        return torch.lerp(of_answer, of_prompt, share).reshape(rows, -1, width)

    def _attend_to_prompt(self, layer: int, query_nKGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The responses of a prompt stand as further queries beside each other: one product for all of them."""
        _, heads, group, width = query_nKGD.shape
        prompts, slots = self._grid.shape
        queries = query_nKGD[self._grid].transpose(1, 2).reshape(prompts, heads, slots * group, width)
        attended, weights = _attention(
            queries,
            self._prompt_cache[2 * layer],
            self._prompt_cache[2 * layer + 1],
            scale=scale,
            mask=self._mask,
        )
        attended = attended.view(prompts, heads, slots, group, width)[self._prompt_of, :, self._slot]
        return attended, weights.view(prompts, heads, slots, group)[self._prompt_of, :, self._slot]

    def _answer_tensors(self, layer: int, like_nKD: Tensor) -> tuple[Tensor, Tensor]:
        if 2 * layer == len(self._answer_cache):
            rows, heads, width = like_nKD.shape
            self._answer_cache += [like_nKD.new_empty(rows, heads, self.room, width) for _ in range(2)]
        return self._answer_cache[2 * layer], self._answer_cache[2 * layer + 1]

    def _remove(self, ended_n: Tensor) -> None:
        """The last responses that go on move into the places of those that ended."""
        left = len(ended_n) - int(ended_n.sum())
        to = ended_n[:left].nonzero().squeeze(1)
        moved = (~ended_n[left:]).nonzero().squeeze(1) + left
        for cache in self._answer_cache:
            cache[to, :, : self.drawn - 1] = cache[moved, :, : self.drawn - 1]
        for name in ("_rows", "_prompt_of"):
            places = getattr(self, name)
            places[to] = places[moved]
            setattr(self, name, places[:left])
        self._arrange()

    def _arrange(self) -> None:
        """Where the living responses of each prompt are: `_grid` (m, s), and the column there of each, `_slot` (n,)."""
        order = self._prompt_of.argsort(stable=True)
        prompts = self._prompt_of[order]
        counts = torch.bincount(prompts, minlength=len(self._lengths))
        slots = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prompts]
        self._grid = order.new_zeros(len(counts), int(counts.max()))
        self._grid[prompts, slots] = order
        self._slot = torch.empty_like(slots).scatter_(0, order, slots)

    def shrink(self) -> None:
        """Give back the room of responses that have ended, and of prompts that have none left."""
        if self.needed_tokens == self.held_tokens:
            return
        for number, cache in enumerate(self._answer_cache):
            kept = cache.new_empty(self.living, *cache.shape[1:])
            kept[:, :, : self.drawn - 1] = cache[: self.living, :, : self.drawn - 1]
            self._answer_cache[number] = kept
        used = torch.unique(self._prompt_of)
        if len(used) == len(self._prompt_cache[0]):
            return
        self._prompt_cache = [cache[used] for cache in self._prompt_cache]
        self._mask = None if self._mask is None else self._mask[used]
        self._lengths = self._lengths[used]
        self._prompt_of = torch.searchsorted(used, self._prompt_of)
        self._arrange()


def _prefill(
    model: PreTrainedModel, samples: Sequence[Samples], padding_id: int
) -> tuple[list[Tensor], Tensor]:
    """Keys and values of the prompts, layer by layer, (m, K, P, D) each, and the states after them, (m, hidden).

    Padded on the right, where causal attention never sees it, to the longest of each pass.
    """
    longest = max(len(work.ids) for work in samples)
    caches: list[Tensor] = []
    states = []
    for start, end in _passes([len(work.ids) for work in samples]):
        part = samples[start:end]
        width = max(len(work.ids) for work in part)
        ids = torch.tensor(
            [[*work.ids] + [padding_id] * (width - len(work.ids)) for work in part], device=model.device
        )
        output = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
        ends = torch.tensor([len(work.ids) - 1 for work in part], device=ids.device)
        states.append(output.last_hidden_state[torch.arange(len(part), device=ids.device), ends])
        layers: list[Any] = output.past_key_values.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        if len(part) == len(samples):
            return tensors, states[0]
        if not caches:
            # Zeros: what is masked may be anything but NaN.
            shapes = ((len(samples), tensor.shape[1], longest, tensor.shape[3]) for tensor in tensors)
            caches = [tensor.new_zeros(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
        for cache, tensor in zip(caches, tensors, strict=True):
            cache[start:end, :, :width] = tensor
    return caches, torch.cat(states)


def _passes(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Which prompts, from and to, are computed together: of similar length, where they are enough for a pass."""
    start, width = 0, 0
    for place, length in enumerate(lengths):
        tokens = (place - start) * width
        wider = max(width, length)
        if place > start and (
            wider * (place - start + 1) > _PREFILL_TOKENS
            or (tokens >= _LEAST_PREFILL_TOKENS and length < _SIMILAR * width)
        ):
            yield start, place
            start, wider = place, length
        width = wider
    yield start, len(lengths)


def _padding_mask(lengths: Sequence[int], cache: Tensor) -> Tensor | None:
    """What is added to the scores of the prompts' columns, (m, 1, 1, P); None where all are equally long."""
    if min(lengths) == max(lengths):
        return None
    columns = torch.arange(cache.shape[2], device=cache.device)
    padding = columns >= torch.tensor(lengths, device=cache.device)[:, None]
    mask = torch.zeros(padding.shape, dtype=cache.dtype, device=cache.device)
    return mask.masked_fill_(padding, torch.finfo(cache.dtype).min)[:, None, None]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (…, Q, D) over all columns, and the logarithm of each query's sum of exponentials, (…, Q).

    transformers and `scaled_dot_product_attention` return no such sums; PyTorch's kernel for the CPU does.
    """
    if query.device.type == "cpu":
        if mask is not None:
            mask = mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        attended: Tensor
        weights: Tensor
        attended, weights = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        return attended, weights
    return _by_definition(query, key, value, scale, mask)


def _by_definition(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    weights = scores.logsumexp(-1)
    return torch.matmul((scores - weights.unsqueeze(-1)).exp().to(value.dtype), value), weights


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cohorts: Sequence[Cohort] | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Of the cohorts' living responses one token each: query (rows, H, 1, D); else ordinary attention."""
    if cohorts is None:
        # transformers copies keys and values for every head of queries where there is a mask: not needed.
        causal = attention_mask is None and query.shape[2] == key.shape[2] > 1
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    layer: Any = module.layer_idx
    of_cohorts, start = [], 0
    for cohort in cohorts:
        end = start + cohort.living
        query_nHD, key_nKD, value_nKD = (part[start:end, :, 0] for part in (query, key, value))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        of_cohorts.append(cohort.attend(layer, query_nHD, key_nKD, value_nKD, scale))
        start = end
    return torch.cat(of_cohorts).unsqueeze(1), None


AttentionInterface.register(COHORT_ATTENTION, _attend)
AttentionMaskInterface.register(COHORT_ATTENTION, sdpa_mask)
