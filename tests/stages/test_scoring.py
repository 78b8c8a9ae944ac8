"""Scoring: raw scores, gate and combination, whatever company a dialogue is in and however many ask at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llama2_chat import RewardScorer
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.models import save_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import LLAMA2_TEMPLATE, HuggingFaceTokenizer


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model whose tokenizer knows other pieces than that of the rest."""
    folder = tmp_path_factory.mktemp("other") / "model"
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=300, seed=9)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 450))
    tokenizer.chat_template = LLAMA2_TEMPLATE
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512, num_labels=1,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.padding_id,
    )  # fmt: skip
    settings = RunSettings(base_model=BaseModelSource(path="unused"), device="cpu")
    save_model(LlamaForSequenceClassification(config), tokenizer, folder, settings=settings, card="")
    return folder


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    """Forty dialogues of one to three turns, five answers to each of eight prompts, some with a system message."""
    rng = random.Random(0)
    words = [
        "what",
        "is",
        "two",
        "plus",
        "three",
        "cat",
        "dog",
        "blue",
        "France",
        "capital",
        "of",
        "the",
        "name",
        "please",
        "tell",
        "me",
        "a",
        "story",
    ]

    def text(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randrange(1, most)))

    made = []
    for number in range(8):
        prompt = [{"role": "system", "content": text(8)}] if number % 3 == 0 else []
        for _ in range(number % 3):
            prompt += [{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(9)}]
        prompt.append({"role": "user", "content": text(12)})
        made += [[*prompt, {"role": "assistant", "content": text(15)}] for _ in range(5)]
    return made


@pytest.mark.parametrize("which", ["trained", "other_words"])
def test_a_score_is_that_of_plain_transformers(which: str, request, rewards, conversations) -> None:
    """The folder loaded by transformers alone: its tokenizer's chat template, its model, one dialogue at a time."""
    folder = request.getfixturevalue("other_words") if which == "other_words" else rewards["safety"][0].model
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            model(
                tokenizer.apply_chat_template(c, return_tensors="pt", return_dict=True)["input_ids"]
            ).logits.item()
            for c in conversations
        ]
    scores = RewardScorer.from_pretrained(folder, device="cpu").score(conversations)
    assert [score.helpfulness for score in scores] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_the_two_models_may_read_with_different_tokenizers(rewards, other_words, conversations) -> None:
    folder = rewards["helpfulness"][0].model
    both = RewardScorer.from_pretrained(folder, other_words, device="cpu").score(conversations)
    one = RewardScorer.from_pretrained(folder, device="cpu").score(conversations)
    other = RewardScorer.from_pretrained(other_words, device="cpu").score(conversations)
    assert [s.helpfulness for s in both] == [s.helpfulness for s in one]
    assert [s.safety for s in both] == [s.helpfulness for s in other]


def test_a_prompt_is_computed_once_for_all_of_its_answers(rewards, conversations, monkeypatch) -> None:
    """Tokens that pass through the model: each prompt's once and each answer's."""
    model = RewardModel.from_pretrained(rewards["helpfulness"][0].model, device="cpu")
    passed = []
    model.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: passed.append(inputs[0].numel())
    )
    prompt = [Message("user", "What is two plus three, and why is the capital of France blue?")]
    dialogues = [[*prompt, Message("assistant", f"{n}.")] for n in range(10)]
    model.score_messages(dialogues)
    ids = [model.encode(d) for d in dialogues]
    prompt_length = len(model.chat_format.prompt_ids(prompt))
    assert prompt_length > 20
    assert sum(passed) <= prompt_length + sum(len(row) - prompt_length for row in ids)


def test_many_threads_get_what_one_gets(rewards, other_words, conversations) -> None:
    scorer = RewardScorer.from_pretrained(rewards["helpfulness"][0].model, other_words, device="cpu")
    alone = [scorer.score([c])[0] for c in conversations]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda c: scorer.score([c])[0], conversations * 3))
    assert together == alone * 3


def test_scores_do_not_depend_on_order_or_batches(rewards, conversations, monkeypatch) -> None:
    scorer = RewardScorer.from_pretrained(rewards["helpfulness"][0].model, device="cpu")
    whole = [s.helpfulness for s in scorer.score(conversations)]
    assert [s.helpfulness for s in scorer.score(conversations)] == whole
    reverse = [s.helpfulness for s in scorer.score(conversations[::-1])]
    assert reverse[::-1] == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr("llama2_chat.reward.scoring._TOKEN_BUDGET", {"cpu": 64})
    assert [s.helpfulness for s in scorer.score(conversations)] == pytest.approx(whole, abs=1e-5)


def test_scorer_gates_and_does_not_depend_on_company(rewards) -> None:
    scorer = RewardScorer.from_pretrained(
        rewards["helpfulness"][0].model, rewards["safety"][0].model, device="cpu"
    )
    dialogues = [
        [{"role": "user", "content": f"What is {n} plus 2?"}, {"role": "assistant", "content": "5. " * n}]
        for n in range(1, 9)
    ]
    together = scorer.score(dialogues, [n % 2 == 0 for n in range(8)])
    for number, score in enumerate(together):
        (alone,) = scorer.score([dialogues[number]], [number % 2 == 0])
        assert alone.helpfulness == pytest.approx(score.helpfulness, abs=1e-5)
        tagged = number % 2 == 0 or score.safety_probability < 0.15
        assert score.branch == ("safety" if tagged else "helpfulness")
        raw = score.safety if tagged else score.helpfulness
        assert score.combined == pytest.approx(torch.tensor(raw).sigmoid().item(), abs=1e-6)


def test_equal_dialogues_are_scored_once(rewards, monkeypatch) -> None:
    model = RewardModel.from_pretrained(rewards["helpfulness"][0].model, device="cpu")
    scored = []
    score_tokens = RewardModel.score_tokens
    monkeypatch.setattr(
        RewardModel, "score_tokens", lambda self, rows: scored.extend(rows) or score_tokens(self, rows)
    )
    one, other = (
        [Message("user", "What is 2 plus 2?"), Message("assistant", answer)] for answer in ("Four.", "Five.")
    )
    scores = model.score_messages([one, other, one, tuple(one)])
    assert len(scored) == 2
    assert scores.tolist() == [*score_tokens(model, scored).tolist(), *[scores[0]] * 2]
    assert model.score_messages([]).shape == (0,)


def test_scorer_without_a_safety_model(rewards) -> None:
    scorer = RewardScorer.from_pretrained(rewards["helpfulness"][0].model, device="cpu")
    (score,) = scorer.score([[Message("user", "Hi"), Message("assistant", "Hello.")]], [True])
    assert (score.safety, score.safety_probability, score.branch) == (None, None, "helpfulness")
    assert score.combined == score.helpfulness_probability
    assert scorer.score([]) == []


def test_scorer_refuses_what_it_cannot_score(rewards, sft) -> None:
    scorer = RewardScorer.from_pretrained(rewards["helpfulness"][0].model, device="cpu")
    with pytest.raises(UserInputError, match="ends with the assistant"):
        scorer.score([[{"role": "user", "content": "Hi"}]])
    with pytest.raises(UserInputError, match="1 entries for 2"):
        scorer.score([[Message("user", "a"), Message("assistant", "b")]] * 2, [True])
    with pytest.raises(UserInputError, match="num_labels"):
        RewardModel.from_pretrained(sft[0].model)
