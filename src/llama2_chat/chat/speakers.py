"""Policies loaded when they are first asked, and their answers with the reward models' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama2_chat.chat.offer import Offer
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError

if TYPE_CHECKING:
    from llama2_chat.chat_format import ChatFormat
    from llama2_chat.generation.answers import Answer
    from llama2_chat.generation.transformers_engine import TransformersEngine
    from llama2_chat.reward.scoring import RewardScorer, Score

DEFAULT_MAX_NEW_TOKENS = 512
_MOST_PARAMETERS_KEPT = 2_000_000_000
"""Several policies stay loaded as long as they have no more parameters than this together."""


@dataclass(frozen=True)
class Speaker:
    """One loaded policy."""

    engine: TransformersEngine
    chat_format: ChatFormat
    max_tokens: int
    """Of prompt and answer together."""
    parameters: int


@dataclass(frozen=True)
class Spoken:
    """One answer: its text and status, the turns that were left out for it, its scores."""

    answer: Answer
    dropped_turns: int
    score: Score | None
    unscored_because: str = ""


class Speakers:
    """All policies of an offer, and the scorer that they share."""

    def __init__(
        self, offer: Offer, *, temperature: float, top_p: float, max_new_tokens: int | None, seed: int
    ) -> None:
        self.offer = offer
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.max_new_tokens = max_new_tokens
        self._loaded: dict[str, Speaker] = {}
        self._scorer: RewardScorer | None = None

    @property
    def can_score(self) -> bool:
        """Whether there is a reward model."""
        return self.offer.helpfulness is not None

    def load(self, name: str) -> Speaker:
        """The policy of that name, loaded now if it is not yet.

        Raises:
            UserInputError: the model cannot be loaded, or leaves no room for a prompt.
        """
        if name not in self._loaded:
            speaker = self._load(name)
            while self._loaded and self._parameters() + speaker.parameters > _MOST_PARAMETERS_KEPT:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[name] = speaker
        return self._loaded[name]

    def answer(self, name: str, messages: Sequence[Message], *, draw: int, scored: bool) -> Spoken:
        """The policy's answer to messages that end with the user's; another `draw` gives another answer.

        Raises:
            UserInputError: the last message alone is too long.
        """
        from llama2_chat.generation.answers import sample_answers
        from llama2_chat.settings import SamplingConfig
        from llama2_chat.tokenization import fit_to_length

        speaker = self.load(name)
        new_tokens = self._new_tokens(speaker.max_tokens)
        room = speaker.max_tokens - new_tokens
        fitted = fit_to_length(messages, speaker.chat_format, room)
        if fitted is None:
            raise UserInputError(
                f"this message alone is longer than the {room} tokens that {name} has room for beside its answer; "
                "shorten it, or restart with a smaller --max-new-tokens"
            )
        sampling = SamplingConfig(temperature=self.temperature, top_p=self.top_p, max_new_tokens=new_tokens)
        [[answer]] = sample_answers(
            speaker.engine,
            speaker.chat_format,
            [fitted],
            samples_per_prompt=1,
            sampling=sampling,
            seed=self.seed + draw,
        )
        dropped = (len(messages) - len(fitted)) // 2
        if not (scored and self.can_score):
            return Spoken(answer, dropped, None)
        try:
            [score] = self.scorer().score([(*fitted, Message("assistant", answer.text))])
        except UserInputError as error:  # a reward model may take fewer tokens than the policy
            return Spoken(answer, dropped, None, str(error))
        return Spoken(answer, dropped, score)

    def scorer(self) -> RewardScorer:
        """The reward models, loaded now if they are not yet."""
        from llama2_chat.reward.scoring import RewardScorer

        assert self.offer.helpfulness is not None
        if self._scorer is None:
            self._scorer = RewardScorer.from_pretrained(
                self.offer.helpfulness,
                self.offer.safety,
                safety_threshold=self.offer.safety_threshold,
                device=self.offer.settings.device,
            )
        return self._scorer

    def _load(self, name: str) -> Speaker:
        from transformers.utils import logging as transformers_logging

        from llama2_chat.chat_format import build_chat_format
        from llama2_chat.generation.transformers_engine import TransformersEngine
        from llama2_chat.models import load_policy, sampling_dtype
        from llama2_chat.tokenizers import load_tokenizer

        # A bar for every file of weights would run through the conversation.
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        source = self.offer.policies[self.offer.check(name)]
        settings = self.offer.settings
        tokenizer = load_tokenizer(source.path, source.gguf_file)
        chat_format = build_chat_format(settings.chat_format, tokenizer)
        model = load_policy(source.path, settings, gguf_file=source.gguf_file)
        engine = TransformersEngine(
            model,
            stop_id=chat_format.stop_id,
            padding_id=tokenizer.padding_id,
            autocast=sampling_dtype(settings),
        )
        max_tokens = int(getattr(model.config, "max_position_embeddings", 4096))
        if self.max_new_tokens is not None and self.max_new_tokens >= max_tokens:
            raise UserInputError(
                f"--max-new-tokens {self.max_new_tokens}: {name} takes {max_tokens} tokens in all, prompt included"
            )
        return Speaker(engine, chat_format, max_tokens, model.num_parameters())

    def _new_tokens(self, max_tokens: int) -> int:
        return self.max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, max_tokens // 2)

    def _parameters(self) -> int:
        return sum(speaker.parameters for speaker in self._loaded.values())
