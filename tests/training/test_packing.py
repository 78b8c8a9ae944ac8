"""Packing wastes no token, loses none, and leaks nothing."""

from __future__ import annotations

import pytest
import torch

from llama2_chat.packing import IGNORED, best_fit_decreasing, collate_rows, pack
from llama2_chat.tokenization import TokenizedDialogue


def test_best_fit_decreasing_by_hand() -> None:
    # 7 | 6 | 5 opens a third, 4 fits best beside 6 (room 4), 3 beside 7 (room 3), 2 beside 5 (room 5)
    assert list(map(list, best_fit_decreasing([3, 7, 4, 6, 2, 5], 10))) == [[1, 0], [3, 2], [5, 4]]


def test_a_sequence_that_cannot_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens"):
        best_fit_decreasing([3, 11], 10)


def test_every_token_is_packed_once(dialogues: list[TokenizedDialogue]) -> None:
    rows = pack(dialogues, 32)
    assert all(len(row.input_ids) <= 32 for row in rows)
    packed = sorted(token for row in rows for token in row.input_ids)
    assert packed == sorted(token for d in dialogues for token in d.input_ids)
    trained = sum(label != IGNORED for row in rows for label in row.labels)
    assert trained == sum(sum(d.loss_mask) for d in dialogues)


def test_labels_and_positions_by_hand() -> None:
    first = TokenizedDialogue([1, 5, 6, 2], [False, False, True, True])
    second = TokenizedDialogue([1, 7, 2], [True, True, True])
    (row,) = pack([first, second], 8)
    assert row.input_ids == [1, 5, 6, 2, 1, 7, 2]
    # A dialogue's first token has nothing before it: it is never trained, whatever its mask says.
    assert row.labels == [IGNORED, IGNORED, 6, 2, IGNORED, 7, 2]
    assert row.position_ids == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_separate_ones(tiny_llama, dialogues, attention: str) -> None:
    model = tiny_llama(attention)
    rows = pack(dialogues, 40)
    batch = collate_rows(
        [{"input_ids": r.input_ids, "labels": r.labels, "position_ids": r.position_ids} for r in rows], 0
    )
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        compared = 0
        for number, row in enumerate(rows):
            starts = [i for i, position in enumerate(row.position_ids) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
                alone = model(input_ids=torch.tensor([row.input_ids[start:end]]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[number, start:end], alone, rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared == len(dialogues)


def test_changing_one_dialogue_changes_no_other(tiny_llama) -> None:
    model = tiny_llama()
    first, second = [1, 5, 6, 7, 2], [1, 8, 9, 2]

    def logits_of_second(start: list[int]) -> torch.Tensor:
        (row,) = pack([TokenizedDialogue(start, [True] * 5), TokenizedDialogue(second, [True] * 4)], 9)
        batch = collate_rows(
            [{"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}], 0
        )
        with torch.no_grad():
            return model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0, 5:]

    assert torch.equal(logits_of_second(first), logits_of_second([1, 40, 41, 42, 2]))


def test_padding_is_ignored_and_isolated() -> None:
    rows = [
        {"input_ids": [1, 5, 2], "labels": [IGNORED, 5, 2], "position_ids": [0, 1, 2]},
        {"input_ids": [1], "labels": [IGNORED], "position_ids": [0]},
    ]
    batch = collate_rows(rows, padding_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 2], [IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
