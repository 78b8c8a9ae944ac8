"""Packing wastes no token, loses none, and leaks nothing."""

from __future__ import annotations

import random

import pytest
import torch

from llama2_chat.packed_attention import PACKED_ATTENTION
from llama2_chat.packing import IGNORED, PackedRow, best_fit_decreasing, collate_rows, pack
from llama2_chat.tokenization import TokenizedDialogue


def test_best_fit_decreasing_by_hand() -> None:
    """Bins against those worked out by hand."""
    # 7 | 6 | 5 opens a third, 4 fits best beside 6 (room 4), 3 beside 7 (room 3), 2 beside 5 (room 5)
    assert list(map(list, best_fit_decreasing([3, 7, 4, 6, 2, 5], 10))) == [[1, 0], [3, 2], [5, 4]]


def test_a_sequence_that_cannot_fit_is_an_error() -> None:
    """A length above the capacity against the documented error."""
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens"):
        best_fit_decreasing([3, 11], 10)


def test_every_token_is_packed_once(dialogues: list[TokenizedDialogue]) -> None:
    """All tokens of the rows against all tokens of the dialogues, and likewise those trained."""
    rows = pack(dialogues, 32)
    assert all(len(row.input_ids) <= 32 for row in rows)
    packed = sorted(token for row in rows for token in row.input_ids)
    assert packed == sorted(token for d in dialogues for token in d.input_ids)
    trained = sum(label != IGNORED for row in rows for label in row.labels)
    assert trained == sum(sum(d.loss_mask) for d in dialogues)


def test_labels_and_positions_by_hand() -> None:
    """Ids, labels and positions of one row against those written out by hand."""
    first = TokenizedDialogue([1, 5, 6, 2], [False, False, True, True])
    second = TokenizedDialogue([1, 7, 2], [True, True, True])
    (row,) = pack([first, second], 8)
    assert row.input_ids == [1, 5, 6, 2, 1, 7, 2]
    # A dialogue's first token has nothing before it: it is never trained, whatever its mask says.
    assert row.labels == [IGNORED, IGNORED, 6, 2, IGNORED, 7, 2]
    assert row.position_ids == [0, 1, 2, 3, 0, 1, 2]


ATTENTION = ["sdpa", "eager", PACKED_ATTENTION]
"""What models are loaded with: sdpa, and on the CPU `packed_attention.py` in its place; eager for comparison."""


def logits(model, row: PackedRow) -> torch.Tensor:
    """(S, V), computed as training does."""
    batch = collate_rows([row.to_columns()], 0)
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]


@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_logits_equal_separate_ones(tiny_llama, dialogues, attention: str) -> None:
    """Packing equivalence: each dialogue's logits in its row against those of a forward pass of its own."""
    model = tiny_llama(attention)
    compared = 0
    for row in pack(dialogues, 40):
        packed = logits(model, row)
        starts = [i for i, position in enumerate(row.position_ids) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([row.input_ids[start:end]]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == len(dialogues)


@pytest.mark.parametrize("attention", ATTENTION)
def test_packing_leaks_nothing(tiny_llama, attention: str) -> None:
    """Any token of another dialogue changed, before or after in the row: not one bit of the logits moves."""
    model = tiny_llama(attention)
    lengths = (5, 4, 6)
    rng = random.Random(0)
    made = [[1, *(rng.randrange(3, 50) for _ in range(length - 1))] for length in lengths]

    def row_of(pieces: list[list[int]]) -> PackedRow:
        (row,) = pack([TokenizedDialogue(ids, [True] * len(ids)) for ids in pieces], 15)
        return row

    order = [2, 0, 1]  # best fit decreasing
    starts = {piece: sum(lengths[other] for other in order[: order.index(piece)]) for piece in order}
    expected = logits(model, row_of(made))
    for changed in order:
        others = [list(ids) for ids in made]
        others[changed][1:] = [(token + 7) % 47 + 3 for token in others[changed][1:]]
        found = logits(model, row_of(others))
        for piece in order:
            span = slice(starts[piece], starts[piece] + lengths[piece])
            assert torch.equal(found[span], expected[span]) is (piece != changed), (changed, piece)


@pytest.mark.parametrize("attention", ATTENTION)
def test_packing_without_isolation_is_plain_concatenation(tiny_llama, dialogues, attention: str) -> None:
    """A row of `isolate: false` against the same tokens as one text without positions or mask."""
    model = tiny_llama(attention)
    rows = pack(dialogues, 40, isolate=False)
    assert [row.labels for row in rows] == [row.labels for row in pack(dialogues, 40)]
    for row in rows:
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
        torch.testing.assert_close(logits(model, row), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, rows[0]), logits(model, pack(dialogues, 40)[0]), atol=1e-3)


def test_padding_is_ignored_and_isolated() -> None:
    """A batch of two rows against its tensors written out by hand."""
    rows = [
        {"input_ids": [1, 5, 2], "labels": [IGNORED, 5, 2], "position_ids": [0, 1, 2]},
        {"input_ids": [1, 2], "labels": [IGNORED, 2], "position_ids": [0, 1]},
    ]
    batch = collate_rows(rows, padding_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 2], [IGNORED, 2, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]


def test_packing_leaves_out_rows_of_one_token() -> None:
    """A row that trains nothing is dropped where others stand beside it, and kept where it is alone."""
    nothing = {"input_ids": [0], "labels": [IGNORED], "position_ids": [0]}
    row = {"input_ids": [1, 5, 2], "labels": [IGNORED, 5, 2], "position_ids": [0, 1, 2]}
    assert collate_rows([nothing, row, nothing], 0)["input_ids"].tolist() == [[1, 5, 2]]
    assert collate_rows([nothing, nothing], 0)["labels"].tolist() == [[IGNORED]]
