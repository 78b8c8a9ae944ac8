"""llama2-chat: post-training that turns a base language model into a chat model, the Llama 2-Chat way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2_chat.reward.scoring import RewardScorer, Score

__version__ = "0.1.0"
__all__ = ["RewardScorer", "Score", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the scoring API when it is asked for, so that `import llama2_chat` needs no torch."""
    if name in ("RewardScorer", "Score"):
        from llama2_chat.reward import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
