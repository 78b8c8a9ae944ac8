"""The value model: a reward model's trunk and scalar head, read at every response token instead of the last."""

from __future__ import annotations

from transformers import PreTrainedModel

from llama2_chat.models import load_reward_model, reward_model_from_policy
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog
from llama2_chat.tokenizers import ChatTokenizer, load_tokenizer


def load_value_model(
    config: PpoConfig,
    settings: RunSettings,
    tokenizer: ChatTokenizer,
    events: EventLog,
    *,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """A model with one scalar output that reads the policy's token ids.

    It starts from `config.value`, by default the helpfulness reward model. Where that one was trained with
    other tokens, the policy's ids mean nothing to it: then from the policy's trunk with a fresh head, and a
    warning says so.
    """
    source = config.value or config.helpfulness
    if same_tokens(tokenizer, load_tokenizer(source)):
        return load_reward_model(source, settings)
    events.write(
        "warning",
        message=f"value: {source} has another tokenizer than the policy, so the value model starts from the "
        "policy's trunk with a fresh head; name a reward model of the policy's own tokenizer in `value`, or "
        "give it time with training.warmup_iterations",
    )
    return reward_model_from_policy(config.policy, settings, gguf_file=gguf_file)


def same_tokens(left: ChatTokenizer, right: ChatTokenizer) -> bool:
    """Whether every id stands for the same piece of text in both."""
    return (left.vocab_size, left.eos_id) == (right.vocab_size, right.eos_id) and all(
        left.decode([number], keep_control=True) == right.decode([number], keep_control=True)
        for number in range(left.vocab_size)
    )
