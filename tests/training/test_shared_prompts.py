"""Both answers of a pair computed on one prompt: equal to whole dialogues, each in a padded row of its own."""

from __future__ import annotations

import random
from itertools import pairwise, product

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from llama2_chat.packed_attention import PACKED_ATTENTION, Piece, pieces_of, tree_mask, use_packed_attention
from llama2_chat.reward import pooling
from llama2_chat.reward.data import UNLABELLED, collate_pairs
from llama2_chat.reward.loss import preference_loss, safety_loss
from llama2_chat.reward.pooling import (
    LEAST_SHARED,
    SEPARATE,
    RowLayout,
    pack_dialogues,
    pool_at_ends,
    row_layout,
    scores_at_ends,
    tree_size,
    trees_of,
)

PADDING = 0
SHARED_ROWS = RowLayout(share=True, one_row=False)
ONE_ROW = RowLayout(share=True, one_row=True)


def a_reward_model(
    attention: str, family: str = "llama", heads: int = 2, **options: object
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        vocab_size=50,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=PADDING,
        **options,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="sdpa" if attention == PACKED_ATTENTION else attention
    )
    if attention == PACKED_ATTENTION:
        assert use_packed_attention(model)
    return model.eval()


@pytest.fixture
def pairs() -> list[tuple[list[int], list[int]]]:
    """Twelve pairs with prompts of 1 to 30 tokens; two of them have the same prompt, one the same first words."""
    rng = random.Random(0)
    made = []
    prompts = [
        [1] + [rng.randrange(3, 50) for _ in range(length)] for length in (0, 4, 9, 15, 20, 29, 8, 12, 25, 11)
    ]
    for prompt in [*prompts, prompts[5], prompts[4]]:
        answers = [[rng.randrange(3, 50) for _ in range(rng.randrange(1, 12))] + [2] for _ in range(2)]
        made.append((prompt + answers[0], prompt + answers[1]))
    chosen, _ = made[4]
    made[4] = (chosen, [*chosen[:-2], 7, 8, 2])  # the answers too begin alike
    return made


def padded_scores(model: PreTrainedModel, dialogues: list[list[int]]) -> Tensor:
    """transformers' own scores of whole dialogues, padded on the right under a mask."""
    longest = max(len(d) for d in dialogues)
    ids = torch.tensor([d + [PADDING] * (longest - len(d)) for d in dialogues])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in dialogues])
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def shared_scores(model: PreTrainedModel, dialogues: list[list[int]]) -> Tensor:
    packed = pack_dialogues(dialogues, PADDING, row_layout(model))
    return scores_at_ends(model, packed.input_ids, packed.position_ids, packed.rows, packed.ends)


def columns_of(pairs: list[tuple[list[int], list[int]]]) -> list[dict[str, object]]:
    labels = [1, 0, UNLABELLED]
    return [
        {
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "margin": [0.0, 1 / 3, 1.0][number % 3],
            "chosen_safe": labels[number % 3],
            "rejected_safe": labels[number % 2],
        }
        for number, (chosen, rejected) in enumerate(pairs)
    ]


def loss_of(scores: Tensor, rows: list[dict[str, object]]) -> Tensor:
    batch = collate_pairs(rows, PADDING)
    chosen, rejected = scores.chunk(2)
    labelled = batch["safe"] != UNLABELLED
    return preference_loss(chosen, rejected, margins=batch["margin"]) + safety_loss(
        scores[labelled], batch["safe"][labelled].bool()
    )


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ATTENTIONS = [PACKED_ATTENTION, "sdpa", "eager"]


@pytest.mark.parametrize(
    ("attention", "heads", "extra"),
    # Every attention with every head layout and every way to train; pairs of the three, all of them.
    list(product(ATTENTIONS, [4, 2, 1], ["plain", "checkpointing", "lora"])),
)
def test_loss_and_gradients_equal_separate_padded_dialogues(
    attention: str, heads: int, extra: str, pairs: list[tuple[list[int], list[int]]]
) -> None:
    model = a_reward_model(attention, heads=heads)
    trained = model
    if extra == "lora":
        config = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=4, modules_to_save=["score"], init_lora_weights=False
        )
        trained = peft.get_peft_model(model, config)
    rows = columns_of(pairs)
    whole = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    expected_loss = loss_of(padded_scores(trained, whole), rows)
    expected = gradients(trained, expected_loss)
    if extra == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    pool_at_ends(model)
    batch = collate_pairs(rows, PADDING, row_layout(model))
    scores = trained(**{name: batch[name] for name in ("input_ids", "position_ids", "rows", "ends")})
    loss = loss_of(scores, rows)
    found = gradients(trained, loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert any("lora" in name for name in found) == (extra == "lora")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_scores_of_other_families(
    family: str, attention: str, pairs: list[tuple[list[int], list[int]]]
) -> None:
    model = a_reward_model(attention, family, **({"sliding_window": None} if family == "mistral" else {}))
    assert row_layout(model).share
    dialogues = [ids for pair in pairs for ids in pair]
    with torch.no_grad():
        torch.testing.assert_close(
            shared_scores(model, dialogues), padded_scores(model, dialogues), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {"sliding_window": 4}), ("llama", {"attention_dropout": 0.1}), ("gpt2", {})],
)
def test_a_model_that_cannot_share_gets_whole_dialogues(
    family: str, options: dict[str, object], pairs: list[tuple[list[int], list[int]]]
) -> None:
    model = a_reward_model("sdpa", family, **options)
    assert row_layout(model) == SEPARATE
    dialogues = [ids for pair in pairs for ids in pair]
    assert pack_dialogues(dialogues, PADDING, row_layout(model)).input_ids.numel() >= sum(map(len, dialogues))
    with torch.no_grad():
        torch.testing.assert_close(
            shared_scores(model, dialogues), padded_scores(model, dialogues), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_answer_does_not_see_the_other(attention: str) -> None:
    """Whatever the chosen answer says, the rejected one's score stays the same to the bit, and the reverse."""
    model = a_reward_model(attention)
    prompt = list(range(1, 21))
    chosen, rejected = [*prompt, 30, 31, 32, 2], [*prompt, 40, 41, 2]
    with torch.no_grad():
        before = shared_scores(model, [chosen, rejected])
        other_chosen = shared_scores(model, [[*prompt, 30, 9, 10, 11], rejected])
        other_rejected = shared_scores(model, [chosen, [*prompt, 40, 12, 13]])
    assert before[1] == other_chosen[1]
    assert before[0] != other_chosen[0]
    assert before[0] == other_rejected[0]
    assert before[1] != other_rejected[1]


def test_under_autocast_to_bfloat16_a_mask_does_what_pieces_do(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    dialogues = [ids for pair in pairs for ids in pair]
    found = {}
    for attention in ATTENTIONS:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found[attention] = shared_scores(a_reward_model(attention), dialogues)
    exact = padded_scores(a_reward_model("sdpa"), dialogues)
    for scores in found.values():
        torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.02)  # bfloat16 has eight bits


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_is_computed_once(attention: str) -> None:
    """Tokens that pass through the embeddings: prompt + both answers, without padding."""
    model = a_reward_model(attention)
    prompt = list(range(1, 31))
    pairs = [([*prompt, 40, 2], [*prompt, 41, 42, 43, 2])]
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    batch = collate_pairs(columns_of(pairs), PADDING, row_layout(model))
    scores_at_ends(model, *(batch[name] for name in ("input_ids", "position_ids", "rows", "ends")))
    assert seen == [30 + 2 + 4]


def visible(input_ids: Tensor, position_ids: Tensor, row: int, end: int) -> list[int]:
    """What token `end` of a row sees, from the definition: the last token before it of every lower position."""
    tokens, place = [], end
    for position in range(int(position_ids[row, end]), -1, -1):
        while position_ids[row, place] != position:
            assert position_ids[row, place] > position
            place -= 1
        tokens.append(int(input_ids[row, place]))
        place -= 1
    return tokens[::-1]


dialogues_strategy = st.lists(
    st.lists(st.integers(1, 3), min_size=1, max_size=24).map(lambda tail: [9] * (len(tail) % 3 * 5) + tail),
    min_size=1,
    max_size=12,
)


@given(dialogues_strategy)
def test_every_dialogue_sees_its_own_tokens(dialogues: list[list[int]]) -> None:
    for layout in (SEPARATE, SHARED_ROWS, ONE_ROW):
        packed = pack_dialogues(dialogues, PADDING, layout)
        for number, ids in enumerate(dialogues):
            row, end = int(packed.rows[number]), int(packed.ends[number])
            assert visible(packed.input_ids, packed.position_ids, row, end) == ids
        mask = tree_mask(packed.position_ids)
        for number, ids in enumerate(dialogues):
            seen = mask[packed.rows[number], 0, packed.ends[number]] == 0
            assert packed.input_ids[packed.rows[number]][seen].tolist() == ids


@given(dialogues_strategy)
def test_trees_hold_every_dialogue_once_and_are_a_function_of_them_alone(dialogues: list[list[int]]) -> None:
    trees = trees_of(dialogues)
    assert sorted(branch.number for tree in trees for branch in tree) == list(range(len(dialogues)))
    for tree in trees:
        assert tree[0].start == 0
        for earlier, branch in pairwise(tree):
            ids = dialogues[branch.number]
            assert LEAST_SHARED <= branch.start < len(ids)
            assert ids[: branch.start] == dialogues[earlier.number][: branch.start]
    computed = sum(tree_size(tree, dialogues) for tree in trees)
    packed = pack_dialogues(dialogues, PADDING, ONE_ROW)
    assert packed.input_ids.numel() == computed <= sum(map(len, dialogues))


def test_the_pieces_of_a_row_by_hand() -> None:
    # A dialogue of 5 tokens, a branch from its third on, a branch of that one, one of the first two, another dialogue.
    positions = [0, 1, 2, 3, 4, 3, 4, 5, 4, 2, 3, 0, 1]
    assert pieces_of(torch.tensor([positions])) == [
        Piece(5),
        Piece(3, ((0, 3),)),
        Piece(1, ((0, 3), (1, 1))),
        Piece(2, ((0, 2),)),
        Piece(2),
    ]
    seen = (tree_mask(torch.tensor([positions]))[0, 0] == 0).long().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert seen[5] == [1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert seen[7] == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert seen[8] == [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert seen[10] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert seen[11] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_a_branch_longer_than_what_it_continues_is_refused() -> None:
    with pytest.raises(ValueError, match="goes on from 7 tokens, before it are 3"):
        pieces_of(torch.tensor([[0, 1, 2, 7, 8]]))
    with pytest.raises(ValueError, match="goes on from 4 tokens, before it are 2"):
        pieces_of(torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]]))  # not even of the row above


def test_a_row_may_begin_anywhere() -> None:
    assert pieces_of(torch.tensor([[0, 1, 2], [2, 3, 4]])) == [Piece(3), Piece(3)]


def test_no_tree_grows_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "LONGEST_TREE", 40)
    prompt = list(range(1, 21))
    trees = trees_of([[*prompt, answer, 2] for answer in range(30, 50)])
    sizes = [20 + 2 * len(tree) for tree in trees]
    assert max(sizes) == 40
    assert sum(len(tree) for tree in trees) == 20


def test_what_all_prompts_begin_with_is_shared_as_well_as_each_prompt() -> None:
    """A system message of 10 tokens, two prompts of 10 more, two answers of 2 tokens to each."""
    system = list(range(1, 11))
    dialogues = [[*system, *[prompt] * 10, answer, 2] for prompt in (20, 21) for answer in (30, 31)]
    (tree,) = trees_of(dialogues)
    assert [branch.start for branch in tree] == [0, 20, 10, 20]
    assert tree_size(tree, dialogues) == 10 + 2 * 10 + 4 * 2


def test_a_few_common_tokens_are_not_worth_a_branch() -> None:
    short = [[1, 5, 6, 2], [1, 5, 7, 2]]
    assert [len(tree) for tree in trees_of(short)] == [1, 1]
    longer = [[*range(1, 1 + LEAST_SHARED), 30], [*range(1, 1 + LEAST_SHARED), 31]]
    assert [len(tree) for tree in trees_of(longer)] == [2]
