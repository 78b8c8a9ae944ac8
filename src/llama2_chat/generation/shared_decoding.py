"""Drawing many samples of many prompts: cohorts side by side, new ones in the place of responses that have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat import interruption
from llama2_chat.generation.cohort import COHORT_ATTENTION, Cohort, Samples
from llama2_chat.generation.engine import Response
from llama2_chat.generation.sampling import draw
from llama2_chat.lora import plain_model
from llama2_chat.packed_attention import has_plain_causal_attention
from llama2_chat.settings import SamplingConfig

_BEGIN_AT = 0.25
"""Share of the token budget that is to be free before further prompts begin: each begin is a step of its own."""

_ROWS_PER_HEAD = 128
"""Rows of logits at a time: more would not fit into the processor's caches."""


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be computed by cohorts."""
    return has_plain_causal_attention(plain_model(model).config)


def sample_in_cohorts(
    model: PreTrainedModel,
    samples: Sequence[Samples],
    sampling: SamplingConfig,
    *,
    stop_id: int,
    padding_id: int,
) -> Iterator[tuple[int, int, Response]]:
    """Prompt, number of the sample and response, in the order in which cohorts end.

    To be run within `attending_by_cohorts`.
    """
    whole = plain_model(model)
    waiting = deque(sorted(samples, key=lambda work: -len(work.ids)))
    cohorts: list[Cohort] = []
    decoder: Any = whole.get_decoder()  # type: ignore[no-untyped-call]
    head: Any = whole.get_output_embeddings()  # type: ignore[no-untyped-call]
    while waiting or cohorts:
        interruption.raise_if_requested()
        if waiting and (begun := _next_samples(waiting, cohorts, sampling)):
            cohort = Cohort(decoder, begun, padding_id)
            cohorts.append(cohort)
            drawn = _draw_first(head, cohort, sampling)
            cohort.take(*drawn, stop_id)
        else:
            _step(decoder, head, cohorts, sampling, stop_id)
        for cohort in [cohort for cohort in cohorts if not cohort.living]:
            cohorts.remove(cohort)
            yield from cohort.responses(stop_id)


@contextmanager
def attending_by_cohorts(model: PreTrainedModel) -> Iterator[None]:
    """The model attends as sampling has it, with cohorts and without, and afterwards as before."""
    model = plain_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(COHORT_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _next_samples(
    waiting: deque[Samples], cohorts: Sequence[Cohort], sampling: SamplingConfig
) -> list[Samples]:
    """What can begin now: as many of the waiting samples as fit, none while there is little room.

    Where not even one sample fits into the whole budget, one begins all the same.
    """
    needed = sum(cohort.needed_tokens for cohort in cohorts)
    if cohorts and sampling.token_budget - needed < _BEGIN_AT * sampling.token_budget:
        return []
    for cohort in cohorts:
        cohort.shrink()
    free = sampling.token_budget - needed
    chosen: list[Samples] = []
    width = len(waiting[0].ids)  # the longest comes first
    while waiting:
        work = waiting[0]
        fitting = (free - width) // sampling.max_new_tokens
        if not chosen and not cohorts:
            fitting = max(1, fitting)
        if fitting < 1:
            break
        if fitting < len(work.uniforms):
            if not chosen:
                chosen.append(Samples(work.prompt, work.ids, work.first, work.uniforms[:fitting]))
                waiting[0] = Samples(work.prompt, work.ids, work.first + fitting, work.uniforms[fitting:])
            break
        chosen.append(waiting.popleft())
        free -= width + len(work.uniforms) * sampling.max_new_tokens
    return chosen


def _draw_first(head: torch.nn.Module, cohort: Cohort, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The first token of every response, from the states after its prompt."""
    return _drawn(head, cohort.prompt_states[cohort.prompt_of], cohort.next_uniforms(), sampling)


def _step(
    decoder: PreTrainedModel,
    head: torch.nn.Module,
    cohorts: Sequence[Cohort],
    sampling: SamplingConfig,
    stop_id: int,
) -> None:
    """One more token for every living response."""
    inputs = [cohort.next_inputs() for cohort in cohorts]
    ids, positions = (torch.cat(parts).unsqueeze(1) for parts in zip(*inputs, strict=True))
    output = decoder(input_ids=ids, position_ids=positions, use_cache=False, cohorts=cohorts)
    uniforms = torch.cat([cohort.next_uniforms() for cohort in cohorts])
    drawn = _drawn(head, output.last_hidden_state[:, 0], uniforms, sampling)
    counts = [cohort.living for cohort in cohorts]
    parts = (torch.split(part, counts) for part in drawn)
    for cohort, tokens, logprobs in zip(cohorts, *parts, strict=True):
        cohort.take(tokens, logprobs, stop_id)


def _drawn(
    head: torch.nn.Module, states: Tensor, uniforms: Tensor, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, (rows,) each, from the last layer's states (rows, hidden)."""
    chunks = zip(torch.split(states, _ROWS_PER_HEAD), torch.split(uniforms, _ROWS_PER_HEAD), strict=True)
    parts = [
        draw(head(chunk), random[:, None], temperature=sampling.temperature, top_p=sampling.top_p)
        for chunk, random in chunks
    ]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens).squeeze(1), torch.cat(logprobs).squeeze(1)
