"""How processes share a batch: each response once, evenly, and as many forward passes for each process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat import distributed
from llama2_chat.ppo import sharing
from llama2_chat.ppo.config import PpoTraining
from llama2_chat.ppo.experience import MiniBatch, split_into_mini_batches
from llama2_chat.ppo.sharing import own_share, put_together, share_out


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_each_place_is_dealt_once_and_no_process_gets_more_than_it_must(
    sizes: list[int], processes: int
) -> None:
    shares = share_out(sizes, processes)
    assert len(shares) == processes
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) == math.ceil(len(sizes) / processes)


def test_shares_by_hand() -> None:
    # 9 to the first, 7 and 6 to the second and third; 5 joins the 6, 4 the 7, 1 the 9.
    assert share_out([1, 9, 5, 7, 4, 6], 3) == [[0, 1], [3, 4], [2, 5]]
    # The 10 weighs as much as all others together, but half of the places are the first process's.
    assert share_out([10, 3, 3, 4], 2) == [[0, 2], [1, 3]]
    assert share_out([5, 5], 3) == [[0], [1], []]
    assert share_out([3, 1, 2], 1) == [[0, 1, 2]]


@given(st.lists(st.integers(1, 500), min_size=16, max_size=64), st.integers(2, 4))
def test_shares_are_nearly_equal(sizes: list[int], processes: int) -> None:
    sums = [sum(sizes[place] for place in share) for share in share_out(sizes, processes)]
    assert max(sums) - min(sums) <= 2 * max(sizes)


def test_results_go_back_to_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 9, 5, 7, 4, 6]
    monkeypatch.setattr(sharing.distributed, "process_count", lambda: 3)
    made = []
    for process in range(3):
        monkeypatch.setattr(sharing.distributed, "process_number", lambda process=process: process)
        made.append([f"made of {place}" for place in own_share(sizes)])
    monkeypatch.setattr(sharing.distributed, "gather_objects", lambda own: made)
    assert put_together(sizes, made[0]) == [f"made of {place}" for place in range(6)]


def test_one_process_needs_nobody() -> None:
    assert own_share([4, 2, 8]) == [0, 1, 2]
    assert put_together([4, 2, 8], ["a", "b", "c"]) == ["a", "b", "c"]
    one = torch.ones(2)
    distributed.add_up(one)
    assert one.tolist() == [1.0, 1.0]


PROMPTS = [[1] * (1 + number % 4) for number in range(10)]
RESPONSES = [[5 + number] * (1 + (7 * number) % 9) for number in range(10)]


def mini_batches(processes: int, process: int, micro_batch_size: int | None) -> list[MiniBatch]:
    training = PpoTraining(batch_size=10, mini_batch_size=5)
    training = training.model_copy(update={"micro_batch_size": micro_batch_size})
    return split_into_mini_batches(
        PROMPTS, RESPONSES, training, shuffled_by="x", padding_id=0, device=torch.device("cpu"),
        processes=processes, process=process,
    )  # fmt: skip


def members_of(mini_batch: MiniBatch) -> list[int]:
    return [index for part in mini_batch if not part.fills for index in part.members.tolist()]


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_processes_divide_the_mini_batches_of_one(processes: int, micro_batch_size: int | None) -> None:
    alone = mini_batches(1, 0, micro_batch_size)
    shared = [mini_batches(processes, number, micro_batch_size) for number in range(processes)]
    for number, whole in enumerate(alone):
        own = [process[number] for process in shared]
        found = [index for mini_batch in own for index in members_of(mini_batch)]
        assert sorted(found) == sorted(members_of(whole))
        assert len({len(mini_batch) for mini_batch in own}) == 1  # else one would wait in FSDP's gathering
        assert all(len(mini_batch) >= 1 for mini_batch in own)
        assert not any(part.fills for part in whole)
    fills = sum(part.fills for process in shared for mini_batch in process for part in mini_batch)
    # Mini-batches of 5: 3 + 2, 2 + 2 + 1, or 1 each for five of seven processes.
    expected = {(2, None): 0, (2, 1): 2, (2, 2): 2, (3, None): 0, (3, 1): 2, (3, 2): 0}
    assert fills == expected.get((processes, micro_batch_size), 4)
