"""Scoring dialogues with one or two reward models: the one interface that every stage and user scores through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.models import load_reward_model
from llama2_chat.ppo.rewards import combine_scores
from llama2_chat.reward.custom import Reward, Slot, custom_reward
from llama2_chat.reward.data import encode_dialogue
from llama2_chat.reward.pooling import (
    Branch,
    Tree,
    pack_dialogues,
    row_layout,
    scores_at_ends,
    tree_size,
    trees_of,
)
from llama2_chat.settings import BaseModelSource, CallableSource, RunSettings, UrlSource
from llama2_chat.tokenizers import load_tokenizer

_TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
"""Tokens of one forward pass; on a CPU more than this falls out of the caches and gets slower."""


@dataclass(frozen=True, slots=True)
class Score:
    """One dialogue's scores.

    `helpfulness` and `safety` are raw (logits); their probabilities and `combined` (R_c) lie in (0, 1).
    Without a safety model, safety is None and the branch is always "helpfulness".
    """

    helpfulness: float
    safety: float | None
    helpfulness_probability: float
    safety_probability: float | None
    branch: Literal["helpfulness", "safety"]
    combined: float

    @property
    def combined_logit(self) -> float:
        """logit(R_c): the raw score of the branch that decided."""
        return self.safety if self.branch == "safety" and self.safety is not None else self.helpfulness


class RewardModel:
    """One reward model with the tokenizer and chat format it was trained with."""

    def __init__(
        self, model: PreTrainedModel, chat_format: ChatFormat, *, padding_id: int, name: str
    ) -> None:
        self.model = model
        self.model.train(False)
        self.chat_format = chat_format
        self.padding_id = padding_id
        self.name = name
        self.max_tokens = int(getattr(model.config, "max_position_embeddings", 4096))
        self._one_at_a_time = Lock()
        if model.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto") -> RewardModel:
        """Load a reward model folder; the chat format is the one its config names (default llama2)."""
        settings = RunSettings(base_model=BaseModelSource(path=str(path)), device=device)
        model = load_reward_model(path, settings)
        tokenizer = load_tokenizer(path)
        chat_format = build_chat_format(getattr(model.config, "chat_format", "llama2"), tokenizer)
        return cls(model, chat_format, padding_id=tokenizer.padding_id, name=Path(path).name)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue that ends with the assistant; oldest turns go where it is too long."""
        ids = encode_dialogue(messages[:-1], messages[-1].content, self.chat_format, self.max_tokens)
        if ids is None:
            raise UserInputError(
                f"the last turn alone is longer than the {self.max_tokens} tokens that {self.name} can take; its "
                f"message begins {messages[-2].content[:60]!r}: shorten or leave it out"
            )
        return ids

    def can_take(self, messages: Sequence[Message]) -> bool:
        """Whether `encode` can make a dialogue fit: its last turn is not too long by itself."""
        ids = encode_dialogue(messages[:-1], messages[-1].content, self.chat_format, self.max_tokens)
        return ids is not None

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores, float32 (B,), of dialogues that end with the assistant; equal ones are computed once."""
        distinct: dict[tuple[Message, ...], int] = {}
        places = [distinct.setdefault(tuple(messages), len(distinct)) for messages in dialogues]
        return self.score_tokens([self.encode(messages) for messages in distinct])[places]

    @torch.no_grad()
    def score_tokens(self, dialogues: Sequence[Sequence[int]]) -> Tensor:
        """Raw scores, float32 (B,), on the CPU; what several dialogues begin with is computed once."""
        scores = torch.zeros(len(dialogues))
        layout = row_layout(self.model)
        for trees in self._batches(trees_of(dialogues, share=layout.share), dialogues):
            numbers = [branch.number for tree in trees for branch in tree]
            places = iter(range(len(numbers)))
            packed = pack_dialogues(
                [dialogues[number] for number in numbers],
                self.padding_id,
                layout,
                trees=[[Branch(next(places), branch.start) for branch in tree] for tree in trees],
            )
            tensors = (packed.input_ids, packed.position_ids, packed.rows, packed.ends)
            with self._one_at_a_time:
                found = scores_at_ends(self.model, *(tensor.to(self.model.device) for tensor in tensors))
            scores[numbers] = found.cpu()
        return scores

    def _batches(self, trees: Sequence[Tree], dialogues: Sequence[Sequence[int]]) -> Iterator[list[Tree]]:
        """Trees of similar size, together within the token budget where there is more than one."""
        budget = _TOKEN_BUDGET[self.model.device.type]
        sizes = [tree_size(tree, dialogues) for tree in trees]
        batch: list[Tree] = []
        total = 0
        for number in sorted(range(len(trees)), key=lambda n: (-sizes[n], n)):
            if batch and total + sizes[number] > budget:
                yield batch
                batch, total = [], 0
            batch.append(trees[number])
            total += sizes[number]
        if batch:
            yield batch


RewardSource = str | Path | CallableSource | UrlSource
"""A reward model's folder, or what makes a custom reward."""


def load_reward(source: RewardSource, *, slot: Slot, device: str = "auto") -> Reward:
    """What scores dialogues: a reward model, or the function or server that a configuration names instead.

    Args:
        slot: What it scores; a server gives both.
    """
    if isinstance(source, str | Path):
        return RewardModel.from_pretrained(source, device=device)
    return custom_reward(source, slot=slot)


class RewardScorer:
    """Helpfulness and, if given, safety reward model, combined as in §3.2.3."""

    def __init__(
        self, helpfulness: Reward, safety: Reward | None = None, *, safety_threshold: float = 0.15
    ) -> None:
        self.helpfulness = helpfulness
        self.safety = safety
        self.safety_threshold = safety_threshold

    @classmethod
    def from_pretrained(
        cls,
        helpfulness: RewardSource,
        safety: RewardSource | None = None,
        *,
        safety_threshold: float = 0.15,
        device: str = "auto",
    ) -> RewardScorer:
        """Load reward model folders (Hugging Face format, one label, safetensors), or custom rewards."""
        return cls(
            load_reward(helpfulness, slot="helpfulness", device=device),
            None if safety is None else load_reward(safety, slot="safety", device=device),
            safety_threshold=safety_threshold,
        )

    def score(
        self,
        dialogues: Sequence[Sequence[Mapping[str, str]] | Sequence[Message]],
        is_safety: Sequence[bool] | None = None,
    ) -> list[Score]:
        """Score dialogues that end with the assistant.

        Args:
            dialogues: Lists of messages, `{"role", "content"}` mappings or `Message`s.
            is_safety: Whether each prompt is tagged as a safety prompt; default none is.

        Raises:
            UserInputError: a dialogue is malformed or does not end with the assistant, or lengths differ.
        """
        messages = [_as_messages(dialogue) for dialogue in dialogues]
        tags = [False] * len(messages) if is_safety is None else list(is_safety)
        if len(tags) != len(messages):
            raise UserInputError(f"is_safety has {len(tags)} entries for {len(messages)} dialogues")
        if not messages:
            return []
        safety = None if self.safety is None else self.safety.score_messages(messages)
        return self.combine(self.helpfulness.score_messages(messages), safety, tags)

    def combine(self, helpfulness: Tensor, safety: Tensor | None, is_safety: Sequence[bool]) -> list[Score]:
        """What `score` returns, from raw scores, float32 (B,), that are known already."""
        if safety is None:
            probabilities = helpfulness.double().sigmoid().tolist()
            return [
                Score(raw, None, probability, None, "helpfulness", probability)
                for raw, probability in zip(helpfulness.tolist(), probabilities, strict=True)
            ]
        combined, used_safety = combine_scores(
            helpfulness, safety, is_safety=torch.tensor(is_safety), safety_threshold=self.safety_threshold
        )
        columns = (
            helpfulness.tolist(),
            safety.tolist(),
            helpfulness.double().sigmoid().tolist(),
            safety.double().sigmoid().tolist(),
            ["safety" if used else "helpfulness" for used in used_safety.tolist()],
            combined.double().sigmoid().tolist(),
        )
        return [Score(*row) for row in zip(*columns, strict=True)]

    def can_take(self, messages: Sequence[Message]) -> bool:
        """Whether the last turn alone fits into both models; older turns are left out where they do not."""
        return all(model.can_take(messages) for model in self.models)

    @property
    def models(self) -> list[RewardModel]:
        """Helpfulness and safety reward model, those of the two that are models."""
        return [reward for reward in (self.helpfulness, self.safety) if isinstance(reward, RewardModel)]


def _as_messages(dialogue: Sequence[Mapping[str, str]] | Sequence[Message]) -> tuple[Message, ...]:
    messages = tuple(
        message if isinstance(message, Message) else Message(message["role"], message["content"])  # type: ignore[arg-type]
        for message in dialogue
    )
    Dialogue(messages)
    if messages[-1].role != "assistant":
        raise UserInputError("a dialogue to be scored ends with the assistant's message")
    return messages
