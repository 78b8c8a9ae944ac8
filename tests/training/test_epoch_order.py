"""Which rows an epoch trains on, in which order, for one process and for several."""

from __future__ import annotations

import pytest

from llama2_chat.sft.trainer import EpochOrder


def order(steps_done: int, *, rows: int = 21, batch_size: int = 8, seed: int = 3) -> list[int]:
    made = EpochOrder(rows, batch_size, seed, lambda: steps_done)
    found = list(made)
    assert len(found) == len(made)
    return found


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own() -> None:
    first, second = order(0), order(3)  # 21 rows make three steps of eight an epoch
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second
    assert order(0, seed=4) != first == order(0)


@pytest.mark.parametrize("steps_done", [3, 4, 5])
def test_resume_within_an_epoch_has_that_epochs_order(steps_done: int) -> None:
    """The order after 4 or 5 steps, in the midst of the second epoch, against that at its beginning."""
    assert order(steps_done) == order(3)


def test_several_processes_get_whole_steps_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of one process, filled up to three steps of eight with the row after the last, which trains nothing."""
    alone = order(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert order(3) == [*alone, 21, 21, 21]
    assert len(order(3, rows=24)) == 24
