"""The value model: a reward model's trunk under a scalar head that is read at every response token."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from llama2_chat.models import load_reward_model, reward_model_from_policy
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog
from llama2_chat.tokenizers import ChatTokenizer, load_tokenizer, same_tokens


def load_value_model(
    config: PpoConfig,
    settings: RunSettings,
    tokenizer: ChatTokenizer,
    events: EventLog,
    *,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """A model with one scalar output that reads the policy's token ids and at first says 0 everywhere.

    Its trunk is that of `config.value`, by default the helpfulness reward model. Where that one was trained
    with other tokens, the policy's ids mean nothing to it: then it is the policy's own, and a warning says so. So it is
    where `helpfulness` is a custom reward, which has no trunk to lend.

    The head starts at 0, the mean of whitened scores. A reward model's own head has been trained at the last
    token alone and on another scale; in the middle of a response it says nothing yet, loudly.
    """
    source = config.value or config.helpfulness
    if isinstance(source, str) and same_tokens(tokenizer, load_tokenizer(source)):
        model = load_reward_model(source, settings)
    else:
        why = (
            f"{source} has another tokenizer than the policy"
            if isinstance(source, str)
            else "helpfulness is a custom reward"
        )
        events.write(
            "warning",
            message=f"value: {why}, so the value model starts from the policy's trunk; name a reward model of the "
            "policy's own tokenizer in `value`, or give it time with training.warmup_iterations",
        )
        model = reward_model_from_policy(config.policy, settings, gguf_file=gguf_file)
    head: nn.Module = model.score  # type: ignore[assignment]
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return model
