"""Between the server and the reward models: encoding and scoring as two steps, done by two threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama2_chat.serving.rendered import RenderedText
from llama2_chat.serving.requests import DialogueToScore

if TYPE_CHECKING:
    from llama2_chat.reward.scoring import RewardScorer, Score

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """A dialogue's token ids for each reward model; `safety` is None without one."""

    helpfulness: list[int]
    safety: list[int] | None
    is_safety: bool

    @property
    def tokens(self) -> int:
        """Of both models together."""
        return len(self.helpfulness) + len(self.safety or ())


class ScoringEngine:
    """One or two reward models that score encoded dialogues as `RewardScorer.score` scores their messages."""

    def __init__(self, scorer: RewardScorer, *, name: str) -> None:
        self.scorer = scorer
        self.name = name
        self._models = scorer.models
        self._readers = [RenderedText(model.chat_format) for model in self._models]

    @property
    def batch_tokens(self) -> int:
        """Tokens that are worth scoring at once on the models' device, for each model."""
        return _BATCH_TOKENS[self._models[0].model.device.type] * len(self._models)

    def encode_messages(self, dialogue: DialogueToScore) -> EncodedDialogue:
        """As offline scoring encodes: oldest turns go where it is too long.

        Raises:
            UserInputError: the last turn alone is too long, or the chat format refuses the dialogue.
        """
        return _encoded([model.encode(dialogue.messages) for model in self._models], dialogue.is_safety)

    def encode_text(self, text: str) -> EncodedDialogue:
        """A rendered dialogue, whose prompt is taken as not tagged.

        Raises:
            UserInputError: it is not in the models' chat format, or too long.
        """
        from llama2_chat.errors import UserInputError

        rows = [reader.encode(text) for reader in self._readers]
        for model, ids in zip(self._models, rows, strict=True):
            if len(ids) > model.max_tokens:
                raise UserInputError(
                    f"{len(ids)} tokens; the model takes {model.max_tokens}, and rendered text is not shortened"
                )
        return _encoded(rows, is_safety=False)

    def score(self, dialogues: Sequence[EncodedDialogue]) -> list[Score]:
        """The scores of encoded dialogues, in order; equal ones are computed once."""
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        keys = ((tuple(d.helpfulness), tuple(d.safety or ())) for d in dialogues)
        places = [distinct.setdefault(key, len(distinct)) for key in keys]
        helpfulness, *safety = (
            model.score_tokens([key[slot] for key in distinct])[places]
            for slot, model in enumerate(self._models)
        )
        return self.scorer.combine(
            helpfulness, safety[0] if safety else None, [dialogue.is_safety for dialogue in dialogues]
        )


def name_of(folder: Path) -> str:
    """A model's name for its users: its folder's, or that of the stage whose `model` folder it is."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _encoded(rows: list[list[int]], is_safety: bool) -> EncodedDialogue:
    helpfulness, *safety = rows
    return EncodedDialogue(helpfulness, safety[0] if safety else None, is_safety)
